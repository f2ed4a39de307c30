"""Muon: steps by the momentum's nearest orthogonal matrix. Knows matrices and kernels; knows no
network.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/); the step's size is that of AdamW
(Liu et al. 2025, arXiv:2502.16982, eq. 4), so one learning rate serves both. torch.optim.Muon takes
matrices alone and one at a time: here convolution kernels count as matrices (out, in * height *
width), and those of one shape are orthogonalised together. Sharded matrices are gathered, and each
process orthogonalises all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from pipeline.runtime.devices import uses_bf16
from pipeline.training.fsdp import full_tensor, shard_like

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalize(matrices: Tensor) -> Tensor:
    """Matrices (N,R,C) -> (N,R,C) with all singular values near 1 (0.7 to 1.2), by Newton-Schulz
    iterations: in bf16 on devices that compute it natively, and in fp32 on others, where emulated
    bf16 takes longer than the network.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.bfloat16() if uses_bf16("auto", matrices.device) else matrices.float()
    x = x.mT if tall else x
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).to(x.dtype)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised.

    Args:
        parameters: tensors of two or more dimensions; all beyond the first count as columns.
        lr: learning rate, on AdamW's scale.
        momentum: fraction of the old momentum that each step keeps.
        weight_decay: decoupled, as AdamW's.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient; `closure` is not supported."""
        assert closure is None
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[len(parameter), parameter.numel() // len(parameter)].append(parameter)
            for (rows, columns), members in alike.items():
                updates = self._nesterov(members, group["momentum"])
                matrices = orthogonalize(
                    torch.stack([full_tensor(update).reshape(rows, columns) for update in updates])
                )
                steps = [
                    shard_like(matrix.view(p.shape), p)
                    for p, matrix in zip(members, matrices, strict=True)
                ]
                # All of a shape at once: on a GPU, launching a kernel takes longer than the kernel.
                torch._foreach_mul_(list[Tensor](members), 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(
                    list[Tensor](members),
                    steps,
                    alpha=-group["lr"] * 0.2 * max(rows, columns) ** 0.5,
                )

    def _nesterov(self, parameters: list[nn.Parameter], momentum: float) -> tuple[Tensor, ...]:
        gradients = [p.grad for p in parameters if p.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - momentum)
        return torch._foreach_lerp(gradients, momenta, momentum)
