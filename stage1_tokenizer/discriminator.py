"""What VQ-GAN adds against blur: a discriminator of patches and the losses of both sides. Knows
pixels and logits, no tokenizer.

Legend: B batch, C channels, H W pixels, h w patches.

PatchGAN: Isola et al. 2017 (https://arxiv.org/abs/1611.07004). Hinge loss: Lim & Ye 2017
(https://arxiv.org/abs/1705.02894), as in VQ-GAN's code. Adaptive weight: Esser et al. 2020
(https://arxiv.org/abs/2012.09841), eq. 7. LeCam regularisation: Tseng et al. 2021
(https://arxiv.org/abs/2104.03310), eq. 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.quantizers.base import sum_over_processes

_ANCHOR_DECAY = 0.99
"""Decay per step of the mean logits that LeCam anchors to."""


class Discriminator(nn.Module):
    """Pixels (B,C,H,W) -> logits (B,1,h,w), one for each patch of overlapping ones; above 0 says a
    true image.

    GroupNorm in place of the original's batch normalisation: an image's logits then depend on no
    other, nor on the process it is on.
    """

    anchors: Tensor

    def __init__(self, channels: int, width: int, layers: int) -> None:
        super().__init__()
        parts: list[nn.Module] = [
            nn.Conv2d(channels, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        ]
        inputs = width
        for i in range(1, layers + 1):
            outputs = width * min(2**i, 8)
            stride = 2 if i < layers else 1
            parts += [
                nn.Conv2d(inputs, outputs, 4, stride=stride, padding=1),
                nn.GroupNorm(16, outputs),
                nn.LeakyReLU(0.2),
            ]
            inputs = outputs
        parts.append(nn.Conv2d(inputs, 1, 4, padding=1))
        self.layers = nn.Sequential(*parts)
        # Running means of the logits of true and of drawn images.
        self.register_buffer("anchors", torch.zeros(2))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The kernels, which optimizers for matrices may step."""
        return [p for p in self.parameters() if p.ndim == 4]

    def compile_networks(self) -> None:
        """Compiles the layers in place; parameter names stay as they are."""
        self.layers.compile(dynamic=False)

    @torch.no_grad()
    def update_ema_anchors(self, true: Tensor, drawn: Tensor) -> None:
        """Moves the running means by the logits of a step, over all processes."""
        sums = sum_over_processes(
            torch.stack(
                [
                    true.float().sum(),
                    drawn.float().sum(),
                    torch.tensor(float(true.numel()), device=true.device),
                ]
            )
        )
        means = sums[:2] / sums[2]
        # The first step's are the means so far; from 0, they would be too small for long.
        first = (self.anchors == 0).all()
        self.anchors.copy_(torch.where(first, means, self.anchors.lerp(means, 1 - _ANCHOR_DECAY)))


def hinge_loss(true: Tensor, drawn: Tensor) -> Tensor:
    """The discriminator's: it wants logits above 1 for true images and below -1 for drawn
    ones."""
    return (F.relu(1 - true).mean() + F.relu(1 + drawn).mean()) / 2


def generator_loss(drawn: Tensor) -> Tensor:
    """The decoder's: it wants logits of true images."""
    return -drawn.mean()


def lecam(true: Tensor, drawn: Tensor, anchors: Tensor) -> Tensor:
    """Penalty on logits that run away from the running mean of the other side, which little data
    would let them do."""
    return F.relu(true - anchors[1]).square().mean() + F.relu(anchors[0] - drawn).square().mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, output: Tensor) -> Tensor:
    """Scalar that makes the adversarial gradient as long as the reconstruction loss's, both taken
    at the decoder's output.

    The paper takes them at the last layer's weights; at its output they cost no second pass through
    the decoder.
    """
    norms = [
        torch.autograd.grad(loss, output, retain_graph=True)[0].float().norm()
        for loss in (reconstruction, adversarial)
    ]
    return (norms[0] / (norms[1] + 1e-8)).clamp(max=1e4).detach()


def loss_at_image(loss: Tensor, image: Tensor) -> Tensor:
    """A loss of the same value and gradient that remembers its gradient at the image alone, so
    that it may be differentiated more than once: what lies between the two is passed back through
    once, more than which a compiled graph need not allow."""
    gradient = torch.autograd.grad(loss, image)[0].detach()
    linear = (gradient * image).sum()
    return linear + (loss - linear).detach()


@contextmanager
def requires_grad_off(network: nn.Module) -> Iterator[nn.Module]:
    """The network, with gradients to its inputs and none to its weights."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield network
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
