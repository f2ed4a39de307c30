"""Where a server is in its life. Knows nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class ServerState:
    """Shown by `/readyz`."""

    status: Literal["starting", "ready", "stopping"] = "starting"
