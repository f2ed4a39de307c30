"""Whether network calls are allowed. Makes none."""

from __future__ import annotations

from stage1_tokenizer.hub import is_offline


def require_online(what: str, remedy: str) -> None:
    """Raises ValueError where --offline or HF_HUB_OFFLINE forbids what needs the network.

    Args:
        what: asks for the network.
        remedy: what does without.
    """
    if is_offline():
        raise ValueError(
            f"{what} needs the network, and --offline or HF_HUB_OFFLINE forbids it; {remedy}"
        )
