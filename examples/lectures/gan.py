"""VQ-GAN's hinge losses, and what a discriminator does against blur.

    python -m examples.lectures.gan --out gan.png

A code does not tell the phase of its stripes. The squared error is least at the mean of all phases,
which is grey. In place of a decoder there are six free images of the code. They also learn to
mislead a discriminator. Losses and network are those of `stage1_tokenizer/discriminator.py`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from examples.lectures.plots import canvas, out_option
from stage1_tokenizer.discriminator import (
    Discriminator,
    adaptive_weight,
    generator_loss,
    hinge_loss,
    requires_grad_off,
)

SIZE = 8
IMAGES = 6


def stripes(count: int, generator: torch.Generator) -> Tensor:
    """Images (count,1,8,8) of stripes, 2 pixels wide, in one of four phases."""
    phase = torch.randint(4, (count, 1), generator=generator)
    rows = ((torch.arange(SIZE) + phase) // 2 % 2 * 2 - 1).float()
    return rows[:, None, :, None].expand(-1, 1, SIZE, SIZE).contiguous()


def train(steps: int, weight: float, seed: int = 0) -> Tensor:
    """The free images (6,1,8,8) after some steps; `weight` is that of the discriminator."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    free = (0.5 * torch.randn(IMAGES, 1, SIZE, SIZE, generator=generator)).requires_grad_()
    discriminator = Discriminator(1, width=16, layers=1)
    decoder_optimizer = torch.optim.Adam([free], lr=0.03, betas=(0.5, 0.9))
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.5, 0.9))
    for _ in range(steps):
        true = stripes(32, generator)
        decoded = free.clone()
        reconstruction = (decoded[:, None] - true).square().mean()
        with requires_grad_off(discriminator) as judge:
            misleading = generator_loss(judge(decoded))
        scale = weight * adaptive_weight(reconstruction, misleading, decoded)
        decoder_optimizer.zero_grad()
        (reconstruction + scale * misleading).backward()
        decoder_optimizer.step()
        optimizer.zero_grad()
        hinge_loss(discriminator(true), discriminator(free.detach())).backward()
        optimizer.step()
    return free.detach().clamp(-1, 1)


def main(out: Path, steps: int = 300) -> None:
    """The losses against a logit, and the free images without and with a discriminator."""
    logits = torch.linspace(-3, 3, 200)
    certain = torch.ones(1)
    plot = canvas(11, 3.8)
    losses, images = plot.subplots(1, 2)
    true = [float(hinge_loss(logit[None], -certain)) for logit in logits]
    drawn = [float(hinge_loss(certain, logit[None])) for logit in logits]
    losses.plot(logits, true, label="discriminator's loss of a true image")
    losses.plot(logits, drawn, label="discriminator's loss of a decoded image")
    losses.plot(logits, -logits, label="decoder's loss of a decoded image")
    losses.set(title="hinge losses", xlabel="logit", ylim=(-3, 3))
    losses.legend(fontsize=8)
    rows = [stripes(IMAGES, torch.Generator().manual_seed(2)), train(steps, 0), train(steps, 2)]
    grid = torch.cat([torch.cat([*row[:, 0]], dim=1) for row in rows])
    images.imshow(grid.numpy(), cmap="gray", vmin=-1, vmax=1)
    names = ["true images", "squared error", "and discriminator"]
    images.set(title="images of one code", xticks=[])
    images.set_yticks([SIZE * (row + 0.5) - 0.5 for row in range(3)], names)
    plot.savefig(out)


if __name__ == "__main__":
    main(out_option(__doc__ or ""))
