"""The stages of a run: `train_tokenizer`, `encode_dataset`, `train_prior`, `assemble_bundle`, and `run`, all of them.

Knows the run folder and what each stage needs of the one before. Each can be called again and goes on from what is there.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from pipeline.checkpoints import newest_checkpoint, refuse_taken, write_folder
from pipeline.config import Experiment, to_dict
from pipeline.data.batches import Order, loaded_ahead
from pipeline.data.codes import MANIFEST, CodesDataset, check_form, check_tokenizer, complete, read_manifest, write_part
from pipeline.data.config import data_settings
from pipeline.data.export import Format, export_codes
from pipeline.data.mixing import parts_of
from pipeline.data.share import Share
from pipeline.data.sources import Source, Split, check_splits, load_sources
from pipeline.data.stream import StreamSource
from pipeline.data.stream_feed import feed_of
from pipeline.grids import bars, grid_image, picture_grid
from pipeline.runtime import compiles, make_accelerator, processes, uses_bf16
from pipeline.settings import as_made, finish, finished, needed, start
from pipeline.text_to_image import TextToImagePipeline
from pipeline.training import Task, fit
from stage1_tokenizer import ImageTokenizer, TokenizerObjective, to_model_range
from stage2_prior import ImagePrior, Level, PriorObjective, StreamConfig, TextTokenizer
from stage2_prior.text import CAPTIONS_TO_LEARN, CaptionLengths

EVALUATION_BATCH = 64
_ALL = 10**9
"""More pictures than any source holds out."""
_SPLITS: tuple[Split, Split] = ("train", "held_out")


def train_tokenizer(experiment: Experiment) -> Path:
    """Stage 1; returns the folder of the trained tokenizer, `RUN/tokenizer`."""
    folder = experiment.folder / "tokenizer"
    train = experiment.tokenizer.train
    source, held_out = sources_of(experiment)
    settings = {
        "seed": experiment.seed,
        "precision": experiment.precision,
        "data": data_settings(to_dict(experiment.data)),
        "pictures": [source.fingerprint, held_out.fingerprint],
        **to_dict(experiment.tokenizer),
    }
    if finished(folder, settings):
        return folder
    accelerator = start(experiment, folder, settings)
    _report(accelerator, source)
    task, tokenizer = tokenizer_task(experiment, accelerator, source, held_out)
    figures = fit(
        task, train, accelerator, folder, seed=experiment.seed, bf16=uses_bf16(experiment.precision, accelerator.device),
        compile_networks=compiles(train, accelerator.device), label="tokenizer",
    )  # fmt: skip
    finish(accelerator, tokenizer, folder, settings, figures)
    return folder


def tokenizer_task(experiment: Experiment, accelerator: Accelerator, source: Source, held_out: Source) -> tuple[Task, ImageTokenizer]:
    """What stage 1 hands to `fit`, and the new tokenizer in it."""
    torch.manual_seed(experiment.seed)
    tokenizer = ImageTokenizer(experiment.tokenizer.model)
    place = (accelerator.process_index, accelerator.num_processes)
    feed = feed_of(source, experiment.tokenizer.train.batch_size, experiment.seed, *place, folder=experiment.folder / "data")

    def batch(step: int) -> torch.Tensor:
        return torch.from_numpy(feed.pictures(step))

    def held_out_batches() -> Iterator[torch.Tensor]:
        count = min(len(held_out), experiment.encode.held_out)
        for first in range(0, count, EVALUATION_BATCH):
            rows = range(first, min(first + EVALUATION_BATCH, count))
            yield torch.from_numpy(held_out.images(rows)).to(accelerator.device)

    @torch.no_grad()
    def pictures() -> dict[str, np.ndarray]:
        true = held_out.images(range(min(len(held_out), 8)))
        pixels = to_model_range(torch.from_numpy(true)).to(accelerator.device)
        drawn = tokenizer.to_images(tokenizer.encode(pixels))
        grid = picture_grid([*true, *(np.asarray(p) for p in drawn)], columns=len(true))
        _save_sample(experiment, "reconstructions", grid)
        # The most used code on the left: flat is good, and what falls off early is wasted.
        uses = {f"code_use_{i}": bars(use.sort(descending=True).values.cpu().numpy()) for i, use in enumerate(tokenizer.quantizer.uses())}
        return {"reconstructions": grid} | uses

    objective = TokenizerObjective(tokenizer, experiment.tokenizer.objective)
    return Task(objective, batch, held_out_batches, "nll", pictures, objective.alarm), tokenizer


def encode_dataset(experiment: Experiment, *, tokenizer_folder: Path | None = None, folder: Path | None = None) -> Path:
    """Writes the codes of training and held-out pictures, split over the processes; returns their folder.

    Args:
        tokenizer_folder: a tokenizer other than the run's own, RUN/tokenizer.
        folder: where to write to in place of RUN/codes.
    """
    folder = folder or experiment.folder / "codes"
    tokenizer = ImageTokenizer.load(tokenizer_folder or needed(experiment.folder / "tokenizer", "train-tokenizer"))
    if experiment.data.image_size % tokenizer.own_config.stride:
        raise ValueError(
            f"data.image_size is {experiment.data.image_size} and the tokenizer's code grid needs a multiple of "
            f"{tokenizer.own_config.stride}; set data.image_size={tokenizer.image_size}"
        )
    settings = {"data": data_settings(to_dict(experiment.data)), "encode": to_dict(experiment.encode), "precision": experiment.precision}
    by_split = dict(zip(_SPLITS, sources_of(experiment), strict=True))
    sources = {split: source.fingerprint for split, source in by_split.items()}
    if (folder / "codes.json").is_file():
        manifest = read_manifest(folder)
        check_tokenizer(manifest, tokenizer.fingerprint, folder)
        check_form(manifest, folder)
        if as_made(manifest["settings"]) == settings and manifest["sources"] == sources:
            return folder
        raise ValueError(f"{folder} holds codes made with other data or encode settings; remove it and run encode again")
    accelerator = make_accelerator(experiment, trackers=False)
    tokenizer.to(accelerator.device).eval()
    side = experiment.data.image_size // tokenizer.own_config.factor
    grid = (side, side)
    options, bf16 = experiment.encode, uses_bf16(experiment.precision, accelerator.device)
    files, counts = {}, {}
    for split, limit in zip(_SPLITS, (options.pictures, options.held_out), strict=True):
        source = by_split[split]
        count = min(len(source), limit or len(source))
        share = np.array_split(np.arange(count), accelerator.num_processes)[accelerator.process_index]
        views = options.views if split == "train" else 1
        rows = _encoded(tokenizer, source, share, views, experiment, bf16)
        bar = tqdm(rows, f"encode {split}", len(share), disable=not accelerator.is_main_process, mininterval=1.0)
        name = write_part(folder, split, accelerator.process_index, accelerator.num_processes, bar)
        files[split], counts[split] = sorted(gather_object([name])), count
    if accelerator.is_main_process:
        complete(
            folder,
            {
                "format": 1,
                "tokenizer": tokenizer.fingerprint,
                "levels": [{"grid": list(level.grid), "num_codes": level.num_codes} for level in tokenizer.quantizer.layout(grid)],
                "sources": sources,
                "views": options.views,
                "bf16": bf16,
                "rows": counts,
                "files": files,
                "settings": settings,
            },
        )
    accelerator.wait_for_everyone()
    return folder


def encode_elsewhere(
    experiment: Experiment, out: Path, form: Format, *, tokenizer_folder: Path | None = None
) -> tuple[dict[str, int], list[str]]:
    """Codes for other programs: those of the experiment's data, by its own or another tokenizer, in folder `out`; returns the number of
    pictures of each split and the files' names.

    Raises:
        FileExistsError: there is something else in `out` already.
    """
    refuse_taken(out, MANIFEST, "codes")
    made = out.parent / f".{out.name}.arrow"
    encode_dataset(experiment, tokenizer_folder=tokenizer_folder, folder=made)
    processes().wait_for_everyone()  # or the first could remove what the others have yet to find whole
    if not processes().is_main_process:
        return {}, []
    files = export_codes(made, out, form)
    shutil.rmtree(made)
    return read_manifest(out)["rows"], files


def every_picture_once(experiment: Experiment, but: Collection[str] = ()) -> Experiment:
    """The experiment with all of its data encoded once, whatever its prior is given: of the shapes, which are unlimited, as many as it
    says. The fields of `encode` named in `but` stay as they are."""
    unlimited = experiment.data.source == "shapes"
    whole: dict[str, Any] = {"views": 1, "shift": 0, "flip": False} | ({} if unlimited else {"pictures": None, "held_out": _ALL})
    return replace(experiment, encode=replace(experiment.encode, **{name: v for name, v in whole.items() if name not in but}))


@torch.no_grad()
def _encoded(
    tokenizer: ImageTokenizer, source: Source, rows: np.ndarray, views: int, experiment: Experiment, bf16: bool
) -> Iterator[dict[str, Any]]:
    options = experiment.encode
    parts = [rows[first : first + options.batch_size].tolist() for first in range(0, len(rows), options.batch_size)]
    for part, images in loaded_ahead(source.images, parts):
        codes = []
        for view in range(views):
            seen = images if view == 0 else shifted(images, part, view, options.shift, experiment.seed, options.flip)
            pixels = to_model_range(torch.from_numpy(seen)).to(tokenizer.device)
            with torch.autocast(tokenizer.device.type, torch.bfloat16, enabled=bf16):
                codes.append(tokenizer.encode(pixels).flatten(1).cpu().numpy())
        stacked = np.concatenate(codes, axis=1).astype(np.int32)
        for row, text, line in zip(part, source.captions(part), stacked, strict=True):
            yield {"codes": line, "text": text, "row": row}


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


def train_prior(experiment: Experiment) -> Path:
    """Stage 2 on the codes dataset; returns `RUN/prior` (the text tokenizer lies in `RUN/text_tokenizer`)."""
    folder, train = experiment.folder / "prior", experiment.prior.train
    tokenizer = ImageTokenizer.load(needed(experiment.folder / "tokenizer", "train-tokenizer"))
    codes = {split: CodesDataset(experiment.folder / "codes", split) for split in ("train", "held_out")}
    check_tokenizer(codes["train"].manifest, tokenizer.fingerprint, experiment.folder / "codes")
    settings = {
        "seed": experiment.seed,
        "precision": experiment.precision,
        "codes": {
            "tokenizer": codes["train"].manifest["tokenizer"],
            "sources": codes["train"].manifest["sources"],
            "settings": as_made(codes["train"].manifest["settings"]),
        },
        "text": to_dict(experiment.text),
        "sequence": to_dict(experiment.sequence),
        **to_dict(experiment.prior),
    }
    if finished(folder, settings):
        return folder
    accelerator = start(experiment, folder, settings)
    text = _text_tokenizer(experiment, codes, accelerator)
    vectors = tokenizer.code_vectors
    stream = StreamConfig(
        text_vocab_size=text.vocab_size,
        text_length=text.length,
        levels=tuple(Level(grid=level.grid, num_codes=level.num_codes) for level in tokenizer.layout),
        code_dim=vectors.shape[1],
        any_order=train.order != "raster",
        pad_id=text.pad_id,
        start_id=text.start_id,
        end_id=text.end_id,
    )
    codes_a_picture = sum(level.length for level in stream.levels)
    if experiment.sampling.steps is not None and experiment.sampling.steps > codes_a_picture:
        raise ValueError(f"sampling.steps is {experiment.sampling.steps}; a picture has {codes_a_picture} codes, so it can be at most that")
    torch.manual_seed(experiment.seed + 1)
    prior = ImagePrior(experiment.prior.model, stream)
    prior.tell_code_vectors(vectors)
    order = Order(len(codes["train"]), train.batch_size, experiment.seed)
    truncate, dropout = experiment.text.truncate, experiment.text.bpe_dropout

    def batch(step: int) -> dict[str, torch.Tensor]:
        rows = order.share(step, accelerator.process_index, accelerator.num_processes)
        random = np.random.default_rng([experiment.seed, step, accelerator.process_index])
        views = random.integers(0, codes["train"].views, size=len(rows))
        captions = codes["train"].captions(rows.tolist())
        return {
            "text_ids": text.encode_with_dropout(captions, dropout, random, truncate=truncate)
            if dropout
            else text.encode(captions, truncate=truncate),
            "codes": torch.from_numpy(codes["train"].codes(rows.tolist(), views.tolist())),
        }

    def held_out_batches() -> Iterator[dict[str, torch.Tensor]]:
        for first in range(0, len(codes["held_out"]), EVALUATION_BATCH):
            rows = list(range(first, min(first + EVALUATION_BATCH, len(codes["held_out"]))))
            ids = text.encode(codes["held_out"].captions(rows), truncate=True).to(accelerator.device)
            yield {"text_ids": ids, "codes": torch.from_numpy(codes["held_out"].codes(rows)).to(accelerator.device)}

    prompts = codes["held_out"].captions(list(range(min(8, len(codes["held_out"])))))

    def pictures() -> dict[str, np.ndarray]:
        prior.eval()
        pipe = TextToImagePipeline(tokenizer.to(accelerator.device), prior, text, experiment.sampling)
        with torch.autocast(accelerator.device.type, enabled=False):
            images = pipe(prompts, num_images_per_prompt=2, truncate=True).images
        prior.train()
        grid = picture_grid([np.asarray(image) for image in images], columns=4)
        _save_sample(experiment, "prior", grid)
        return {"samples": grid}

    prior.checkpoint_activations = train.checkpoint_activations
    objective = PriorObjective(prior, experiment.prior.objective, train.orders, experiment.sequence.image_first)
    figures = fit(
        Task(objective, batch, held_out_batches, "nats_per_code", pictures), train, accelerator, folder,
        seed=experiment.seed, bf16=uses_bf16(experiment.precision, accelerator.device),
        compile_networks=compiles(train, accelerator.device), label="prior",
    )  # fmt: skip
    finish(accelerator, prior, folder, settings, figures)
    return folder


def _text_tokenizer(experiment: Experiment, codes: dict[str, CodesDataset], accelerator: Accelerator) -> TextTokenizer:
    """Trains the text tokenizer, or loads the one of the checkpoint that the prior goes on from; keeps it once every caption fits."""
    folder, config = experiment.folder / "text_tokenizer", experiment.text
    learned = codes["train"].captions(range(len(codes["train"])))
    captions = learned + codes["held_out"].captions(range(len(codes["held_out"])))
    # Training it is quick and has one outcome: every process does, so that all see the same error if there is one.
    goes_on = newest_checkpoint(experiment.folder / "prior" / "checkpoints") is not None
    text = TextTokenizer.load(folder) if goes_on else TextTokenizer.of(config, learned[:CAPTIONS_TO_LEARN])
    lengths = CaptionLengths(text.length)
    lengths.add(captions, text.lengths(captions))
    lengths.check(truncate=config.truncate)
    if lengths.too_long:
        accelerator.print(f"{lengths.too_long} of {lengths.count} captions are cut to text.length={text.length} slots")
    if accelerator.is_main_process and not goes_on:
        write_folder(folder, text.save)
    accelerator.wait_for_everyone()
    return TextTokenizer.load(folder)


def assemble_bundle(experiment: Experiment) -> Path:
    """Puts both stages and the sampling defaults into one folder that needs nothing else; returns `RUN/bundle`."""
    folder = experiment.folder
    manifest = read_manifest(folder / "codes")
    pipe = TextToImagePipeline(
        ImageTokenizer.load(needed(folder / "tokenizer", "train-tokenizer")),
        ImagePrior.load(needed(folder / "prior", "train-prior")),
        TextTokenizer.load(needed(folder / "text_tokenizer", "train-prior")),
        experiment.sampling,
        trained_on={
            "experiment": experiment.name,
            "data": to_dict(experiment.data),
            "sources": manifest["sources"],
            "codes_in_bf16": manifest.get("bf16", uses_bf16(experiment.precision, torch.device("cpu"))),
        },
    )
    pipe.save_pretrained(folder / "bundle")
    return folder / "bundle"


def run(experiment: Experiment) -> Path:
    """All stages, then a grid of pictures for held-out captions; returns the bundle's folder."""
    train_tokenizer(experiment)
    encode_dataset(experiment)
    train_prior(experiment)
    accelerator = make_accelerator(experiment, trackers=False)
    if accelerator.is_main_process:
        bundle = assemble_bundle(experiment)
        codes = CodesDataset(experiment.folder / "codes", "held_out")
        prompts = codes.captions(list(range(min(16, len(codes)))))
        pipe = TextToImagePipeline.from_pretrained(bundle).to(accelerator.device)
        images = [np.asarray(image) for image in pipe(prompts, num_images_per_prompt=4, truncate=True).images]
        _save_sample(experiment, "held-out-prompts", picture_grid(images, columns=8))
        (experiment.folder / "samples" / "held-out-prompts.txt").write_text("\n".join(prompts) + "\n")
    accelerator.wait_for_everyone()
    return experiment.folder / "bundle"


def _report(accelerator: Accelerator, source: Source) -> None:
    many = any(isinstance(part, StreamSource) for part in parts_of(source))
    accelerator.print(f"{source.name}: " + ("read as it comes" if many else f"{len(source):,} pictures to train on"))
    for problem in source.problems:
        accelerator.print(f"  {problem}")


def sources_of(experiment: Experiment) -> tuple[Any, Source]:
    """Training and held-out pictures, before anything else is written; every process must call."""
    state = processes()
    share = Share(state.process_index, state.num_processes, lambda own: gather_object([own]) if state.num_processes > 1 else [own])
    source, held_out = load_sources(experiment.data, experiment.folder / "data", share)
    for part, back in zip(parts_of(source), parts_of(held_out), strict=True):
        seen = 1 if isinstance(part, StreamSource) else len(part)
        check_splits(experiment.data, part.name, seen, len(back), len(held_out))
    return source, held_out


def _save_sample(experiment: Experiment, name: str, grid: np.ndarray) -> None:
    folder = experiment.folder / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    grid_image(grid).save(folder / f"{name}.png")
