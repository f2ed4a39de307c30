"""Names of the Hub -> folders on this disk, so that each file is checked before it is read; and
folders -> the Hub. Asks the network where that is allowed. Knows names and folders; knows no model.

The other stage has the same file, but for the name of its package: the stages share no package, and
a test compares the two.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from threading import Event, Thread
from typing import Any, Literal

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from stage2_prior.file_checks import check_file

_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
"""Variables of the libraries. Here, each one forbids every network call."""
_UNSET = ("", "0", "false", "no", "off")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
_SECONDS = 10
ENDINGS = (".safetensors", ".json", ".md", ".png")
"""Endings of the files that go to the Hub."""


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


def may_be_on_hub(name: str) -> bool:
    """Whether a text that is no path here may name a repository. What is plainly a path may not, so
    that it is sent nowhere."""
    if not _NAME.fullmatch(name) or ("/" in name and Path(name).expanduser().parent.is_dir()):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


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
    if not may_be_on_hub(name):
        raise FileNotFoundError(f"there is no {name}")
    here = options.pop("local_files_only", False) or not hub_answers(name, "model")
    try:
        return Path(
            snapshot_download(name, allow_patterns=patterns, local_files_only=here, **options)
        )
    except HfHubHTTPError as error:
        reason = _refusal(error)
    except FileNotFoundError:
        asked = "the Hub does not answer"
        if is_offline():
            asked = "--offline or HF_HUB_OFFLINE forbids to ask the Hub"
        reason = f"{asked}; give the path of a folder, or try again with the network"
    except (OSError, ValueError):  # a full disk, a wrong option
        raise
    except Exception as error:  # the connection broke; libraries of several versions name it so
        reason = f"the download broke off ({_line(error)}); try again"
    raise FileNotFoundError(f"{name} is neither here nor in the cache of the Hub, and {reason}")


def push_folder(
    folder: Path,
    name: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    owned: Sequence[str] = (),
) -> str:
    """Uploads the files of a folder, at any depth, that end in one of `ENDINGS`, in one commit.
    Returns the address of the commit.

    Args:
        name: of the repository, `user/name`; made where there is none.
        private: whether a repository that is made is private; None takes the user's default.
        revision: a branch, made where there is none (main).
        token: of the Hub; None takes the one of `hf auth login`, or of HF_TOKEN.
        owned: patterns of files that the commit removes where the folder lacks them: what an
            earlier upload left would be read with the new files.

    Raises:
        ValueError: the name cannot be a repository's, there is nothing to upload, or a file is a
            link to one outside of the folder.
        OSError: the network is forbidden, or the Hub refuses or does not answer; says which.
    """
    if name.count("/") != 1 or not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a repository of the Hub; give user/name")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in ENDINGS)
    for file in files:
        check_file(file)
    additions = [
        CommitOperationAdd(path_in_repo=file.relative_to(folder).as_posix(), path_or_fileobj=file)
        for file in files
    ]
    if not additions:
        raise ValueError(f"{folder} has no file to upload ({', '.join(ENDINGS)}); give a model's")
    if is_offline():
        raise OSError(
            f"{name} is not pushed: --offline or HF_HUB_OFFLINE forbids to ask the Hub; try again "
            "with the network"
        )
    if not hub_answers(name, "model"):
        raise OSError(f"{name} is not pushed: the Hub does not answer; try again with the network")
    api = HfApi(token=token)
    try:
        api.create_repo(name, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        there = {addition.path_in_repo for addition in additions}
        stale = [
            CommitOperationDelete(path_in_repo=path)
            for path in (api.list_repo_files(name, revision=revision) if owned else ())
            if path not in there
            and any(PurePosixPath(f"/{path}").match(f"/{pattern}") for pattern in owned)
        ]
        message = "Upload the model"
        commit = api.create_commit(
            name, [*additions, *stale], commit_message=message, revision=revision
        )
    except HfHubHTTPError as error:
        raise OSError(f"{name} is not pushed: {_refusal(error)}") from error
    except Exception as error:  # the connection broke; libraries of several versions name it so
        raise OSError(
            f"{name} is not pushed: the upload broke off ({_line(error)}); try again"
        ) from error
    return str(commit.commit_url)


def _refusal(error: HfHubHTTPError) -> str:
    """What the Hub answers, and what to do."""
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return "its owner grants access to it; ask for access on its page, then `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision; name a branch, a tag or a commit that it has"
    if isinstance(error, RepositoryNotFoundError):
        return (
            "the Hub has no such repository, or shows it to its members alone; check the name, or "
            "give a token (`hf auth login`)"
        )
    if status in (401, 403):
        return (
            f"the Hub refuses it to this token ({status}); `hf auth login` with one that may, or "
            "give another name"
        )
    return f"the Hub refuses it ({_line(error)}); try again later"


def _line(error: Exception) -> str:
    """An error on one short line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
