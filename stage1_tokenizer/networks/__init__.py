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
    channels = config.channels
    attention = config.attention
    factor = config.downsample_factor
    encoder_depth = config.encoder_depth
    decoder_depth = config.decoder_depth
    match config.architecture:
        case "patch":
            widths = config.widths
            kernel = config.encoder_kernel
            fold = min(factor, 4)
            return (
                patch.Encoder(
                    channels, widths, encoder_depth, kernel, fold, features, attention=attention
                ),
                patch.Decoder(
                    vectors, widths, decoder_depth, fold, parameters, attention=attention
                ),
            )
        case "transformer":
            return (
                transformer.Encoder(channels, config.width, encoder_depth, factor, features),
                transformer.Decoder(vectors, config.width, decoder_depth, factor, parameters),
            )
        case "dalle":
            halvings = factor.bit_length() - 1
            base = config.width >> halvings
            return (
                dalle.Encoder(channels, base, halvings, encoder_depth, features),
                dalle.Decoder(vectors, base, halvings, decoder_depth, parameters),
            )
        case _:
            options = config.vqgan
            widths = tuple(options.channels * m for m in options.multipliers)
            attention = options.attention
            blocks = options.blocks
            latent = options.latent_channels
            # Mean and deviation of Gaussian latents are not both linear in `code_dim` features.
            vector = config.code_dim if config.has_codes else features
            return (
                vqgan.Encoder(channels, widths, blocks, latent, vector, features, attention),
                vqgan.Decoder(vectors, widths, blocks, latent, parameters, attention),
            )


__all__ = ["build_networks", "dalle", "patch", "transformer", "vqgan"]
