"""The notebook's cells run one after another, at tiny settings."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

NOTEBOOK = Path(__file__).parents[2] / "examples" / "first_pictures.ipynb"


@pytest.fixture
def log_level() -> Iterator[None]:
    """The notebook raises the level of our logger; other tests keep theirs."""
    logger = logging.getLogger("pipeline")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.mark.slow
def test_notebook_runs_and_shows_images(tmp_path, monkeypatch, log_level):
    monkeypatch.chdir(NOTEBOOK.parent)
    names: dict = {}
    tiny = (
        f'steps = {{"tokenizer": 4, "prior": 4}}\nnum_images = 64\noutput_dir = {str(tmp_path)!r}'
    )
    parameters = 0
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"])
        if "parameters" in cell["metadata"].get("tags", ()):
            source, parameters = tiny, parameters + 1
        exec(compile(source, str(NOTEBOOK), "exec"), names)
    assert parameters == 1, "the settings that this test makes tiny are in one cell"
    assert (tmp_path / "first-images" / "bundle" / "pipeline.json").is_file()
    assert len(names["out"].images) == 9 and isinstance(names["out"].images[0], Image.Image)
