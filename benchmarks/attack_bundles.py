"""Bundles that were changed on purpose: what loading them does, in time and memory.

Each change is made to a copy of a bundle, which is then loaded and, where it loads, draws an image.
A change is right where the bundle works, or is refused in one line. What is counted as wrong: any
other error, a message of several lines, more than `SECONDS` of computing or `MIB` of memory.

    python -m benchmarks.attack_bundles runs/shapes/bundle --changes 1000 --seed 0
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 1.0
"""Processor time that a refusal may take, on top of the imports."""
MIB = 500
"""Memory that a refusal may take, on top of the imports."""
HANGS = 60
"""Seconds of waiting after which a change counts as a hang."""

CONFIGS = (
    "pipeline.json",
    "tokenizer/config.json",
    "prior/config.json",
    "text_tokenizer/text.json",
)
WEIGHTS = ("tokenizer/model.safetensors", "prior/model.safetensors")
TEXT = "text_tokenizer/tokenizer.json"
TEXT_CONFIG = "text_tokenizer/tokenizer_config.json"
FILES = (*CONFIGS, *WEIGHTS, TEXT, TEXT_CONFIG)

VALUES: tuple[Any, ...] = (
    2**62,
    2**31 - 1,
    10**5,
    -1,
    0,
    1.5,
    1e308,
    float("nan"),
    float("inf"),
    True,
    None,
    "",
    "x",
    "9" * 5000,
    [],
    {},
    [2**62, 2**62],
    [[]],
    {"model": {}},
)
"""What stands in a JSON file in the place of another value."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """One change of a bundle's folder."""

    name: str
    apply: Callable[[Path], object]


# -- Changes of any file, by its path


def to_pipe(path: Path) -> None:
    """A pipe that nobody writes to."""
    path.unlink()
    os.mkfifo(path)


def to_zeros(path: Path) -> None:
    """A link to a device that never ends."""
    path.unlink()
    path.symlink_to("/dev/zero")


def to_link_outside(path: Path) -> None:
    """A link to the same content in another folder."""
    outside = path.parents[2] / f"outside-{path.name}"
    path.rename(outside)
    path.symlink_to(outside)


def to_loop(path: Path) -> None:
    """A link to itself."""
    path.unlink()
    path.symlink_to(path.name)


def to_folder(path: Path) -> None:
    """A folder of the same name."""
    path.unlink()
    path.mkdir()


def to_nothing(path: Path) -> None:
    """An empty file."""
    path.write_bytes(b"")


def to_half(path: Path) -> None:
    """A truncated file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def to_huge(path: Path) -> None:
    """64 GiB of zeros, which take no room on the disk."""
    os.truncate(path, 2**36)


def to_binary(path: Path) -> None:
    """Bytes that are no text."""
    path.write_bytes(b"\xff\xfe\x00" * 100)


PATH_CHANGES = (
    to_pipe,
    to_zeros,
    to_link_outside,
    to_loop,
    to_folder,
    to_nothing,
    to_half,
    to_huge,
    to_binary,
)


def flip_bit(path: Path, place: int) -> None:
    """One bit, in the byte at `place` modulo the size."""
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << place % 8
    path.write_bytes(content)


# -- Changes of JSON files


def edit(path: Path, change: Callable[[Json], object]) -> None:
    """Changes a JSON object in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def places(value: object) -> list[tuple[Any, Any]]:
    """Each (object or list, key) within a JSON value, of the first 300 of each."""
    found: list[tuple[Any, Any]] = []
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())[:300]
    elif isinstance(value, list):
        items = list(enumerate(value))[:300]
    for key, inner in items:
        found += [(value, key), *places(inner)]
    return found


def replace_value(path: Path, place: int, value: object) -> None:
    """Another value at one place, of any depth."""

    def change(content: Json) -> None:
        all_places = places(content)
        inside, key = all_places[place % len(all_places)]
        inside[key] = value

    edit(path, change)


def nest(path: Path, depth: int) -> None:
    """A file of nested lists."""
    path.write_text('{"model": ' + "[" * depth + "]" * depth + "}")


def lengthen(path: Path, bracket: str) -> None:
    """A file of five million empty lists or objects."""
    path.write_text('{"model": [' + ",".join([bracket] * 5_000_000) + "]}")


def ask_for_code(path: Path) -> None:
    """The entry that asks transformers to run code of the folder, and the code."""
    entry = {"AutoTokenizer": ["tok.Evil", "tok.Evil"], "AutoConfig": "tok.Evil"}
    edit(path, lambda content: content.update(auto_map=entry, tokenizer_class="Evil"))
    (path.parent / "tok.py").write_text(
        f"open({str(path.parents[1] / 'code-ran')!r}, 'w').close()\nclass Evil: pass\n"
    )


# -- Changes of weights


def with_header(path: Path, change: Callable[[Json], object]) -> None:
    """Changes the header of a safetensors file; its tensors stay."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    written = json.dumps(header).encode()
    path.write_bytes(len(written).to_bytes(8, "little") + written + content[8 + length :])


def first_tensor(header: Json) -> Json:
    """The entry of a tensor."""
    tensor: Json = next(value for key, value in header.items() if key != "__metadata__")
    return tensor


def longer_header(path: Path) -> None:
    """A length of the header that is past the file."""
    content = path.read_bytes()
    path.write_bytes((2**62).to_bytes(8, "little") + content[8:])


def many_tensors(path: Path) -> None:
    """A header of 100,000 empty tensors."""
    with_header(
        path,
        lambda header: header.update(
            {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10**5)}
        ),
    )


WEIGHT_CHANGES: dict[str, Callable[[Path], object]] = {
    "longer header": longer_header,
    "many tensors": many_tensors,
    "huge shape": lambda p: with_header(p, lambda h: first_tensor(h).update(shape=[2**40, 2**20])),
    "negative offset": lambda p: with_header(
        p, lambda h: first_tensor(h).update(data_offsets=[-8, 8])
    ),
    "unknown dtype": lambda p: with_header(p, lambda h: first_tensor(h).update(dtype="F4096")),
    "whole numbers": lambda p: with_header(p, lambda h: first_tensor(h).update(dtype="I32")),
}

# -- Changes of the text tokenizer, each of which aborted, hung or grew without a check

_VOCABULARY = {"a": 0, "<pad>": 1, "<start>": 2, "<end>": 3}


def _split(pattern: str) -> Json:
    return {
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }
    }


def _replace(content: str) -> Json:
    return {"type": "Replace", "pattern": {"String": "a"}, "content": content}


def _sequence(depth: int) -> Json:
    part: Json = {"type": "NFC"}
    for _ in range(depth):
        part = {"type": "Sequence", "normalizers": [part]}
    return part


TEXT_CHANGES: dict[str, Json] = {
    "padding": {
        "padding": {
            "strategy": {"Fixed": 10**12},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<pad>",
        }
    },
    "truncation": {
        "truncation": {
            "direction": "Right",
            "max_length": 1,
            "strategy": "LongestFirst",
            "stride": 5,
        }
    },
    "growing": {"normalizer": {"type": "Sequence", "normalizers": [_replace("a" * 16)] * 8}},
    "growing long": {"normalizer": _replace("a" * 10**7)},
    "prepend": {"normalizer": {"type": "Prepend", "prepend": "a" * 10**7}},
    "nested": {"normalizer": _sequence(40)},
    "nested deep": {"normalizer": _sequence(90)},
    "characters": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}},
    "bad characters": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////wA="}},
    "backtracking": _split("(a|aa|a*)+$"),
    "long pattern": _split("((a{1,1000}){1,1000}){1,1000}"),
    "deep pattern": _split("(" * 10**5 + ")" * 10**5),
    "no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "template": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "q", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
    "decoder": {"decoder": {"type": "CTC", "pad_token": "", "word_delimiter_token": ""}},
    "strip": {"decoder": {"type": "Strip", "content": "a", "start": 2**60, "stop": 2**60}},
    "model": {"model": {"type": "BPE", "vocab": {}, "merges": []}},
    "prefix": {
        "model": {
            "type": "BPE",
            "vocab": _VOCABULARY,
            "merges": [["a", "a"]],
            "continuing_subword_prefix": "x" * 50,
        }
    },
    "large id": {"model": {"type": "BPE", "vocab": _VOCABULARY | {"b": 2**32 - 1}, "merges": []}},
    "no unknown word": {"model": {"type": "WordLevel", "vocab": _VOCABULARY, "unk_token": "q"}},
    "unigram": {"model": {"type": "Unigram", "unk_id": 2**40, "vocab": [["a", 0.0]]}},
    "many tokens": {
        "model": {"type": "BPE", "vocab": {str(i): i for i in range(600_000)}, "merges": []}
    },
    "long token": {"model": {"type": "BPE", "vocab": {"a" * 10**7: 0}, "merges": []}},
    "empty token": {"added_tokens": [{"id": 0, "content": "", "special": True}]},
    "many added": {"added_tokens": [{"id": i, "content": f"t{i}"} for i in range(10**5)]},
}


def sign_text(folder: Path) -> None:
    """Makes the hashes of a text tokenizer those of its files as they are, as an attacker would."""
    path = folder / TEXT
    if path.is_file() and not path.is_symlink():
        fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        edit(
            folder / "pipeline.json",
            lambda content: content.update(text_tokenizer_fingerprint=fingerprint),
        )
        edit(folder / "text_tokenizer" / "text.json", lambda content: content.pop("sha256", None))


# -- All of them


def every_change() -> Iterator[Change]:
    """Each kind of change once, to each file that can have it: the part without chance."""
    for file in FILES:
        for alter in PATH_CHANGES:
            yield Change(f"{file}: {alter.__name__}", lambda b, f=file, a=alter: a(b / f))
    for file in (*CONFIGS, TEXT, TEXT_CONFIG):
        yield Change(f"{file}: auto_map", lambda b, f=file: ask_for_code(b / f))
        yield Change(f"{file}: nested", lambda b, f=file: nest(b / f, 10**5))
        yield Change(f"{file}: long", lambda b, f=file: lengthen(b / f, "[]"))
    for file in WEIGHTS:
        for name, change in WEIGHT_CHANGES.items():
            yield Change(f"{file}: {name}", lambda b, f=file, c=change: c(b / f))
    for name, values in TEXT_CHANGES.items():
        yield Change(f"{TEXT}: {name}", lambda b, v=values: _text(b, v))
    for part in ("", "tokenizer", "prior", "text_tokenizer"):
        for file in ("modeling.py", "pytorch_model.bin", "x.PKL"):
            yield Change(f"{part}/{file}", lambda b, p=part, f=file: (b / p / f).write_text("x"))


def _text(folder: Path, values: Json) -> None:
    edit(folder / TEXT, lambda content: content.update(values))
    sign_text(folder)


def random_change(seed: int) -> Change:
    """A change by chance, the same for a seed."""
    chance = random.Random(seed)
    place = chance.randrange(10**9)
    match chance.randrange(10):
        case 0:
            file = chance.choice(FILES)
            return Change(f"{file}: bit {place}", lambda b: flip_bit(b / file, place))
        case 1:
            return chance.choice(list(every_change()))
        case 2 | 3:
            values = chance.choice(VALUES)

            def text(folder: Path) -> None:
                replace_value(folder / TEXT, place, values)
                sign_text(folder)

            return Change(f"{TEXT}: {place} = {str(values)[:20]}", text)
        case _:
            file = chance.choice((*CONFIGS, TEXT_CONFIG))
            value = chance.choice(VALUES)
            return Change(
                f"{file}: {place} = {str(value)[:20]}",
                lambda b: replace_value(b / file, place, value),
            )


@dataclass(frozen=True)
class Result:
    """What a changed bundle did."""

    name: str
    outcome: str
    """`works`, `refused`, or what was wrong."""
    seconds: float
    """Processor time."""
    mib: float
    """Growth of the process's largest memory."""
    message: str


def _stop(*_: object) -> None:
    raise TimeoutError("it hangs")


def attempt(bundle: Path, change: Change, folder: Path, seconds: float = SECONDS) -> Result:
    """Makes the change on a copy of the bundle in a folder, loads it and draws an image.

    Args:
        seconds: processor time that a refusal may take.
    """
    from pipeline.inference.pipeline import TextToImagePipeline

    copy = folder / "bundle"
    shutil.copytree(bundle, copy)
    change.apply(copy)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.process_time()
    message = ""
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(HANGS)
    try:
        pipe = TextToImagePipeline.from_pretrained(copy)
        pipe(["a red heart"])
        outcome = "works"
    except TimeoutError:
        outcome = "hangs"
    except (ValueError, OSError) as error:
        message = str(error)
        outcome = "refused" if len(message.splitlines()) == 1 else "several lines"
    except BaseException as error:  # what is looked for
        message = str(error)
        outcome = f"traceback {type(error).__name__}"
    finally:
        signal.alarm(0)
    taken = time.process_time() - begun
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    if outcome == "refused" and taken > seconds:
        outcome = "slow"
    if grown > MIB:
        outcome = "memory"
    if (copy / "code-ran").exists():
        outcome = "code ran"
    return Result(change.name, outcome, taken, grown, message)


def attack(bundle: Path, changes: Iterator[Change], seconds: float = SECONDS) -> Iterator[Result]:
    """The result of each change, in turn; names each one on stderr before it, in case it ends the
    process."""
    for change in changes:
        print(change.name, file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            yield attempt(bundle, change, Path(folder), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--changes", type=int, default=0, help="random ones, after each kind once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=int, help="as many of all these changes, by chance")
    parser.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        help="processor time that a refusal may take; more on a machine that does other work",
    )
    options = parser.parse_args()
    changes = [
        *every_change(),
        *(random_change(options.seed * 10**6 + i) for i in range(options.changes)),
    ]
    if options.sample is not None:
        changes = random.Random(options.seed).sample(changes, options.sample)
    counts: Counter[str] = Counter()
    for result in attack(options.bundle, iter(changes), options.seconds):
        counts[result.outcome] += 1
        if result.outcome not in ("works", "refused"):
            print(f"{result}")
    print(json.dumps(dict(counts)))
    sys.exit(set(counts) - {"works", "refused"} != set())


if __name__ == "__main__":
    main()
