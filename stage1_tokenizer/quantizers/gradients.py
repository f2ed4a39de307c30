"""How a gradient passes a quantizer: what goes forward is the code, what comes back goes to the
vector. Knows vectors alone.

Legend: N vectors, D features. All results have the code's value.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor


def straight_through(vectors: Tensor, chosen: Tensor) -> Tensor:
    """The gradient goes to `vectors` unchanged (Bengio et al. 2013,
    https://arxiv.org/abs/1308.3432)."""
    return vectors + (chosen - vectors).detach()


def rotated(vectors: Tensor, chosen: Tensor) -> Tensor:
    """The rotation trick (Fifty et al. 2024, https://arxiv.org/abs/2410.06424): chosen = s R v,
    with the rotation R and the scale s that carry the vector v (N,D) onto its code taken as
    constants, so that the gradient to v is s R^T g.

    R = 1 - 2 r r^T + 2 q e^T, with e and q the directions of v and of the code and r that of e + q
    (eq. 4 and section 4.2).
    """
    e = F.normalize(vectors.detach(), dim=1)
    q = F.normalize(chosen.detach(), dim=1)
    r = F.normalize(e + q, dim=1)
    scale = chosen.detach().norm(dim=1, keepdim=True) / vectors.detach().norm(
        dim=1, keepdim=True
    ).clamp(min=1e-8)
    along_r = (vectors * r).sum(1, keepdim=True)
    along_e = (vectors * e).sum(1, keepdim=True)
    turned = scale * (vectors - 2 * along_r * r + 2 * along_e * q)
    # In exact arithmetic `turned` is the code already. This removes its rounding error, so that
    # decoding the codes gives the same.
    return turned + (chosen - turned).detach()


def pass_gradient(
    vectors: Tensor, chosen: Tensor, how: Literal["straight_through", "rotation"]
) -> Tensor:
    """Codes' vectors (N,D) with the gradient that `how` names."""
    return rotated(vectors, chosen) if how == "rotation" else straight_through(vectors, chosen)
