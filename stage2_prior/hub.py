"""Names of the Hub -> folders on this disk, so that each file is checked before it is read. Asks
the network where that is allowed. Knows names and folders; knows no model.

The other stage has the same file, word by word: the stages share no package, and a test compares
the two.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from threading import Event, Thread
from typing import Any, Literal

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
"""Variables of the libraries. Here, each one forbids every network call."""
_UNSET = ("", "0", "false", "no", "off")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
_SECONDS = 10


def is_offline() -> bool:
    """Whether the environment forbids network calls. The library reads it once, when it is
    imported; this passes on what it says now."""
    offline = any(os.environ.get(name, "").lower() not in _UNSET for name in _OFFLINE)
    constants.HF_HUB_OFFLINE = offline
    return offline


def hub_answers(name: str, kind: Literal["model", "dataset"]) -> bool:
    """Whether the Hub answers for a name, be it that there is none. Takes 10 seconds at most: the
    libraries ask six times and wait in between, half a minute in all."""
    if is_offline():
        return False
    answered = Event()

    def ask() -> None:
        try:
            HfApi().repo_info(name, repo_type=kind, timeout=_SECONDS)
        except HfHubHTTPError:
            pass  # an answer, too
        except Exception:  # libraries of several versions raise other classes
            return
        answered.set()

    # A thread, since a time limit holds for one address, and a name may have many.
    asking = Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_SECONDS)
    return answered.is_set()


def model_folder(name: str | Path, patterns: list[str], **options: Any) -> Path:
    """The folder of a model: itself, or where the cache of the Hub has the files that match.

    Args:
        name: a path, or the name of a model on the Hub. A `Path`, or what is plainly a path, is
            never looked up.
        options: of `huggingface_hub.snapshot_download`.

    Raises:
        FileNotFoundError: there is no such folder, and no such model can be had.
    """
    path = Path(name).expanduser()
    if path.exists() or isinstance(name, Path):
        return path
    if not _NAME.fullmatch(name) or ("/" in name and path.parent.is_dir()):
        raise FileNotFoundError(f"there is no {name}")
    here = options.pop("local_files_only", False) or not hub_answers(name, "model")
    try:
        return Path(
            snapshot_download(name, allow_patterns=patterns, local_files_only=here, **options)
        )
    except HfHubHTTPError as error:
        reason = f"the Hub refuses it: {' '.join(str(error).split())[:200]}"
    except FileNotFoundError:
        reason = "the Hub does not answer"
        if is_offline():
            reason = "--offline or HF_HUB_OFFLINE forbids to ask the Hub"
    raise FileNotFoundError(
        f"{name} is neither here nor in the cache of the Hub, and {reason}; give the path of a "
        "folder, or try again with the network"
    )
