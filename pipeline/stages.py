"""The stages of a run: `train_tokenizer`, `train_prior`, `assemble_bundle`, and `run`: all of them, with `encode_dataset` between.

Knows the run folder and what each stage needs of the one before. Each can be called again and goes on from what is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from pipeline.checkpoints import newest_checkpoint, write_file, write_folder, written_beside
from pipeline.config import Experiment, to_dict
from pipeline.data.batches import Order
from pipeline.data.codes import CodesDataset, check_tokenizer, read_manifest
from pipeline.data.config import data_settings
from pipeline.data.mixing import parts_of
from pipeline.data.sources import Source
from pipeline.data.stream import StreamSource
from pipeline.data.stream_feed import feed_of
from pipeline.encoding import encode_dataset, sources_of
from pipeline.finetuning import Adapter, PriorOrigin, new_tokenizer, take_tokenizer, tokenizer_identity
from pipeline.fitting import is_open, settled
from pipeline.grids import bars, grid_image, picture_grid
from pipeline.lock import alone_in_run
from pipeline.origins import check_origins
from pipeline.runtime import compiles, make_accelerator, uses_bf16
from pipeline.settings import as_chosen, as_made, finish, finished, keep_settings, loaded, needed, start, started_from
from pipeline.text_to_image import TextToImagePipeline
from pipeline.training import Task, fit
from stage1_tokenizer import ImageTokenizer, TokenizerObjective, to_model_range
from stage2_prior import ImagePrior, Level, PriorObjective, StreamConfig, TextTokenizer
from stage2_prior.text import CAPTIONS_TO_LEARN, CaptionLengths

EVALUATION_BATCH = 64
_ROWS_AT_A_TIME = 1000


@alone_in_run
def train_tokenizer(experiment: Experiment) -> Path:
    """Stage 1; returns the folder of the trained tokenizer, `RUN/tokenizer`."""
    folder = experiment.folder / "tokenizer"
    check_origins(experiment)
    if experiment.tokenizer.frozen:
        take_tokenizer(experiment, folder)
        return folder
    train = as_chosen(experiment.tokenizer.train, folder)
    source, held_out = sources_of(experiment)
    settings = {
        "seed": experiment.seed,
        "precision": experiment.precision,
        "data": data_settings(to_dict(experiment.data)),
        "pictures": [source.fingerprint, held_out.fingerprint],
        **to_dict(replace(experiment.tokenizer, train=train)),
        "init_from": tokenizer_identity(experiment.tokenizer),
    }
    if finished(folder, settings):
        return folder
    accelerator = start(experiment, folder, settings)
    _report(accelerator, source)
    if is_open(train):  # by a tokenizer that is thrown away again
        few = replace(experiment.tokenizer, train=replace(train, batch_size=accelerator.num_processes, accumulate=1))
        few_at_a_time = replace(experiment, tokenizer=few)
        train = settled(
            train, tokenizer_task(few_at_a_time, accelerator, source, held_out)[0], experiment.precision, accelerator,
            rows=_most_rows(source), label="tokenizer",
        )  # fmt: skip
        keep_settings(accelerator, folder, settings := settings | {"train": to_dict(train)})
    experiment = replace(experiment, tokenizer=replace(experiment.tokenizer, train=train))
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
    tokenizer = new_tokenizer(experiment.tokenizer)
    place = (accelerator.process_index, accelerator.num_processes)
    feed = feed_of(source, experiment.tokenizer.train.numbers()[0], experiment.seed, *place, folder=experiment.folder / "data")

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
    begins = [experiment.tokenizer.objective.adversary.start] if objective.discriminator else []
    return Task(objective, batch, held_out_batches, "nll", pictures, objective.alarm, feed.names, begins), tokenizer


@alone_in_run
def train_prior(experiment: Experiment) -> Path:
    """Stage 2 on the codes dataset; returns `RUN/prior` (the text tokenizer lies in `RUN/text_tokenizer`)."""
    folder = experiment.folder / "prior"
    train = as_chosen(experiment.prior.train, folder)
    tokenizer = loaded(ImageTokenizer.load, experiment.folder / "tokenizer", "train-tokenizer")
    codes = {split: CodesDataset(experiment.folder / "codes", split) for split in ("train", "held_out")}
    check_tokenizer(codes["train"].manifest, tokenizer.fingerprint, experiment.folder / "codes")
    check_origins(experiment)
    origin = PriorOrigin(experiment.prior.init_from, tokenizer.fingerprint) if experiment.prior.init_from else None
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
        **to_dict(replace(experiment.prior, train=train)),
        "init_from": origin and origin.identity,
    }
    if finished(folder, settings):
        return folder
    accelerator = start(experiment, folder, settings)
    text = text_tokenizer(experiment, codes, accelerator, origin)
    vectors = tokenizer.code_vectors
    stream = StreamConfig(
        text_vocab_size=text.vocab_size,
        text_length=text.length,
        levels=tuple(Level(grid=level.grid, num_codes=level.num_codes) for level in tokenizer.layout),
        code_dim=vectors.shape[1],
        any_order=train.order != "raster" or (origin is not None and origin.prior.stream.config.any_order),
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
    if origin is not None:
        origin.fill(prior)
    adapter = Adapter(prior, experiment.prior, origin.identity) if origin and experiment.prior.lora_rank else None
    shuffled = (experiment.seed, codes["train"].weights)
    order = Order(codes["train"].lengths, accelerator.num_processes if is_open(train) else train.numbers()[0], *shuffled)
    several = codes["train"].captions_in_all > len(codes["train"])
    truncate, dropout = experiment.text.truncate, experiment.text.bpe_dropout

    def batch(step: int) -> dict[str, torch.Tensor]:
        rows = order.share(step, accelerator.process_index, accelerator.num_processes)
        random = np.random.default_rng([experiment.seed, step, accelerator.process_index])
        views = random.integers(0, codes["train"].views, size=len(rows))
        # Drawn only where there is a choice: what follows is drawn by the same numbers.
        draws = random.random(len(rows)).tolist() if several else None
        captions = codes["train"].captions(rows.tolist(), draws)
        return {
            "text_ids": text.encode_with_dropout(captions, dropout, random, truncate=truncate)
            if dropout
            else text.encode(captions, truncate=truncate),
            "codes": torch.from_numpy(codes["train"].codes(rows.tolist(), views.tolist())),
        }

    def names(step: int) -> list[str]:
        return [f"row {row}" for row in order.share(step, accelerator.process_index, accelerator.num_processes)]

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
    task = Task(objective, batch, held_out_batches, "nats_per_code", pictures, rows=names)
    if is_open(train):
        train = settled(train, task, experiment.precision, accelerator, rows=len(codes["train"]), label="prior")
        keep_settings(accelerator, folder, settings := settings | {"train": to_dict(train)})
        order = Order(codes["train"].lengths, train.numbers()[0], *shuffled)
    figures = fit(
        task, train, accelerator, folder,
        seed=experiment.seed, bf16=uses_bf16(experiment.precision, accelerator.device),
        compile_networks=compiles(train, accelerator.device), label="prior",
    )  # fmt: skip
    if adapter is not None:
        adapter.end(folder, accelerator)
    finish(accelerator, prior, folder, settings, figures)
    return folder


def text_tokenizer(
    experiment: Experiment, codes: dict[str, CodesDataset], accelerator: Accelerator, origin: PriorOrigin | None = None
) -> TextTokenizer:
    """Trains the text tokenizer, takes it over with the prior to start from, or loads that of the checkpoint that the prior goes on from;
    keeps it once every caption fits."""
    folder, config = experiment.folder / "text_tokenizer", experiment.text
    # Training it is quick and has one outcome: every process does, so that all see the same error if there is one.
    goes_on = newest_checkpoint(experiment.folder / "prior" / "checkpoints") is not None
    learned = chain.from_iterable(_caption_batches(codes["train"], CAPTIONS_TO_LEARN))
    if origin is not None:  # also where it goes on: the new entries and what spells them follow from the captions
        text = origin.vocabulary(learned, config)
        accelerator.print(origin.pieces(text, next(_caption_batches(codes["train"], _ROWS_AT_A_TIME))))
    else:
        text = TextTokenizer.load(folder) if goes_on else TextTokenizer.of(config, learned)
    lengths = CaptionLengths(text.length)
    for captions in chain.from_iterable(_caption_batches(dataset) for dataset in codes.values()):
        lengths.add(captions, text.lengths(captions))
    lengths.check(truncate=config.truncate)
    if lengths.too_long:
        accelerator.print(f"{lengths.too_long} of {lengths.count} captions are cut to text.length={text.length} slots")
    if accelerator.is_main_process and not goes_on:
        write_folder(folder, text.save)
    accelerator.wait_for_everyone()
    return TextTokenizer.load(folder)


def _caption_batches(codes: CodesDataset, captions: int | None = None) -> Iterator[list[str]]:
    """All captions, some thousand at a time; or those of evenly spread rows that together have about `captions`."""
    rows = len(codes) if captions is None else min(len(codes), max(len(codes) * captions // codes.captions_in_all, 1))
    for first in range(0, rows, _ROWS_AT_A_TIME):
        spread = [row * len(codes) // rows for row in range(first, min(first + _ROWS_AT_A_TIME, rows))]
        yield list(chain.from_iterable(codes.all_captions(spread)))


def assemble_bundle(experiment: Experiment) -> Path:
    """Puts both stages and the sampling defaults into one folder that needs nothing else; returns `RUN/bundle`."""
    folder = experiment.folder
    manifest = read_manifest(folder / "codes")
    pipe = TextToImagePipeline(
        loaded(ImageTokenizer.load, folder / "tokenizer", "train-tokenizer"),
        loaded(ImagePrior.load, folder / "prior", "train-prior"),
        TextTokenizer.load(needed(folder / "text_tokenizer", "train-prior")),
        experiment.sampling,
        trained_on={
            "experiment": experiment.name,
            "data": to_dict(experiment.data),
            "sources": manifest["sources"],
            "started_from": {stage: started_from(folder / stage) for stage in ("tokenizer", "prior")},
            "codes_in_bf16": manifest.get("bf16", uses_bf16(experiment.precision, torch.device("cpu"))),
        },
    )
    pipe.save_pretrained(folder / "bundle")
    return folder / "bundle"


@alone_in_run
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
        write_file(experiment.folder / "samples" / "held-out-prompts.txt", "\n".join(prompts) + "\n")
    accelerator.wait_for_everyone()
    return experiment.folder / "bundle"


def _most_rows(source: Source) -> int:
    """Pictures that a batch may have: as many as there are, where that is known."""
    return sum(2**31 if isinstance(part, StreamSource) else len(part) for part in parts_of(source))


def _report(accelerator: Accelerator, source: Source) -> None:
    streamed = any(isinstance(part, StreamSource) for part in parts_of(source))
    accelerator.print(f"{source.name}: " + ("read as it comes" if streamed else f"{len(source):,} pictures to train on"))
    for problem in source.problems:
        accelerator.print(f"  {problem}")


def _save_sample(experiment: Experiment, name: str, grid: np.ndarray) -> None:
    folder = experiment.folder / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    with written_beside(folder / f"{name}.png") as beside:
        grid_image(grid).save(beside, "PNG")
