"""Which tokenizers of `tokenizers` are believed when they come from a file. Knows the form of
tokenizer.json; encodes nothing.

The library's native code aborts the process, or computes without end, on some files: a fixed
padding of 10^12 tokens, a replacement that grows text, a pattern that backtracks, a table of
characters that points outside of itself. So only those kinds of parts are accepted that cannot do
this, with bounds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from stage2_prior.file_checks import check_library_folder, read_json_object

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
MAX_TOKENIZER_BYTES = 2**25
_MAX_TOKENS = 2**19
"""Entries of a vocabulary; twice as many merges."""
_MAX_LETTERS = 1024
"""Of a token."""
_MAX_PARTS = 16
_MAX_GROWING = 3
"""Parts that can make text longer, each by up to four letters for one."""
_MAX_PART = 4096
"""Letters of a part's description."""
_KINDS = {
    "normalizer": "BertNormalizer Lowercase NFC NFD NFKC NFKD Nmt Prepend Replace Sequence Strip "
    "StripAccents",
    "pre_tokenizer": "BertPreTokenizer ByteLevel Digits Metaspace Punctuation Sequence Split "
    "Whitespace WhitespaceSplit",
    "decoder": "BPEDecoder ByteFallback ByteLevel Fuse Metaspace Replace Sequence Strip WordPiece",
    "model": "BPE Unigram WordLevel WordPiece",
}
_PATTERNS = frozenset(
    {
        r"\s+",
        r" {2,}",
        # CLIP, GPT-2, Llama 3 and GPT-4, Qwen 2
        r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|"
        r"[^\s\p{L}\p{N}]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
        r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+",
    }
)
"""Patterns that do not backtrack much, of published tokenizers."""
_PLAIN = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}
"""A template that adds nothing."""


class UnsupportedTokenizer(ValueError):
    """A tokenizer of a kind that is not accepted."""


def load_tokenizer(folder: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer that transformers saved in a folder, and what its tokens are for, as
    `PreTrainedTokenizerFast` takes it. No code of the folder is looked for.

    Raises:
        OSError: a file is missing.
        ValueError: a file is not safe to read, or holds no tokenizer that is accepted.
    """
    path = folder / TOKENIZER_FILE
    tokenizer = build_tokenizer(read_json_object(path, MAX_TOKENIZER_BYTES), path)
    config = read_json_object(folder / CONFIG_FILE)
    roles: dict[str, Any] = {}
    for role in ("pad_token", "bos_token", "eos_token", "unk_token"):
        token = config.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        if token is None:
            continue
        if not isinstance(token, str) or tokenizer.token_to_id(token) is None:
            raise ValueError(
                f"{folder / CONFIG_FILE} has a {role} that {TOKENIZER_FILE} lacks; use another "
                "tokenizer"
            )
        roles[role] = token
    cleans = config.get("clean_up_tokenization_spaces")
    if isinstance(cleans, bool):
        roles["clean_up_tokenization_spaces"] = cleans
    check_encodes(tokenizer, path)
    return tokenizer, roles


def check_encodes(tokenizer: Tokenizer, where: str | Path) -> None:
    """Encodes a text with rare letters, which shows what is left to be wrong.

    Args:
        where: the file, for messages.

    Raises:
        UnsupportedTokenizer: it cannot be encoded.
    """
    try:
        tokenizer.encode_batch(["a \u2603Z"], add_special_tokens=False)
    except Exception as error:  # the library has no narrower class
        raise UnsupportedTokenizer(
            f"{where} cannot encode every text ({' '.join(str(error).split())[:200]}); use another "
            "tokenizer"
        ) from error


def check_pretrained(folder: Path) -> None:
    """Checks the JSON of a folder that transformers is to load a tokenizer from.

    Raises:
        OSError: it is no folder, or a file cannot be read.
        ValueError: a file is not safe to read, or holds no tokenizer that is accepted.
    """
    check_library_folder(folder)
    if (path := folder / TOKENIZER_FILE).exists():
        build_tokenizer(read_json_object(path, MAX_TOKENIZER_BYTES), path)


def build_tokenizer(values: Mapping[str, Any], where: str | Path) -> Tokenizer:
    """The tokenizer that a tokenizer.json describes, without its truncation, padding and special
    tokens around texts, which text ids do not have.

    Args:
        where: the file, for messages.

    Raises:
        UnsupportedTokenizer: a part is of a kind that is not accepted, or out of bounds.
    """
    if problem := next(_problems(values), None):
        raise UnsupportedTokenizer(
            f"{where} is no text tokenizer that is accepted: {problem}; use another tokenizer"
        )
    after = values.get("post_processor")
    used = dict(values) | {
        "truncation": None,
        "padding": None,
        "post_processor": after if after == _PLAIN else None,
    }
    try:
        tokenizer: Tokenizer = Tokenizer.from_str(json.dumps(used))
    except Exception as error:  # the library has no narrower class
        raise UnsupportedTokenizer(
            f"{where} is no text tokenizer ({str(error)[:200]}); use another tokenizer"
        ) from error
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    if set(ids) != set(range(len(ids))):
        raise UnsupportedTokenizer(
            f"{where} has ids that are not 0 to {len(ids) - 1}, each of one token; use another "
            "tokenizer"
        )
    return tokenizer


def _problems(values: Mapping[str, Any]) -> Iterator[str]:
    """What is not accepted, found first what costs least."""
    model = values.get("model")
    if not isinstance(model, dict) or model.get("type") not in _KINDS["model"].split():
        yield f"its model is none of {_KINDS['model']}"
        return
    yield from _vocabulary_problems(model, values.get("added_tokens") or [])
    yield from _model_problems(model)
    for role in ("normalizer", "pre_tokenizer", "decoder"):
        yield from _part_problems(role, values.get(role))


def _vocabulary_problems(model: Mapping[str, Any], added: object) -> Iterator[str]:
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        yield "its added_tokens are no list of tokens"
        return
    vocabulary = model.get("vocab")
    if model["type"] == "Unigram":
        if not isinstance(vocabulary, list) or not all(
            isinstance(entry, list)
            and len(entry) == 2
            and isinstance(entry[1], int | float)
            and math.isfinite(entry[1])
            for entry in vocabulary
        ):
            yield "its vocabulary is no list of tokens with finite scores"
            return
        tokens = [entry[0] for entry in vocabulary]
    elif isinstance(vocabulary, dict) and all(type(i) is int for i in vocabulary.values()):
        tokens = list(vocabulary)
    else:
        yield "its vocabulary has no number for each token"
        return
    if not tokens:
        yield "its vocabulary is empty"
    tokens += [token.get("content") for token in added]
    merges = model.get("merges", [])
    if len(tokens) > _MAX_TOKENS:
        yield f"it has {len(tokens):,} tokens, and at most {_MAX_TOKENS:,} are read"
    if not isinstance(merges, list) or len(merges) > 2 * _MAX_TOKENS:
        yield f"its merges are no list of at most {2 * _MAX_TOKENS:,}"
    are_texts = all(isinstance(token, str) and len(token) <= _MAX_LETTERS for token in tokens)
    # An added token that is empty would match everywhere.
    if not are_texts or not all(token.get("content") for token in added):
        yield f"a token is no text of at most {_MAX_LETTERS} letters"


def _model_problems(model: Mapping[str, Any]) -> Iterator[str]:
    kind = model["type"]
    vocabulary = model["vocab"]
    if kind == "BPE":
        # A prefix makes the library read outside of tokens that are shorter.
        if model.get("continuing_subword_prefix") or model.get("dropout"):
            yield "its model has a subword prefix or dropout"
        if model.get("end_of_word_suffix") not in (None, "", "</w>"):
            yield "its model has an unknown end_of_word_suffix"
    elif kind == "Unigram":
        unknown = model.get("unk_id")
        if type(unknown) is not int or not 0 <= unknown < len(vocabulary):
            yield "its unk_id is no token"
    else:
        if str(model.get("unk_token")) not in vocabulary:
            yield "its unk_token is no token"
        if len(str(model.get("continuing_subword_prefix", ""))) > 8:
            yield "its subword prefix is longer than 8 letters"
        most = model.get("max_input_chars_per_word", 100)
        if type(most) is not int or not 0 < most <= _MAX_LETTERS:
            yield f"its max_input_chars_per_word is not from 1 to {_MAX_LETTERS}"


def _part_problems(role: str, part: object) -> Iterator[str]:
    if part is None:
        return
    if len(json.dumps(part)) > _MAX_PART:
        yield f"its {role} is described by more than {_MAX_PART:,} letters"
        return
    parts = list(_flat(part))
    kinds = _KINDS[role].split()
    unknown = [p.get("type") if isinstance(p, dict) else p for p in parts]
    unknown = [kind for kind in unknown if kind not in kinds]
    if unknown or len(parts) > _MAX_PARTS:
        yield f"its {role} is {str((unknown or ['of many parts'])[0])[:40]!r}, not one of {kinds}"
        return
    growing = [p for p in parts if p["type"] in ("Replace", "Prepend")]
    if len(growing) > _MAX_GROWING or any(
        len(str(p.get("content", p.get("prepend", "")))) > 4 for p in growing
    ):
        yield f"its {role} makes texts longer"
    for p in parts:
        pattern = p.get("pattern")
        if isinstance(pattern, dict) and pattern.get("Regex", r"\s+") not in _PATTERNS:
            yield f"its {role} has a pattern that no published tokenizer has"
        if any(type(value) is int and not 0 <= value <= _MAX_PARTS for value in p.values()):
            yield f"its {role} has a number above {_MAX_PARTS}"


def _flat(part: object) -> Iterator[Any]:
    """A part, and the parts of sequences."""
    yield part
    if isinstance(part, dict):
        for name in ("normalizers", "pretokenizers", "decoders"):
            inner = part.get(name, [])
            for each in inner if isinstance(inner, list) else [inner]:
                yield from _flat(each)
