"""How alike two pictures are: PSNR and SSIM. Knows uint8 arrays only."""

from __future__ import annotations

import numpy as np
import torch

from stage1_tokenizer import structural_similarity


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 arrays, peak 255; infinite for equal ones."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255.0**2 / error))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Mean structural similarity of pictures (N,H,W,3) uint8, in double precision; settings as in `structural_similarity`, peak 255."""
    x, y = (torch.from_numpy(np.ascontiguousarray(v)).permute(0, 3, 1, 2).double() for v in (a, b))
    return float(structural_similarity(x, y, peak=255.0)[0].mean())
