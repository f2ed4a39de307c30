"""Chains the two stages: data, training, encoding, text-to-image, evaluation, command line.

Names are imported when first used, so that `import pipeline` costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.codebook import codebook_page
    from pipeline.comparison import compare_tokenizers, load_comparison
    from pipeline.config import Experiment, load_experiment
    from pipeline.data.sources import load_source
    from pipeline.doctor.diagnosis import diagnose
    from pipeline.encoding import encode_dataset, encode_elsewhere
    from pipeline.evaluation.forgetting import forgetting
    from pipeline.evaluation.report import evaluate
    from pipeline.generation import edit, generate, reconstruct
    from pipeline.judge import ClipJudge
    from pipeline.stages import assemble_bundle, run, train_prior, train_tokenizer
    from pipeline.text_to_image import TextToImageOutput, TextToImagePipeline

_HOME = {
    "ClipJudge": "pipeline.judge",
    "Experiment": "pipeline.config",
    "TextToImageOutput": "pipeline.text_to_image",
    "TextToImagePipeline": "pipeline.text_to_image",
    "assemble_bundle": "pipeline.stages",
    "codebook_page": "pipeline.codebook",
    "compare_tokenizers": "pipeline.comparison",
    "diagnose": "pipeline.doctor.diagnosis",
    "edit": "pipeline.generation",
    "encode_dataset": "pipeline.encoding",
    "encode_elsewhere": "pipeline.encoding",
    "evaluate": "pipeline.evaluation.report",
    "forgetting": "pipeline.evaluation.forgetting",
    "generate": "pipeline.generation",
    "load_comparison": "pipeline.comparison",
    "load_experiment": "pipeline.config",
    "load_source": "pipeline.data.sources",
    "reconstruct": "pipeline.generation",
    "run": "pipeline.stages",
    "train_prior": "pipeline.stages",
    "train_tokenizer": "pipeline.stages",
}

__all__ = [
    "ClipJudge",
    "Experiment",
    "TextToImageOutput",
    "TextToImagePipeline",
    "assemble_bundle",
    "codebook_page",
    "compare_tokenizers",
    "diagnose",
    "edit",
    "encode_dataset",
    "encode_elsewhere",
    "evaluate",
    "forgetting",
    "generate",
    "load_comparison",
    "load_experiment",
    "load_source",
    "reconstruct",
    "run",
    "train_prior",
    "train_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
