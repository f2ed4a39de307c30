"""Rows of sources that are rendered here."""

from __future__ import annotations

from pipeline.config.builtin import IconOptions
from pipeline.config.data import DataConfig
from pipeline.doctor.inspect_source import inspect_source
from pipeline.doctor.open_source import SyntheticRows
from tests.helpers.icons import body, write_names, write_set, write_styles


def test_icons_are_looked_at_with_their_transparency_and_what_was_left_out(tmp_path):
    write_names(tmp_path / "names", {"\U0001f9ff": "nazar amulet"})
    sets = write_styles(tmp_path)
    write_set(tmp_path, "bare", {"a": body("red"), "b": "<script/>"}, licence=None)
    options = IconOptions(
        folder=str(tmp_path), sets=[*sets, "bare"], annotations=str(tmp_path / "names")
    )
    part = inspect_source(DataConfig(source="icons", image_size=16, icons=options), 1000, None)
    assert part.report is not None and part.report.transparent == part.report.rows > 0
    said = [finding.text for finding in part.findings]
    assert "icons: bare states no licence; ask before you share what it trains" in said
    assert any("the drawing of b is left out" in line for line in said)
    assert any("set data.alpha=keep" in line for line in said)


def test_repeats_of_a_drawing_are_no_rows_of_their_own(tmp_path):
    write_names(tmp_path / "names", {"\U0001f9ff": "nazar amulet"})
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
