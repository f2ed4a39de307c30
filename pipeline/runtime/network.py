"""Whether network calls are allowed. Makes none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def network_forbidden(named_by: str) -> Iterator[None]:
    """Forbids the network, as HF_HUB_OFFLINE=1 does, for data that a file names and no user: a
    bundle or run from elsewhere could name any address.

    Raises:
        ValueError: the data cannot be read; says that `named_by` names them.
    """
    from stage1_tokenizer.hub import is_offline  # not above: it imports torch

    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{named_by} names data that are read from this disk alone: {error}"
        ) from error
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before
        is_offline()  # passes it on to the libraries again


def require_online(what: str, remedy: str) -> None:
    """Raises ValueError where --offline or HF_HUB_OFFLINE forbids what needs the network.

    Args:
        what: asks for the network.
        remedy: what does without.
    """
    from stage1_tokenizer.hub import is_offline  # not above: it imports torch

    if is_offline():
        raise ValueError(
            f"{what} needs the network, and --offline or HF_HUB_OFFLINE forbids it; {remedy}"
        )
