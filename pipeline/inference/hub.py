"""Bundles by name: a folder, or a repository of the Hub, which is downloaded into the Hub's cache;
and bundles to the Hub. Knows names and files; what a bundle holds is read in bundle.py."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.shipped_bundles import bundle_folder
from pipeline.inference.bundle import Bundle, read_bundle

_READ = [
    "pipeline.json",
    "prompts.json",
    *(f"{part}/*.json" for part in ("tokenizer", "prior", "text_tokenizer")),
    *(f"{part}/*.safetensors" for part in ("tokenizer", "prior")),
]
"""Patterns of the files of a bundle that are read."""
_FILES = [*_READ, "*.md", "*.png"]
"""Patterns of all its files. Nothing else of a repository is downloaded."""


def find_bundle(
    name: str | Path, *, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """The folder of a bundle: itself, that of a name in the package, or where the Hub's cache has
    the repository `user/name`. A `Path`, or a text that is plainly a path, is never looked up.

    Raises:
        FileNotFoundError: there is no such folder, and no such repository can be had.
    """
    if isinstance(name, str) and "/" in name:
        from stage1_tokenizer.hub import may_be_on_hub, model_folder  # imports huggingface_hub

        if may_be_on_hub(name):
            return model_folder(name, _FILES, revision=revision, token=token)
    return bundle_folder(name).expanduser()


def load_bundle(
    name: str | Path, *, revision: str | None = None, token: str | bool | None = None
) -> Bundle:
    """The bundle of a folder or of a repository of the Hub, with every file checked.

    Raises:
        FileNotFoundError: there is none.
        ValueError: what `read_bundle` raises; of a repository, names it and its cache.
    """
    folder = find_bundle(name, revision=revision, token=token)
    try:
        return read_bundle(folder)
    except (ValueError, FileNotFoundError) as error:
        if "snapshots" not in folder.parts:
            raise
        cached = folder.parents[1]
        again = f"; to download it again, remove {cached}" if cached.is_dir() else ""
        raise type(error)(f"{name} of the Hub: {error}{again}") from error


def push_bundle(
    folder: Path,
    name: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> str:
    """Uploads a bundle to the Hub, once it can be read. Files of a bundle that was there before are
    removed in the same commit; cards and images stay. Returns the address of the commit.

    Args:
        name: `user/name`. The other arguments and errors are those of `push_folder`.

    Raises:
        FileNotFoundError, ValueError: what `read_bundle` raises.
    """
    from stage1_tokenizer.hub import push_folder

    read_bundle(folder)
    return push_folder(folder, name, private=private, revision=revision, token=token, owned=_READ)
