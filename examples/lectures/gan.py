"""VQ-GAN's hinge losses, and what a discriminator does to blur.

    python -m examples.lectures.gan --out gan.png

The images are stripes whose phase no code tells. The squared error is least at their mean, which is
grey. The decoder here is one free image per code; each step also lowers the discriminator's loss of
it, times the adaptive weight. Losses and networks are those of `stage1_tokenizer/discriminator.py`.
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

SIZE = 16
IMAGES = 6


def stripes(count: int, generator: torch.Generator) -> Tensor:
    """Images (count,1,16,16) of sharp stripes, 4 pixels wide, in one of four phases."""
    phase = 2 * torch.randint(4, (count, 1), generator=generator)
    rows = ((torch.arange(SIZE) + phase) // 4 % 2 * 2 - 1).float()
    return rows[:, None, :, None].expand(-1, 1, SIZE, SIZE).contiguous()


def train(steps: int, weight: float, seed: int = 0) -> tuple[Tensor, list[float]]:
    """Decoded images (6,1,16,16) after some steps, and the adaptive weight of each step."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    decoded = (0.05 * torch.randn(IMAGES, 1, SIZE, SIZE, generator=generator)).requires_grad_()
    discriminator = Discriminator(1, width=16, layers=2)
    decoder_steps = torch.optim.Adam([decoded], lr=0.02, betas=(0.5, 0.9))
    judge_steps = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    weights = []
    for _ in range(steps):
        true = stripes(32, generator)
        output = decoded.clone()
        reconstruction = (output[:, None] - true).square().mean()
        with requires_grad_off(discriminator) as judge:
            misleading = generator_loss(judge(output))
        scale = adaptive_weight(reconstruction, misleading, output)
        weights.append(float(scale))
        decoder_steps.zero_grad()
        (reconstruction + weight * scale * misleading).backward()
        decoder_steps.step()
        judge_steps.zero_grad()
        hinge_loss(discriminator(true), discriminator(decoded.detach())).backward()
        judge_steps.step()
    return decoded.detach().clamp(-1, 1), weights


def main(out: Path, steps: int = 400) -> None:
    """The losses against a logit, and the decoded images without and with a discriminator."""
    logits = torch.linspace(-3, 3, 200)
    zero = torch.ones(1)
    true = [float(hinge_loss(logit[None], -zero)) for logit in logits]
    drawn = [float(hinge_loss(zero, logit[None])) for logit in logits]
    plot = canvas(11, 3.8)
    losses, images = plot.subplots(1, 2)
    losses.plot(logits, true, label="discriminator's loss of a true image")
    losses.plot(logits, drawn, label="discriminator's loss of a decoded image")
    losses.plot(logits, -logits, label="decoder's loss of a decoded image")
    losses.set(title="hinge losses", xlabel="logit", ylim=(-3, 3))
    losses.legend(fontsize=8)
    rows = [stripes(IMAGES, torch.Generator().manual_seed(2)), train(steps, 0)[0]]
    rows.append(train(steps, 1)[0])
    grid = torch.cat([torch.cat([*row[:, 0]], dim=1) for row in rows])
    images.imshow(grid, cmap="gray", vmin=-1, vmax=1)
    names = ["images", "squared error", "with discriminator"]
    images.set(title="decoded images of one code", xticks=[])
    images.set_yticks([SIZE * (0.5 + row) for row in range(3)], names)
    plot.savefig(out)


if __name__ == "__main__":
    main(out_option(__doc__ or ""))
