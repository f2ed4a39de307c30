"""Accelerators on a device of the test's choice."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState


def accelerator_on(device: torch.device) -> Accelerator:
    """A fresh accelerator on this device, whichever one the last was on."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=device.type == "cpu")
