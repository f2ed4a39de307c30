"""Chains the two stages: data, training, encoding, text-to-image, evaluation, command line.

Names are imported when first used, so that `import pipeline` costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config.experiment import Experiment
    from pipeline.config.load import load_experiment
    from pipeline.data.load import load_source
    from pipeline.doctor.diagnose import diagnose
    from pipeline.evaluation.codebook_report import codebook_page
    from pipeline.evaluation.evaluate import evaluate
    from pipeline.evaluation.forgetting import forgetting
    from pipeline.evaluation.zoo import load_zoo, train_zoo
    from pipeline.inference.compress import compress, decompress
    from pipeline.inference.generate import edit, generate, reconstruct
    from pipeline.inference.likelihood_report import likelihood_report
    from pipeline.inference.output import TextToImageOutput
    from pipeline.inference.pipeline import TextToImagePipeline
    from pipeline.inference.reranking import CLIPScorer
    from pipeline.stages.compare_tokenizers import compare_tokenizers, load_comparison
    from pipeline.stages.encode import encode_dataset, encode_for_export
    from pipeline.stages.prior import train_prior
    from pipeline.stages.run import assemble_bundle, run
    from pipeline.stages.tokenizer import train_tokenizer

_HOME = {
    "CLIPScorer": "pipeline.inference.reranking",
    "Experiment": "pipeline.config.experiment",
    "TextToImageOutput": "pipeline.inference.output",
    "TextToImagePipeline": "pipeline.inference.pipeline",
    "assemble_bundle": "pipeline.stages.run",
    "codebook_page": "pipeline.evaluation.codebook_report",
    "compare_tokenizers": "pipeline.stages.compare_tokenizers",
    "compress": "pipeline.inference.compress",
    "decompress": "pipeline.inference.compress",
    "diagnose": "pipeline.doctor.diagnose",
    "edit": "pipeline.inference.generate",
    "encode_dataset": "pipeline.stages.encode",
    "encode_for_export": "pipeline.stages.encode",
    "evaluate": "pipeline.evaluation.evaluate",
    "forgetting": "pipeline.evaluation.forgetting",
    "generate": "pipeline.inference.generate",
    "likelihood_report": "pipeline.inference.likelihood_report",
    "load_comparison": "pipeline.stages.compare_tokenizers",
    "load_experiment": "pipeline.config.load",
    "load_source": "pipeline.data.load",
    "load_zoo": "pipeline.evaluation.zoo",
    "reconstruct": "pipeline.inference.generate",
    "run": "pipeline.stages.run",
    "train_prior": "pipeline.stages.prior",
    "train_tokenizer": "pipeline.stages.tokenizer",
    "train_zoo": "pipeline.evaluation.zoo",
}

__all__ = [
    "CLIPScorer",
    "Experiment",
    "TextToImageOutput",
    "TextToImagePipeline",
    "assemble_bundle",
    "codebook_page",
    "compare_tokenizers",
    "compress",
    "decompress",
    "diagnose",
    "edit",
    "encode_dataset",
    "encode_for_export",
    "evaluate",
    "forgetting",
    "generate",
    "likelihood_report",
    "load_comparison",
    "load_experiment",
    "load_source",
    "load_zoo",
    "reconstruct",
    "run",
    "train_prior",
    "train_tokenizer",
    "train_zoo",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
