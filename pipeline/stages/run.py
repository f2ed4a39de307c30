"""The stages of a run: `train_tokenizer`, `train_prior`, `assemble_bundle`, and `run`: all of them,
with `encode_dataset` between.

Knows the run folder and what each stage needs of the one before. Each can be called again and
resumes from what is there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config.experiment import Experiment, to_dict
from pipeline.data.builtin.icons import licences, styles_and_names
from pipeline.data.codes.dataset import MANIFEST, CodesDataset, read_manifest
from pipeline.data.load import load_source
from pipeline.data.source import Source
from pipeline.inference.bundle import add_metrics
from pipeline.inference.known_prompts import KnownPrompts
from pipeline.inference.latent_pipeline import LatentPipeline
from pipeline.inference.pipeline import TextToImagePipeline
from pipeline.runtime.atomic_io import atomic_write_text
from pipeline.runtime.distributed import make_accelerator
from pipeline.runtime.image_grid import make_grid
from pipeline.stages.encode import encode_dataset
from pipeline.stages.finetune import parent_bundle
from pipeline.stages.manifest import init_from_fingerprint, load_complete, read_settings
from pipeline.stages.preflight import check_run
from pipeline.stages.prior import train_prior
from pipeline.stages.run_lock import with_run_lock
from pipeline.stages.style import teaches_style, with_new_style
from pipeline.stages.time_estimate import StageSeconds, estimate_seconds
from pipeline.stages.tokenizer import save_sample, train_tokenizer
from stage1_tokenizer import TokenizerModule
from stage1_tokenizer.pixels import image_array
from stage2_prior import LatentPriorModule, PriorModule, SamplingOptions, TextTokenizer


def assemble_bundle(experiment: Experiment) -> Path:
    """Writes both stages and the sampling defaults into one self-contained folder; returns
    `RUN/bundle`."""
    folder = experiment.folder
    has_codes = experiment.tokenizer.model.has_codes
    tokenizer = load_complete(
        TokenizerModule.from_pretrained, folder / "tokenizer", "train-tokenizer"
    )
    kind = PriorModule if has_codes else LatentPriorModule
    prior: Any = load_complete(kind.from_pretrained, folder / "prior", "train-prior")
    text = load_complete(TextTokenizer.load, folder / "text_tokenizer", "train-prior")
    trained_on: dict[str, Any] = {
        "experiment": experiment.name,
        "data": to_dict(experiment.data),
        "configuration": {
            name: value
            for name, value in to_dict(experiment).items()
            if name not in ("output_dir", "trackers")
        },
        "started_from": {
            stage: init_from_fingerprint(folder / stage) for stage in ("tokenizer", "prior")
        },
    }
    known_prompts, found_licences = prompts_and_licences(experiment)
    if found_licences:
        trained_on["licences"] = found_licences
    pipe: TextToImagePipeline | LatentPipeline
    if has_codes:
        manifest = read_manifest(folder / "codes")
        trained_on |= {
            "sources": manifest["sources"],
            "num_images": manifest["num_images"],
            "codes_in_bf16": manifest["bf16"],
        }
        pipe = TextToImagePipeline(
            tokenizer, prior, text, experiment.sampling, trained_on, known_prompts
        )
    else:
        trained_on["sources"] = (read_settings(folder / "prior") or {})["settings"]["sources"]
        sampling = SamplingOptions(temperature=experiment.sampling.temperature)
        pipe = LatentPipeline(tokenizer, prior, text, sampling, trained_on, known_prompts)
    pipe.save_pretrained(folder / "bundle", dtype=experiment.bundle_dtype)
    add_metrics(folder / "bundle", folder / "evaluation.json")
    return folder / "bundle"


def prompts_and_licences(
    experiment: Experiment,
) -> tuple[KnownPrompts | None, list[dict[str, str | None]]]:
    """What prompts may ask of icons, and the licences of their sets; None and none for other data.
    A bundle that learned a style keeps those of its parent."""
    if experiment.data.source == "icons":
        styles, names = styles_and_names(experiment.data)
        return KnownPrompts(tuple(styles), tuple(names)), licences(experiment.data)
    if "icons" in experiment.data.sources:  # the other parts have other names
        return None, licences(experiment.data)
    if teaches_style(experiment.data) and (parent := parent_bundle(experiment)):
        return with_new_style(parent, experiment.data)
    return None, []


@with_run_lock
def run(experiment: Experiment) -> Path:
    """All stages, then a grid of images for validation captions; returns the bundle's folder. What
    would stop a later stage is raised before the first step. Gaussian latents are not encoded
    beforehand, and an unconditional prior of them takes no captions.

    Raises:
        ValueError: what each stage raises.
    """
    check_run(experiment)
    if experiment.tokenizer.model.has_codes:
        encoded = (experiment.folder / "codes" / MANIFEST).is_file()
        seconds = StageSeconds() if encoded else estimate_seconds(experiment)
        train_tokenizer(experiment, seconds_after=seconds.encode + seconds.prior)
        encode_dataset(experiment, seconds_after=seconds.prior)
    else:
        train_tokenizer(experiment)
    train_prior(experiment)
    accelerator = make_accelerator(experiment.folder, [], experiment.process_timeout)
    if accelerator.is_main_process:
        bundle = assemble_bundle(experiment)
        prompts = _held_out_prompts(experiment)
        pipe = TextToImagePipeline.from_pretrained(bundle).to(accelerator.device)
        count = 64 if prompts == [""] else 4
        images = [
            image_array(image)
            for image in pipe(prompts, num_images_per_prompt=count, truncate=True).images
        ]
        save_sample(experiment.folder, "held-out-prompts", make_grid(images, columns=8))
        atomic_write_text(
            experiment.folder / "samples" / "held-out-prompts.txt", "\n".join(prompts) + "\n"
        )
    accelerator.wait_for_everyone()
    return experiment.folder / "bundle"


def _held_out_prompts(experiment: Experiment) -> list[str]:
    """The first validation captions; one empty prompt where the prior is unconditional."""
    dataset: CodesDataset | Source
    if experiment.tokenizer.model.has_codes:
        dataset = CodesDataset(experiment.folder / "codes", "held_out")
    elif experiment.prior.latent.context_features:
        dataset = load_source(experiment.data, "held_out", experiment.folder / "data")
    else:
        return [""]
    return dataset.captions(list(range(min(16, len(dataset)))))
