"""`ServerSettings`: how a server listens and what it lets clients ask. Knows numbers alone."""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import dataclass

MAX_SLOTS = 64


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What `minidalle serve` sets."""

    host: str = "127.0.0.1"
    """Address to listen at. Others than loopback can be reached from other machines."""
    port: int = 8000
    public_host: str | None = None
    """Name by which clients ask a proxy in front of a server that listens at the loopback."""
    slots: int = 32
    """Guided images that are sampled at a time; fewer where the memory holds fewer."""
    max_waiting: int = 256
    """Images that wait for a slot at most; further requests get 429."""
    max_images: int = 16
    """Images per request, those that `best_of` drops included."""
    max_prompt: int = 1000
    """Characters of a prompt."""
    max_body_mb: float = 8.0
    """MB of a request's body."""
    timeout: float = 300.0
    """Seconds that a request may take."""
    grace: float = 30.0
    """Seconds that running requests have after a signal to stop."""
    log_prompts: bool = False
    """Write prompts into the log."""
    compiled: bool = False
    """Compile the steps of one image at the start."""
    refuse_urls: bool = False
    """Refuse to name images by URL: another server behind the same address does not have them."""

    def __post_init__(self) -> None:
        if not 1 <= self.slots <= MAX_SLOTS:
            raise ValueError(f"slots is {self.slots}; it must be a number from 1 to {MAX_SLOTS}")
        if not 1 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}; it must be a number from 1 to 65535")
        for name in ("max_waiting", "max_images", "max_prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("max_body_mb", "timeout", "grace"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} is {value}; it must be a number above 0")
        if self.public_host is not None:
            if not re.fullmatch(r"[A-Za-z0-9.-]+", self.public_host):
                raise ValueError(
                    f"public_host is {self.public_host!r}; give a name alone, such as "
                    "draw.example.org, without https:// and without a port"
                )
            if not self.is_loopback:
                raise ValueError(
                    f"public_host is for a server at the loopback, and host is {self.host}, where "
                    "every name is answered; leave one of them out"
                )
        if self.max_images > self.slots + self.max_waiting:
            raise ValueError(
                f"max_images is {self.max_images}, and {self.slots} slots with {self.max_waiting} "
                "waiting images never hold as many; raise max_waiting"
            )

    @property
    def is_loopback(self) -> bool:
        """Whether this machine alone can reach the server."""
        if self.host.lower().rstrip(".") == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
