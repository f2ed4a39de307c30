"""Images to the codes dataset, split over processes and resumable: `encode_dataset`, and
`encode_for_export` for other programs.

Knows what codes are made with and in which order. Knows no file format: see
pipeline/data/codes/dataset.py and shards.py.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from pipeline.config.data import as_setting, data_settings, settings_beside_content
from pipeline.config.experiment import Experiment, flat, to_dict
from pipeline.config.json_file import read_json
from pipeline.data.codes import dataset as codes
from pipeline.data.codes.export import Format, export_codes
from pipeline.data.codes.shards import EncodedRows, Shard, kind_of, verify_shard, write_shard
from pipeline.data.readers.base import NoCaptions, listed
from pipeline.data.readers.images import EXTENSIONS
from pipeline.data.sampler import prefetch
from pipeline.data.source import Source, Split
from pipeline.runtime.atomic_io import WriteError, atomic_write_text, check_output_dir
from pipeline.runtime.devices import uses_bf16
from pipeline.runtime.distributed import distributed_state, make_accelerator
from pipeline.runtime.log import on_main_process, shows_progress
from pipeline.runtime.progress import ProgressBar
from pipeline.runtime.threads import free_threads
from pipeline.stages.image_views import image_views
from pipeline.stages.manifest import encode_settings, load_complete
from pipeline.stages.run_lock import run_lock, with_run_lock
from pipeline.stages.sources import sources_of
from stage1_tokenizer import TokenizerModule, to_model_range
from stage1_tokenizer.config import nearest_multiple

_log = logging.getLogger(__name__)
_log.addFilter(on_main_process)

_SPLITS: tuple[Split, Split] = ("train", "held_out")


@with_run_lock
def encode_dataset(
    experiment: Experiment,
    *,
    tokenizer_folder: Path | None = None,
    folder: Path | None = None,
    seconds_after: float = 0.0,
    require_captions: bool = True,
) -> Path:
    """Writes the codes of training and validation images, split over the processes; returns their
    folder. An interrupted attempt is resumed, and corrupted files of a finished folder are rebuilt.
    What of the source is left out is logged.

    Args:
        tokenizer_folder: a tokenizer other than the run's own, RUN/tokenizer.
        folder: where to write to in place of RUN/codes.
        seconds_after: estimated seconds that the run takes after this stage, for the progress bar.
        require_captions: leave out images without a caption, unless no image has one.

    Raises:
        ValueError: the folder holds codes, complete or not, that were made with something else;
            says what changed. Or the tokenizer has no codes.
        FileNotFoundError: there is no tokenizer yet.
    """
    folder = folder or experiment.folder / "codes"
    tokenizer = _load_tokenizer(experiment, tokenizer_folder)
    sources = dict(zip(_SPLITS, _sources(experiment, require_captions), strict=True))
    accelerator = make_accelerator(experiment.folder, [], experiment.process_timeout)
    bf16 = uses_bf16(experiment.precision, accelerator.device)
    earlier = {split: source.earlier_fingerprint for split, source in sources.items()}
    plan, known = _load_progress(folder, _plan(experiment, tokenizer, sources, bf16), earlier)
    files = codes.planned_files(plan)
    names = [name for units in files.values() for name in units]
    pending = _pending_shards(folder, names, known, accelerator)
    has_manifest = (folder / codes.MANIFEST).is_file()
    if has_manifest and not pending:
        if accelerator.is_main_process:  # a kill may have come before
            with suppress(OSError):  # where nothing can be written, nothing is removed
                codes.remove_progress(folder, names)
        return folder
    if accelerator.is_main_process and not has_manifest:
        atomic_write_text(folder / codes.PLAN, json.dumps(plan, indent=2) + "\n")
    accelerator.wait_for_everyone()
    _report(sources, plan)
    tokenizer.to(accelerator.device).eval()
    # Dealt out at each start: every process has an equal share of what is left, however many
    # processes there were before.
    mine = pending[accelerator.process_index :: accelerator.num_processes]
    for split in _SPLITS:
        own = {name: files[split][name] for name in mine if name in files[split]}
        encode = partial(_encoded, tokenizer, sources[split], experiment, plan["bf16"])
        _write_shards(folder, own, split, plan, encode, seconds_after)
    # A process that fails does not come this far, and its launcher ends the others.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        recorded = {name: codes.recorded_shard(folder, name) for name in pending}
        shards = {
            split: [_require_shard(folder, name, (known | recorded)[name]) for name in units]
            for split, units in files.items()
        }
        codes.write_manifest(folder, plan, shards)
        for part in sources["train"].parts:
            if part.num_images is None:  # others were reported before
                for problem in part.problems:
                    _log.info(f"{part.name}: {problem}")
    accelerator.wait_for_everyone()
    return folder


def _load_tokenizer(experiment: Experiment, folder: Path | None) -> TokenizerModule:
    """The tokenizer in `folder`, or the run's own."""
    if folder is not None:
        tokenizer = TokenizerModule.from_pretrained(folder)
        tokenizer.require_codes("`minidalle encode`")
    else:
        experiment.require_codes("encode")
        tokenizer = load_complete(
            TokenizerModule.from_pretrained, experiment.folder / "tokenizer", "train-tokenizer"
        )
    stride = tokenizer.own_config.stride
    height, width = experiment.data.size
    if height % stride or width % stride:
        nearest = nearest_multiple(height, stride), nearest_multiple(width, stride)
        raise ValueError(
            f"data.image_size is {as_setting((height, width))} and the tokenizer's code grid needs "
            f"a multiple of {stride}; set data.image_size={as_setting(tokenizer.size)}, or "
            f"{as_setting(nearest)}, the nearest that fits"
        )
    return tokenizer


def _write_shards(
    folder: Path,
    shards: Mapping[str, codes.ShardPlan],
    split: Split,
    plan: Mapping[str, Any],
    encode: Callable[[codes.ShardPlan, int, ProgressBar], Iterator[EncodedRows]],
    seconds_after: float,
) -> None:
    """Encodes and writes a process's shards of a split, by name; the main one shows a bar.

    Args:
        encode: (what a file holds, number of views, bar to move) -> its rows.
    """
    views = plan["augmentations_per_image"] if split == "train" else 1
    codes_per_view = sum(level["grid"][0] * level["grid"][1] for level in plan["levels"])
    known_rows = [len(unit.rows) for unit in shards.values() if unit.rows is not None]
    with ProgressBar(
        total=sum(known_rows) if len(known_rows) == len(shards) else None,
        desc=f"encode {split}",
        disable=not (shards and distributed_state().is_main_process and shows_progress()),
        seconds_after=seconds_after,
    ) as bar:
        for number, (name, unit) in enumerate(shards.items()):
            try:
                with free_threads():
                    shard = write_shard(
                        folder / name,
                        encode(unit, views, bar),
                        codes=views * codes_per_view,
                        kind=kind_of(plan["levels"]),
                    )
                codes.mark_shard_done(folder, shard)
            except WriteError as error:
                raise WriteError(
                    f"{error}; {number} of {len(shards)} shards of {split} are complete in {folder}"
                ) from error


def encode_for_export(
    experiment: Experiment,
    out: Path,
    form: Format,
    *,
    tokenizer_folder: Path | None = None,
    images: Sequence[Path] = (),
) -> tuple[dict[str, int], list[str]]:
    """Codes for other programs, in folder `out`: those of the experiment's data, with and without
    captions, by its own or another tokenizer; returns the number of images per split and the files'
    names.

    Args:
        images: files, or one folder or other source, in place of the source that the experiment
            names. Codes of files are named by their absolute paths.

    Raises:
        FileExistsError: there is something else in `out` already.
        FileNotFoundError: one of `images` is not there.
        ValueError: as `encode_dataset`, of the temporary folder next to `out`.
    """
    check_output_dir(out, codes.MANIFEST, "codes")
    made = out.parent / f".{out.name}.arrow"
    with run_lock(made, experiment.process_timeout):
        if images:
            source = _source_of(images, made)
            experiment = replace(experiment, data=replace(experiment.data, source=source))
        encode_dataset(
            experiment, tokenizer_folder=tokenizer_folder, folder=made, require_captions=False
        )
        # Otherwise the first could remove the folder before the others find it complete.
        distributed_state().wait_for_everyone()
        if not distributed_state().is_main_process:
            return {}, []
        files = export_codes(made, out, form)
        shutil.rmtree(made)
    return codes.read_manifest(out)["rows"], files


def _source_of(images: Sequence[Path], folder: Path) -> str:
    """The `data.source` of one argument, or of several files: a list of them, written to a
    folder."""
    if len(images) == 1 and images[0].suffix.lower() not in EXTENSIONS:
        return str(images[0])
    if missing := [str(one) for one in images if not one.is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(images)} images are no files: {listed(missing[:3])}; give "
            "files, or one folder"
        )
    listing = folder / "images.txt"
    if distributed_state().is_main_process:
        atomic_write_text(listing, "".join(f"{one.absolute()}\n" for one in images))
    distributed_state().wait_for_everyone()
    return str(listing)


def without_augmentation(experiment: Experiment, but: Collection[str] = ()) -> Experiment:
    """The experiment with each image of its data encoded once, whatever its prior trains on.
    Shapes are unlimited, so their number stays. So do the fields of `encode` named in `but`."""
    unlimited = "shapes" in experiment.data.sources
    whole: dict[str, Any] = {"augmentations_per_image": 1, "shift": 0, "flip": False} | (
        {} if unlimited else {"max_images": None, "max_val_images": None}
    )
    return replace(
        experiment,
        encode=replace(
            experiment.encode, **{name: v for name, v in whole.items() if name not in but}
        ),
    )


def _sources(experiment: Experiment, require_captions: bool) -> tuple[Source, Source]:
    """The images to encode. Codes that a prior trains on need both splits and captions; where no
    image has a caption, all are encoded for other programs."""
    load = partial(sources_of, experiment.data, experiment.folder, experiment.process_timeout)
    if require_captions:
        try:
            return load()
        except NoCaptions as error:
            _log.info(f"no prior can be trained on these codes: {str(error).splitlines()[0]}")
    return load(require_captions=False, require_both=False)


def _report(sources: Mapping[Split, Source], plan: Mapping[str, Any]) -> None:
    """Logs how many images are encoded, and what is left out, by reason and with names."""
    limits = {"train": "encode.max_images", "held_out": "encode.max_val_images"}
    for split, source in sources.items():
        planned = [part.get("rows") for part in plan["parts"][split]]
        if source.num_images is None or None in planned:
            continue
        rows = sum(planned)
        of = f" of {source.num_images:,}" if rows < source.num_images else ""
        limit = f" ({limits[split]})" if of else ""
        _log.info(f"{source.name}: encoding {rows:,}{of} {split} images{limit}")
    if sources["train"].num_images is not None:  # what a stream leaves out comes at its end
        for problem in sources["train"].problems:
            _log.info(f"  {problem}")


def _plan(
    experiment: Experiment, tokenizer: TokenizerModule, sources: Mapping[Split, Source], bf16: bool
) -> dict[str, Any]:
    """Everything that the content of the files depends on."""
    options = experiment.encode
    factor = tokenizer.own_config.downsample_factor
    height, width = experiment.data.size
    limits = {"train": options.max_images, "held_out": options.max_val_images}
    weights = list(sources["train"].weights)
    return {
        "format": codes.FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "levels": [
            {"grid": list(level.grid), "num_codes": level.num_codes}
            for level in tokenizer.quantizer.layout((height // factor, width // factor))
        ],
        "sources": {split: source.fingerprint for split, source in sources.items()},
        # For messages
        "num_images": {split: source.num_images for split, source in sources.items()},
        "augmentations_per_image": options.augmentations_per_image,
        # Of how views differ; the first is the image itself.
        "seed": experiment.seed if options.augmentations_per_image > 1 else None,
        "bf16": bf16,
        "parts": {
            split: part_plans(source, weights, limits[split]) for split, source in sources.items()
        },
        "weights": weights,
        "images_per_shard": options.images_per_shard,
        "settings": {
            "data": data_settings(to_dict(experiment.data)),
            "encode": encode_settings(experiment),
            "precision": experiment.precision,
        },
    }


def part_plans(
    source: Source, weights: Sequence[float], limit: int | None
) -> list[dict[str, int | None]]:
    """What is encoded of each part: all of it, or by its weight where no more than `limit` images
    are."""
    shares = [None if limit is None else ceil(limit * w / sum(weights)) for w in weights]
    return [
        part.encoding_plan(first, share)
        for part, first, share in zip(source.parts, source.starts, shares, strict=True)
    ]


def _load_progress(
    folder: Path, plan: dict[str, Any], earlier: Mapping[Split, str | None]
) -> tuple[dict[str, Any], dict[str, Shard]]:
    """The plan to follow, and the files that were written by it.

    Args:
        earlier: what earlier versions called the same images of each split.

    Raises:
        ValueError: the folder was made by another plan.
    """
    if (folder / codes.MANIFEST).is_file():
        made = codes.read_manifest(folder)
        codes.check_form(made, folder)
        # A rebuilt file has as many rows as before, and the same arithmetic on every machine.
        plan = {**plan, "images_per_shard": made["images_per_shard"], "bf16": made["bf16"]}
        plan["sources"] = _as_recorded(made, plan, earlier)
        _refuse_other(made, plan, f"{folder} holds codes")
        return plan, {
            shard.name: shard for shards in codes.shards_of(made).values() for shard in shards
        }
    if (folder / codes.PLAN).is_file():
        remedy = f"move {folder} away and run `minidalle encode` again"
        begun = read_json(folder / codes.PLAN, remedy)
        codes.check_plan(begun, folder / codes.PLAN)
        plan["sources"] = _as_recorded(begun, plan, earlier)
        _refuse_other(begun, plan, f"{folder} holds unfinished codes")
        names = (name for units in codes.planned_files(plan).values() for name in units)
        return plan, {
            name: shard for name in names if (shard := codes.recorded_shard(folder, name))
        }
    return plan, {}


def _as_recorded(
    made: Mapping[str, Any], plan: Mapping[str, Any], earlier: Mapping[Split, str | None]
) -> dict[str, str]:
    """The fingerprints of the plan's sources; as earlier versions recorded them, if they did."""
    return {
        split: made["sources"][split] if made["sources"][split] == earlier[split] else fingerprint
        for split, fingerprint in plan["sources"].items()
    }


def _refuse_other(made: Mapping[str, Any], plan: Mapping[str, Any], what: str) -> None:
    before = _by_name(made)
    now = _by_name(plan)
    changes = [
        f"{name} {before.get(name)} -> {now.get(name)}"
        for name in before | now
        if before.get(name) != now.get(name)
    ]
    if made["sources"] != plan["sources"]:
        then = made.get("num_images", {})
        changes += [
            f"{split}: {then[split]} -> {count} images"
            for split, count in plan["num_images"].items()
            if then.get(split) != count and split in then
        ]
    if changes:
        raise ValueError(
            f"{what} made with something else ({'; '.join(changes)}); go back to that to keep "
            "them, give this run or the folder of its codes another name, or move that folder away "
            "and run `minidalle encode` again"
        )


def _by_name(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What must not change in a plan, as messages call it."""
    settings = plan["settings"] | {"data": settings_beside_content(plan["settings"]["data"])}
    return {
        "tokenizer": plan["tokenizer"],
        **dict(sorted(flat(settings).items())),
        "seed of the views": plan["seed"],
        "encode.images_per_shard": plan["images_per_shard"],
        "precision: computed in": "bf16" if plan["bf16"] else "fp32",
        **{
            f"{split} images or captions of the source": fingerprint
            for split, fingerprint in plan["sources"].items()
        },
    }


def _pending_shards(
    folder: Path, names: Sequence[str], known: Mapping[str, Shard], accelerator: Accelerator
) -> list[str]:
    """The files yet to be written. Each process checks a part of the existing ones."""
    hashed = sum(shard.bytes for shard in known.values()) <= codes.HASHED_BYTES
    wrong = {}
    for name in names[accelerator.process_index :: accelerator.num_processes]:
        if name not in known:
            wrong[name] = ""
        elif found := verify_shard(folder / name, known[name], hashed=hashed):
            wrong[name] = f"{folder / name} {found}; it is rebuilt"
    wrong = dict(gather_object(list(wrong.items())))
    for line in filter(None, wrong.values()):
        _log.info(line)
    if known and len(wrong) < len(names) and not (folder / codes.MANIFEST).is_file():
        _log.info(f"{folder}: resuming, {len(names) - len(wrong)} of {len(names)} shards are there")
    return [name for name in names if name in wrong]


def _require_shard(folder: Path, name: str, shard: Shard | None) -> Shard:
    if shard is None or not (folder / name).is_file():
        raise ValueError(
            f"{folder / name} was not written; run `minidalle encode` again, which resumes from "
            "what is there"
        )
    return shard


@torch.no_grad()
def _encoded(
    tokenizer: TokenizerModule,
    source: Source,
    experiment: Experiment,
    bf16: bool,
    unit: codes.ShardPlan,
    views: int,
    bar: ProgressBar,
) -> Iterator[EncodedRows]:
    """The codes of what a file holds, a batch at a time; the next batch's images are loaded,
    cropped and mirrored meanwhile."""
    part = source.parts[unit.part]
    batches = part.batches(unit, source.starts[unit.part], experiment.encode.batch_size)
    loaded = ((batch, image_views(batch, views, experiment)) for batch in batches)
    for batch, seen in prefetch(loaded):
        found = []
        for images in seen:
            pixels = to_model_range(torch.from_numpy(images)).to(tokenizer.device)
            with torch.autocast(tokenizer.device.type, torch.bfloat16, enabled=bf16):
                found.append(tokenizer.encode(pixels).flatten(1).cpu().numpy())
        bar.update(len(batch.numbers))
        names = batch.names
        if len(source.parts) > 1:
            names = [f"{part.name}: {name}" for name in names]
        yield EncodedRows(np.concatenate(found, axis=1), batch.captions, batch.numbers, names)
