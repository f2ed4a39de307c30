"""The time left that a progress bar shows: of its own work, and of the run."""

from __future__ import annotations

import io

import pytest

from pipeline.runtime import progress
from pipeline.runtime.progress import ProgressBar


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_time_left_is_that_of_the_steps_after_the_warm_up(clock):
    with ProgressBar(total=103, file=io.StringIO()) as bar:
        for seconds in (40.0, 5.0, 5.0, *[2.0] * 10):
            assert bar.seconds_left() is None or bar.updates > 3
            clock.now += seconds
            bar.update()
        assert bar.seconds_left() == pytest.approx(90 * 2.0)


def test_an_evaluation_does_not_change_the_pace(clock):
    with ProgressBar(total=100, file=io.StringIO()) as bar:
        for _ in range(40):
            clock.now += 1.0
            bar.update()
        clock.now += 60.0
        bar.update()
        assert bar.seconds_left() == pytest.approx(59.0)


def test_time_left_follows_the_recent_pace(clock):
    with ProgressBar(total=300, file=io.StringIO()) as bar:
        for seconds in [9.0] * 100 + [1.0] * 100:
            clock.now += seconds
            bar.update()
        assert bar.seconds_left() == pytest.approx(100.0)


def test_updates_of_several_items_count_each(clock):
    with ProgressBar(total=1000, file=io.StringIO()) as bar:
        for _ in range(5):
            clock.now += 2.0
            bar.update(100)
        assert bar.seconds_left() == pytest.approx(10.0)


def test_a_resumed_bar_counts_its_own_items_alone(clock):
    with ProgressBar(total=100, initial=50, file=io.StringIO()) as bar:
        for _ in range(13):
            clock.now += 1.0
            bar.update()
        assert bar.seconds_left() == pytest.approx(37.0)


@pytest.mark.parametrize(
    ("after", "shown"), [(0.0, "01:27 left, "), (60.0, "01:27 left, run 02:27")]
)
def test_the_line_shows_the_work_and_the_run(clock, after, shown):
    file = io.StringIO()
    with ProgressBar(total=100, desc="prior", seconds_after=after, file=file) as bar:
        for _ in range(13):
            clock.now += 1.0
            bar.update()
        bar.refresh()
        assert shown in str(bar)
        assert ("run" in str(bar)) is bool(after)


def test_work_of_unknown_size_has_no_time_left(clock):
    with ProgressBar(total=None, desc="encode", file=io.StringIO()) as bar:
        for _ in range(9):
            clock.now += 1.0
            bar.update(128)
        assert bar.seconds_left() is None
        assert "encode: 1152it" in str(bar) and "left" not in str(bar)
