"""Pictures to the codes dataset, split over processes, going on after a kill: `encode_dataset`, and `encode_elsewhere` for other programs.

Knows what codes are made with and in which order; how files lie is for pipeline/data/codes.py and shards.py to know.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from pipeline.checkpoints import refuse_taken, write_file
from pipeline.config import Experiment, to_dict
from pipeline.data import codes
from pipeline.data.batches import loaded_ahead
from pipeline.data.export import Format, export_codes
from pipeline.data.shards import Rows, Shard, damage, kind_of, write_shard
from pipeline.data.sources import Source, Split, load_source
from pipeline.runtime import make_accelerator, processes, uses_bf16
from pipeline.settings import as_made, encode_settings, needed
from stage1_tokenizer import ImageTokenizer, to_model_range

_ALL = 10**9
"""More pictures than any source holds out."""
_SPLITS: tuple[Split, Split] = ("train", "held_out")


def encode_dataset(experiment: Experiment, *, tokenizer_folder: Path | None = None, folder: Path | None = None) -> Path:
    """Writes the codes of training and held-out pictures, split over the processes; returns their folder. What an interrupted try of the
    same left there is gone on from, and files of a whole folder that were damaged since are made anew.

    Args:
        tokenizer_folder: a tokenizer other than the run's own, RUN/tokenizer.
        folder: where to write to in place of RUN/codes.

    Raises:
        ValueError: the folder holds codes, whole or not, that were made with something else; says what changed.
        FileNotFoundError: there is no tokenizer yet.
    """
    folder = folder or experiment.folder / "codes"
    tokenizer = ImageTokenizer.load(tokenizer_folder or needed(experiment.folder / "tokenizer", "train-tokenizer"))
    if experiment.data.image_size % tokenizer.own_config.stride:
        raise ValueError(
            f"data.image_size is {experiment.data.image_size} and the tokenizer's code grid needs a multiple of "
            f"{tokenizer.own_config.stride}; set data.image_size={tokenizer.image_size}"
        )
    by_split = dict(zip(_SPLITS, sources_of(experiment), strict=True))
    accelerator = make_accelerator(experiment, trackers=False)
    plan, known = _what_is_there(folder, _plan(experiment, tokenizer, by_split, uses_bf16(experiment.precision, accelerator.device)))
    files, whole = codes.shard_rows(plan), (folder / codes.MANIFEST).is_file()
    todo = _to_do(folder, [name for rows in files.values() for name in rows], known, accelerator)
    if whole and not todo:
        return folder
    if accelerator.is_main_process and not whole:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / codes.PLAN, json.dumps(plan, indent=2) + "\n")
    accelerator.wait_for_everyone()
    tokenizer.to(accelerator.device).eval()
    # Dealt out anew, and not once for all: each process has an equal share of what is left, however many there were before the kill.
    mine = todo[accelerator.process_index :: accelerator.num_processes]
    codes_a_view = sum(level["grid"][0] * level["grid"][1] for level in plan["levels"])
    for split in _SPLITS:
        rows = files[split]
        own = {name: rows[name] for name in mine if name in rows}
        views = plan["views"] if split == "train" else 1
        pictures = sum(map(len, own.values()))
        with tqdm(total=pictures, desc=f"encode {split}", disable=not (pictures and accelerator.is_main_process), mininterval=1.0) as bar:
            size = experiment.encode.batch_size
            parts = (list(part[first : first + size]) for part in own.values() for first in range(0, len(part), size))
            blocks = _encoded(tokenizer, by_split[split], parts, views, experiment, plan["bf16"], bar)
            for name, part in own.items():
                batches = islice(blocks, -(-len(part) // size))
                codes.record_shard(folder, write_shard(folder / name, batches, codes=views * codes_a_view, kind=kind_of(plan["levels"])))
    # A process that fails does not come this far, and its launcher ends the others.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        made = {name: codes.recorded_shard(folder, name) if name in todo else known[name] for rows in files.values() for name in rows}
        codes.complete(folder, plan, {split: [_there(folder, name, made[name]) for name in rows] for split, rows in files.items()})
    accelerator.wait_for_everyone()
    return folder


def encode_elsewhere(
    experiment: Experiment, out: Path, form: Format, *, tokenizer_folder: Path | None = None
) -> tuple[dict[str, int], list[str]]:
    """Codes for other programs: those of the experiment's data, by its own or another tokenizer, in folder `out`; returns the number of
    pictures of each split and the files' names.

    Raises:
        FileExistsError: there is something else in `out` already.
        ValueError: as `encode_dataset`, of the folder beside `out` where the codes are until all of them are there.
    """
    refuse_taken(out, codes.MANIFEST, "codes")
    made = out.parent / f".{out.name}.arrow"
    encode_dataset(experiment, tokenizer_folder=tokenizer_folder, folder=made)
    processes().wait_for_everyone()  # or the first could remove what the others have yet to find whole
    if not processes().is_main_process:
        return {}, []
    files = export_codes(made, out, form)
    shutil.rmtree(made)
    return codes.read_manifest(out)["rows"], files


def every_picture_once(experiment: Experiment, but: Collection[str] = ()) -> Experiment:
    """The experiment with all of its data encoded once, whatever its prior is given: of the shapes, which are unlimited, as many as it
    says. The fields of `encode` named in `but` stay as they are."""
    unlimited = experiment.data.source == "shapes"
    whole: dict[str, Any] = {"views": 1, "shift": 0, "flip": False} | ({} if unlimited else {"pictures": None, "held_out": _ALL})
    return replace(experiment, encode=replace(experiment.encode, **{name: v for name, v in whole.items() if name not in but}))


def sources_of(experiment: Experiment) -> tuple[Source, Source]:
    """Training and held-out pictures, before anything is written."""
    source, held_out = load_source(experiment.data, "train"), load_source(experiment.data, "held_out")
    if not len(source) or not len(held_out):
        raise ValueError(
            f"{source.name} has {len(source)} pictures to train on and {len(held_out)} held out to judge on, and each needs at least "
            f"one; with few pictures another share than data.held_out={experiment.data.held_out} is needed (0.2)"
        )
    return source, held_out


def _plan(experiment: Experiment, tokenizer: ImageTokenizer, sources: Mapping[Split, Source], bf16: bool) -> dict[str, Any]:
    """All that decides the content of the files."""
    options, side = experiment.encode, experiment.data.image_size // tokenizer.own_config.factor
    limits = {"train": options.pictures, "held_out": options.held_out}
    return {
        "format": codes.FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "levels": [{"grid": list(level.grid), "num_codes": level.num_codes} for level in tokenizer.quantizer.layout((side, side))],
        "sources": {split: source.fingerprint for split, source in sources.items()},
        "views": options.views,
        "seed": experiment.seed if options.views > 1 else None,  # of how views differ; the first is the picture itself
        "bf16": bf16,
        "rows": {split: min(len(source), limits[split] or len(source)) for split, source in sources.items()},
        "shard_rows": options.shard_rows,
        "settings": {"data": to_dict(experiment.data), "encode": encode_settings(experiment), "precision": experiment.precision},
    }


def _what_is_there(folder: Path, plan: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Shard]]:
    """The plan to follow, and the files that were written by it.

    Raises:
        ValueError: what is there was made by another plan.
    """
    if (folder / codes.MANIFEST).is_file():
        made = codes.read_manifest(folder)
        codes.check_form(made, folder)
        # A file that is made anew has as many rows as before, and the same arithmetic, whatever this machine computes in.
        plan = {**plan, "shard_rows": made["shard_rows"], "bf16": made["bf16"]}
        _refuse_other(made, plan, f"{folder} holds codes")
        return plan, {shard.name: shard for shards in codes.shards_of(made).values() for shard in shards}
    if (folder / codes.PLAN).is_file():
        try:
            begun = json.loads((folder / codes.PLAN).read_text())
            codes.check_format(begun["format"], folder)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder / codes.PLAN} is damaged ({error}); remove {folder} and run `minidalle encode` again") from error
        _refuse_other(begun, plan, f"{folder} holds unfinished codes")
        names = (name for rows in codes.shard_rows(plan).values() for name in rows)
        return plan, {name: shard for name in names if (shard := codes.recorded_shard(folder, name))}
    return plan, {}


def _refuse_other(made: Mapping[str, Any], plan: Mapping[str, Any], what: str) -> None:
    changes = [] if made["tokenizer"] == plan["tokenizer"] else [f"tokenizer {made['tokenizer']} -> {plan['tokenizer']}"]
    before, now = _flat(as_made(made["settings"])), _flat(as_made(plan["settings"]))
    changes += [f"{key} {before.get(key)} -> {now.get(key)}" for key in sorted(before | now) if before.get(key) != now.get(key)]
    for key, name in (("seed", "seed of the views"), ("shard_rows", "encode.shard_rows")):
        if made[key] != plan[key]:
            changes.append(f"{name} {made[key]} -> {plan[key]}")
    if made["bf16"] != plan["bf16"]:
        changes.append(f"computed in {' -> '.join('bf16' if bf16 else 'fp32' for bf16 in (made['bf16'], plan['bf16']))} (set by precision)")
    for split, fingerprint in plan["sources"].items():
        if made["sources"].get(split) != fingerprint:
            changes.append(f"{split} pictures or captions of the source {made['sources'].get(split)} -> {fingerprint}")
    if changes:
        raise ValueError(f"{what} made with something else ({'; '.join(changes)}); remove that folder and run `minidalle encode` again")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _to_do(folder: Path, names: Sequence[str], known: Mapping[str, Shard], accelerator: Accelerator) -> list[str]:
    """The files that are yet to be written: each process checks a part of those that are there."""
    hashed = sum(shard.bytes for shard in known.values()) <= codes.HASHED_BYTES
    wrong = {}
    for name in names[accelerator.process_index :: accelerator.num_processes]:
        if name not in known:
            wrong[name] = ""
        elif found := damage(folder / name, known[name], hashed=hashed):
            wrong[name] = f"{folder / name} {found}; it is made anew"
    wrong = dict(gather_object(list(wrong.items())))
    for line in filter(None, wrong.values()):
        accelerator.print(line)
    if known and len(wrong) < len(names) and not (folder / codes.MANIFEST).is_file():
        accelerator.print(f"{folder}: going on, {len(names) - len(wrong)} of {len(names)} shards are there")
    return [name for name in names if name in wrong]


def _there(folder: Path, name: str, shard: Shard | None) -> Shard:
    if shard is None or not (folder / name).is_file():
        raise ValueError(f"{folder / name} was not written; run `minidalle encode` again, which goes on from what is there")
    return shard


@torch.no_grad()
def _encoded(
    tokenizer: ImageTokenizer, source: Source, parts: Iterable[list[int]], views: int, experiment: Experiment, bf16: bool, bar: tqdm
) -> Iterator[Rows]:
    """The codes of each part of the source's rows; the next part's pictures are loaded, shifted and mirrored meanwhile."""

    def load(part: list[int]) -> tuple[list[np.ndarray], list[list[str]]]:
        return _views(source, part, views, experiment), _captions(source, part)

    for part, (seen, captions) in loaded_ahead(load, parts):
        found = []
        for images in seen:
            pixels = to_model_range(torch.from_numpy(images)).to(tokenizer.device)
            with torch.autocast(tokenizer.device.type, torch.bfloat16, enabled=bf16):
                found.append(tokenizer.encode(pixels).flatten(1).cpu().numpy())
        bar.update(len(part))
        yield Rows(np.concatenate(found, axis=1), captions, part)


def _views(source: Source, part: list[int], views: int, experiment: Experiment) -> list[np.ndarray]:
    """What is encoded of each picture, (B,S,S,3) a view: the picture itself, then others of it. Other kinds of views belong here."""
    options, images = experiment.encode, source.images(part)
    return [images, *(shifted(images, part, view, options.shift, experiment.seed, options.flip) for view in range(1, views))]


def _captions(source: Source, part: list[int]) -> list[list[str]]:
    """All captions of each picture, the first one first: the one place that asks a source for them."""
    return [[caption] for caption in source.captions(part)]


def shifted(images: np.ndarray, rows: list[int], view: int, shift: int, seed: int, flip: bool = False) -> np.ndarray:
    """Pictures (B,H,W,3) moved by up to `shift` pixels along each axis, the border repeated into the gap, some mirrored."""
    padded = np.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode="edge")
    height, width = images.shape[1:3]
    moved = np.empty_like(images)
    for i, row in enumerate(rows):
        random = np.random.default_rng([seed, row, view])
        dy, dx = random.integers(0, 2 * shift + 1, size=2)
        moved[i] = padded[i, dy : dy + height, dx : dx + width]
        if flip and random.integers(2):
            moved[i] = moved[i, :, ::-1].copy()
    return moved
