"""The stages of a run: `train_tokenizer`, `train_prior`, `assemble_bundle`, and `run`: all of them,
with `encode_dataset` between.

Knows the run folder and what each stage needs of the one before. Each can be called again and
resumes from what is there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.config.experiment import Experiment, to_dict
from pipeline.data.codes.dataset import MANIFEST, CodesDataset, read_manifest
from pipeline.inference.pipeline import TextToImagePipeline
from pipeline.runtime.atomic_io import atomic_write_text
from pipeline.runtime.distributed import make_accelerator
from pipeline.runtime.image_grid import make_grid
from pipeline.stages.encode import encode_dataset
from pipeline.stages.manifest import init_from_fingerprint, load_complete, require_complete
from pipeline.stages.prior import train_prior
from pipeline.stages.run_lock import with_run_lock
from pipeline.stages.time_estimate import StageSeconds, estimate_seconds
from pipeline.stages.tokenizer import save_sample, train_tokenizer
from stage1_tokenizer import ImageTokenizer
from stage2_prior import ImagePrior, TextTokenizer


def assemble_bundle(experiment: Experiment) -> Path:
    """Writes both stages and the sampling defaults into one self-contained folder; returns
    `RUN/bundle`."""
    folder = experiment.folder
    manifest = read_manifest(folder / "codes")
    pipe = TextToImagePipeline(
        load_complete(ImageTokenizer.from_pretrained, folder / "tokenizer", "train-tokenizer"),
        load_complete(ImagePrior.from_pretrained, folder / "prior", "train-prior"),
        TextTokenizer.load(require_complete(folder / "text_tokenizer", "train-prior")),
        experiment.sampling,
        trained_on={
            "experiment": experiment.name,
            "data": to_dict(experiment.data),
            "sources": manifest["sources"],
            "started_from": {
                stage: init_from_fingerprint(folder / stage) for stage in ("tokenizer", "prior")
            },
            "codes_in_bf16": manifest["bf16"],
        },
    )
    pipe.save_pretrained(folder / "bundle")
    return folder / "bundle"


@with_run_lock
def run(experiment: Experiment) -> Path:
    """All stages, then a grid of images for validation captions; returns the bundle's folder.

    Raises:
        ValueError: the tokenizer has no codes; and what each stage raises.
    """
    experiment.require_codes("run")
    encoded = (experiment.folder / "codes" / MANIFEST).is_file()
    seconds = StageSeconds() if encoded else estimate_seconds(experiment)
    train_tokenizer(experiment, seconds_after=seconds.encode + seconds.prior)
    encode_dataset(experiment, seconds_after=seconds.prior)
    train_prior(experiment)
    accelerator = make_accelerator(experiment.folder, [], experiment.process_timeout)
    if accelerator.is_main_process:
        bundle = assemble_bundle(experiment)
        codes = CodesDataset(experiment.folder / "codes", "held_out")
        prompts = codes.captions(list(range(min(16, len(codes)))))
        pipe = TextToImagePipeline.from_pretrained(bundle).to(accelerator.device)
        images = [
            np.asarray(image)
            for image in pipe(prompts, num_images_per_prompt=4, truncate=True).images
        ]
        save_sample(experiment.folder, "held-out-prompts", make_grid(images, columns=8))
        atomic_write_text(
            experiment.folder / "samples" / "held-out-prompts.txt", "\n".join(prompts) + "\n"
        )
    accelerator.wait_for_everyone()
    return experiment.folder / "bundle"
