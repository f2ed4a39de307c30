"""The images of a stage: training and validation images, which every process finds together. Knows
data and what a stage was begun with; trains nothing."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path

from accelerate.utils import gather_object

from pipeline.config.data import DataConfig
from pipeline.config.experiment import Experiment
from pipeline.config.inheritance import Stage
from pipeline.data.load import load_sources
from pipeline.data.source import Source, check_splits
from pipeline.data.worker_info import WorkerInfo
from pipeline.runtime.distributed import distributed_state
from pipeline.stages.manifest import read_settings


def sources_of(
    data: DataConfig,
    run_dir: Path,
    timeout: int,
    *,
    require_captions: bool = True,
    require_both: bool = True,
) -> tuple[Source, Source]:
    """Training and validation images, before anything else is written; every process must call.

    Args:
        run_dir: folder of the run; what is found out about the images is kept in its data/.
        timeout: minutes that processes wait for one another.
        require_captions: leave out images without a caption.
        require_both: raise ValueError where a split has no image.

    Raises:
        NoCaptions: no image has a caption, and they are required.
        ValueError, FileNotFoundError: as `load_sources`.
    """
    state = distributed_state(timeout)
    share = WorkerInfo(
        state.process_index,
        state.num_processes,
        lambda own: gather_object([own]) if state.num_processes > 1 else [own],
    )
    source, held_out = load_sources(
        data, run_dir / "data", share, require_captions=require_captions
    )
    if not require_both:
        return source, held_out
    for part, back in zip(source.parts, held_out.parts, strict=True):
        check_splits(data, part.name, part.num_images, len(back), len(held_out))
    return source, held_out


def every_image(experiment: Experiment, stage: Stage) -> tuple[Source, Source]:
    """All images, with and without captions; those with captions alone where the stage was begun
    with these. Raises as `sources_of`."""
    load = partial(sources_of, experiment.data, experiment.folder, experiment.process_timeout)
    sources = load(require_captions=False)
    written = (read_settings(experiment.folder / stage) or {}).get("settings", {})
    begun_with = written.get("images") or list(written.get("sources", {}).values())
    if begun_with and begun_with != [one.fingerprint for one in sources]:
        with suppress(ValueError):
            captioned = load()
            if begun_with == [one.fingerprint for one in captioned]:
                return captioned
    return sources
