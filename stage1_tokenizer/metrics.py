"""How alike two images are: PSNR, SSIM and MS-SSIM. Knows pixels; no tokenizer.

Legend: B batch, C channels, H W pixels.

SSIM: Wang et al. 2004. MS-SSIM: Wang et al. 2003.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_WINDOW = 11
_DEVIATION = 1.5
_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Weights of the scales, finest first; small images have fewer, and those share the weight."""


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 arrays, peak 255; infinite for equal ones."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255.0**2 / error))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Mean structural similarity of images (N,H,W,3) uint8, in double precision; settings as in
    `structural_similarity`, peak 255."""
    x, y = (torch.from_numpy(np.ascontiguousarray(v)).permute(0, 3, 1, 2).double() for v in (a, b))
    return float(structural_similarity(x, y, peak=255.0)[0].mean())


def peak_signal_to_noise(pixels: Tensor, images: Tensor) -> Tensor:
    """PSNR in dB of each image (B,), both in [-1,1] (peak 2)."""
    error = (pixels - images.clamp(-1, 1)).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=1e-10))


def structural_similarity(x: Tensor, y: Tensor, peak: float) -> tuple[Tensor, Tensor]:
    """SSIM and its part without the luminance, each (B,C) a mean over positions: per channel,
    Gaussian window 11 of deviation 1.5 (as much of it as fits), no padding, K1 = 0.01, K2 = 0.03
    (Wang et al. 2004)."""
    size = min(_WINDOW, *x.shape[2:])
    steps = torch.arange(size, dtype=x.dtype, device=x.device) - (size - 1) / 2
    window = torch.exp(-(steps**2) / (2 * _DEVIATION**2))
    window = window / window.sum()
    channels = x.shape[1]
    kernel = (window[:, None] * window[None, :]).expand(channels, 1, size, size)

    def local_mean(v: Tensor) -> Tensor:
        return F.conv2d(v, kernel, groups=channels)

    mean_x = local_mean(x)
    mean_y = local_mean(y)
    variance_x = local_mean(x * x) - mean_x**2
    variance_y = local_mean(y * y) - mean_y**2
    covariance = local_mean(x * y) - mean_x * mean_y
    c1 = (0.01 * peak) ** 2
    c2 = (0.03 * peak) ** 2
    contrast = (2 * covariance + c2) / (variance_x + variance_y + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * contrast).mean(dim=(2, 3)), contrast.mean(dim=(2, 3))


def multi_scale_distance(pixels: Tensor, others: Tensor) -> Tensor:
    """1 - MS-SSIM (B,), over as many of the five scales as leave a whole window."""
    with torch.autocast(pixels.device.type, enabled=False):
        x = pixels.float()
        y = others.float()
        scales = 1
        while scales < len(_SCALES) and min(x.shape[2:]) >> scales >= _WINDOW:
            scales += 1
        weights = [weight / sum(_SCALES[:scales]) for weight in _SCALES[:scales]]
        similarity = torch.ones(len(x), x.shape[1], device=x.device)
        for scale, weight in enumerate(weights):
            whole, contrast = structural_similarity(x, y, peak=2.0)
            part = whole if scale == scales - 1 else contrast
            # Negative numbers have no such power; near 0 its slope is too steep.
            similarity = similarity * part.clamp(min=1e-3) ** weight
            x = F.avg_pool2d(x, 2)
            y = F.avg_pool2d(y, 2)
        return 1 - similarity.mean(1)
