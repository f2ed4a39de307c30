"""Rows of sources that are rendered here."""

from __future__ import annotations

from pipeline.config.builtin import IconOptions
from pipeline.config.data import DataConfig
from pipeline.doctor.open_source import SyntheticRows
from tests.helpers.icons import write_names, write_styles


def test_repeats_of_a_drawing_are_no_rows_of_their_own(tmp_path):
    write_names(tmp_path / "names", {})
    sets = write_styles(tmp_path)
    labels = []
    for repeats in (1, 3):
        options = IconOptions(
            folder=str(tmp_path),
            sets=sets,
            annotations=str(tmp_path / "names"),
            untoned_repeats=repeats,
        )
        rows = SyntheticRows(DataConfig(source="icons", image_size=16, icons=options), most=1000)
        labels.append([rows.label(row) for row in range(len(rows))])
    assert labels[0] == labels[1] and len(set(labels[1])) == len(labels[1])
