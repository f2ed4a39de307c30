"""docs/data.md: every example is a configuration, and every setting it names exists."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from pipeline.config.data import (
    DataConfig,
    EmojiOptions,
    FilterOptions,
    ShapesOptions,
    StreamOptions,
    TagOptions,
)
from pipeline.config.load import load_experiment

TEXT = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
EXAMPLES = re.findall(r"```yaml\n(.*?)```", TEXT, re.S)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_each_example_is_a_configuration(number, tmp_path):
    values = {"name": "example", "encode": {"max_images": 10}, **yaml.safe_load(EXAMPLES[number])}
    (tmp_path / "example.yaml").write_text(yaml.safe_dump(values))
    assert load_experiment(["--config", str(tmp_path / "example.yaml")]).data.sources


def test_every_setting_of_data_is_named_there():
    sections = (
        *(DataConfig, FilterOptions, TagOptions, StreamOptions),
        *(ShapesOptions, EmojiOptions),
    )
    for section in sections:
        for field in fields(section):
            assert re.search(rf"\b{field.name}\b", TEXT), field.name
    assert len(EXAMPLES) >= 12
