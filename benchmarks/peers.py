"""Builds the peers at the sizes that are compared. dalle-pytorch's pretrained encoders need
packages without a CPU build, so an empty stand-in replaces their module. No measurement uses it.
"""

from __future__ import annotations

import sys
import types
import warnings
from typing import Any

warnings.filterwarnings("ignore")
TEXT = 32
CODES = 64
VOCABULARY = 1024
NUM_CODES = 1024


def _dalle_pytorch() -> Any:
    stand_in = types.ModuleType("dalle_pytorch.vae")
    stand_in.OpenAIDiscreteVAE = stand_in.VQGanVAE = type("Absent", (), {})  # type: ignore[attr-defined]
    sys.modules.setdefault("dalle_pytorch.vae", stand_in)
    import dalle_pytorch

    return dalle_pytorch


def discrete_vae(image_size: int, layers: int, num_codes: int) -> Any:
    """dalle-pytorch's DiscreteVAE as its README sets it up, with one residual block."""
    return _dalle_pytorch().DiscreteVAE(
        image_size=image_size,
        num_layers=layers,
        num_tokens=num_codes,
        codebook_dim=128,
        hidden_dim=64,
        num_resnet_blocks=1,
    )


def dalle() -> Any:
    """dalle-pytorch's DALLE at 96 tokens; the vae only says how many codes there are and draws them
    at the end."""
    vae = discrete_vae(64, 3, NUM_CODES)
    return _dalle_pytorch().DALLE(
        dim=256,
        vae=vae,
        num_text_tokens=VOCABULARY,
        text_seq_len=TEXT,
        depth=6,
        heads=4,
        dim_head=64,
    )


def llama() -> Any:
    """transformers' LlamaForCausalLM over the same joint vocabulary and length."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY + NUM_CODES,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=TEXT + CODES,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        )
    )


def ours() -> Any:
    """Our prior at the same width and depth, with random weights; guidance may be asked of it as if
    it was trained so."""
    from stage2_prior import Level, PriorConfig, PriorModule, StreamConfig

    levels = (Level(grid=(8, 8), num_codes=NUM_CODES),)
    stream = StreamConfig(text_vocab_size=VOCABULARY, text_length=TEXT, levels=levels)
    prior = PriorModule(PriorConfig(width=256, depth=6, heads=4), stream)
    prior.config.trained_with_caption_dropout = True
    return prior


def millions(model: Any) -> float:
    return sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
