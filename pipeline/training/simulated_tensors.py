"""Runs operations on tensors that have a shape and no values: takes neither time nor memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes


@contextmanager
def simulate_tensors() -> Iterator[None]:
    """Inside, operations compute shapes alone. Inputs may come from outside, and keep their values.

    What depends on values that were computed inside is answered arbitrarily: a truth is True, a
    number is 1, and all entries count as nonzero.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes seconds to import

    with FakeTensorMode(allow_non_fake_inputs=True), _ArbitraryValues():
        yield


class _ArbitraryValues(TorchDispatchMode):
    """Answers the operations whose result or its shape depends on values."""

    def __torch_dispatch__(
        self,
        function: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        answer = _ANSWERS.get(function)
        return function(*args, **kwargs) if answer is None else answer(*args, **kwargs)


def _number(tensor: Tensor) -> bool | int | float:
    from torch._subclasses.fake_tensor import FakeTensor

    if not isinstance(tensor, FakeTensor):  # of outside: it has a value
        with _disable_current_modes():
            return tensor.item()
    return True if tensor.dtype == torch.bool else 1


def _bincount(tensor: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    return (tensor if weights is None else weights).new_empty(max(minlength, 1))


def _nonzero(tensor: Tensor) -> Tensor:
    return tensor.new_empty((tensor.numel(), tensor.ndim), dtype=torch.int64)


_ANSWERS: dict[object, Callable[..., object]] = {
    torch.ops.aten._local_scalar_dense.default: _number,
    torch.ops.aten.bincount.default: _bincount,
    torch.ops.aten.nonzero.default: _nonzero,
}
