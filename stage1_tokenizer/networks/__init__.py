"""Encoders and decoders, a file an architecture: plain modules with plain arguments that know no
quantizer and no configuration.

All encoders take pixels (B,C,H,W) to features (B,out,h,w), all decoders take code vectors (B,D,h,w)
to the likelihood's parameters.
"""

from __future__ import annotations

from torch import nn

from stage1_tokenizer.config import TokenizerConfig
from stage1_tokenizer.networks import dalle, patch, transformer, vqgan


def build_networks(
    config: TokenizerConfig, features: int, vectors: int, parameters: int
) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder that a configuration names, for a quantizer that takes `features`
    channels and gives `vectors`, and a likelihood of `parameters` channels."""
    channels, depths = config.channels, (config.encoder_depth, config.decoder_depth)
    match config.architecture:
        case "patch":
            fold = min(config.downsample_factor, 4)
            return (
                patch.Encoder(
                    channels,
                    config.widths,
                    depths[0],
                    config.encoder_kernel,
                    fold,
                    features,
                    attention=config.attention,
                ),
                patch.Decoder(
                    vectors, config.widths, depths[1], fold, parameters, attention=config.attention
                ),
            )
        case "transformer":
            return (
                transformer.Encoder(
                    channels, config.width, depths[0], config.downsample_factor, features
                ),
                transformer.Decoder(
                    vectors, config.width, depths[1], config.downsample_factor, parameters
                ),
            )
        case "dalle":
            halvings = config.downsample_factor.bit_length() - 1
            base = config.width >> halvings
            return (
                dalle.Encoder(channels, base, halvings, depths[0], features),
                dalle.Decoder(vectors, base, halvings, depths[1], parameters),
            )
        case _:
            options = config.vqgan
            widths = tuple(options.channels * m for m in options.multipliers)
            return (
                vqgan.Encoder(
                    channels,
                    widths,
                    options.blocks,
                    options.latent_channels,
                    config.code_dim,
                    features,
                    options.attention,
                ),
                vqgan.Decoder(
                    vectors,
                    widths,
                    options.blocks,
                    options.latent_channels,
                    parameters,
                    options.attention,
                ),
            )


__all__ = ["build_networks", "dalle", "patch", "transformer", "vqgan"]
