"""The number of threads by what other programs leave free. Load and clock are made up here."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread

import pytest
import torch

from pipeline.runtime import threads
from pipeline.runtime.threads import CoreTimes, FreeCores, FreeThreads, cpu_quota, running_others

QUIET, BUSY = 0.0, 1.0


class Machine:
    """Two cores, on which this process computes with one thread and others as told."""

    def __init__(self) -> None:
        self.now = 0.0
        self.others = 0.0

    def read(self) -> CoreTimes:
        return CoreTimes(self.now + self.others, self.now)

    def pass_time(self, seconds: float, load: float) -> None:
        self.now += seconds
        self.others += seconds * load


@pytest.fixture
def machine(monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "usable_cores", lambda: [0, 1])
    monkeypatch.setattr(threads, "cpu_quota", lambda: math.inf)
    monkeypatch.setattr(threads, "running_others", lambda: 1)
    monkeypatch.setattr(threads.psutil, "cpu_count", lambda logical: 2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield Machine()
    torch.set_num_threads(before)


@pytest.fixture
def cores(machine):
    return FreeCores(machine.read, lambda: machine.now)


@pytest.mark.parametrize("load, expected", [(QUIET, 2), (0.05, 2), (0.3, 1), (BUSY, 1), (1.9, 1)])
def test_threads_are_as_many_as_cores_are_free(machine, cores, load, expected):
    machine.pass_time(2.0, load)
    with FreeThreads(cores=cores):
        assert torch.get_num_threads() == expected
    assert torch.get_num_threads() == 2


def test_own_computing_is_not_load(machine, cores):
    machine.pass_time(2.0, QUIET)
    assert cores.update() and cores.free == 2


def test_a_loop_follows_the_load_after_two_readings_that_agree(machine, cores):
    machine.pass_time(2.0, QUIET)
    seen = []
    with FreeThreads(agreeing=2, cores=cores) as chosen:
        for load in (QUIET, BUSY, QUIET, BUSY, BUSY, BUSY, QUIET, QUIET):
            machine.pass_time(1.5, load)
            seen.append((torch.get_num_threads(), chosen.update()))
    assert [is_new for _, is_new in seen] == [True, False, False, False, True, False, False, True]
    assert [number for number, _ in seen] == [2, 2, 2, 2, 2, 1, 1, 1]


def test_a_core_is_left_to_other_threads_of_the_process(machine, cores):
    """Theirs then compute within what is left, and all get their number back."""
    machine.pass_time(2.0, QUIET)
    with FreeThreads(spare=1, cores=cores) as outer:
        assert torch.get_num_threads() == 1 and outer.most == 1
        with ThreadPoolExecutor(1) as pool:

            def computes() -> int:
                with FreeThreads(cores=cores):
                    return torch.get_num_threads()

            assert pool.submit(computes).result() == 1
        machine.pass_time(2.0, QUIET)
        outer.update()
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_a_number_that_the_user_chose_is_not_reduced(machine, cores, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    machine.pass_time(2.0, QUIET)
    with FreeThreads(spare=1, cores=cores):
        assert torch.get_num_threads() == 2


def test_readings_cover_at_least_a_second(machine, cores):
    machine.pass_time(0.5, BUSY)
    assert not cores.update() and cores.free is None
    machine.pass_time(0.5, BUSY)
    assert cores.update() and cores.free == 1


@pytest.mark.parametrize("others, expected", [(0, 2), (1, 1), (7, 1)])
def test_after_a_long_pause_the_moment_decides(machine, cores, monkeypatch, others, expected):
    machine.pass_time(100.0, QUIET)
    monkeypatch.setattr(threads, "running_others", lambda: others)
    with FreeThreads(cores=cores):
        assert torch.get_num_threads() == expected


def test_a_container_gives_no_more_than_its_quota(machine, cores, monkeypatch):
    monkeypatch.setattr(threads, "cpu_quota", lambda: 1.5)
    machine.pass_time(2.0, QUIET)
    with FreeThreads(cores=cores):
        assert torch.get_num_threads() == 1


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_a_number_from_the_environment_stays(machine, cores, monkeypatch, name):
    monkeypatch.setenv(name, "2")
    machine.pass_time(2.0, BUSY)
    with FreeThreads(cores=cores) as chosen:
        machine.pass_time(2.0, BUSY)
        chosen.update()
        assert torch.get_num_threads() == 2


def test_a_number_set_by_the_program_stays(machine, cores):
    torch.set_num_threads(3)
    machine.pass_time(2.0, BUSY)
    with FreeThreads(cores=cores):
        assert torch.get_num_threads() == 3


def test_a_number_that_is_given_is_used_whatever_the_load(machine, cores):
    machine.pass_time(2.0, BUSY)
    with FreeThreads(2, cores=cores) as chosen:
        assert (torch.get_num_threads(), chosen.update()) == (2, True)
        machine.pass_time(2.0, BUSY)
        assert (torch.get_num_threads(), chosen.update()) == (2, False)


def test_one_piece_of_work_inside_another_gives_back_its_number(machine, cores):
    machine.pass_time(2.0, BUSY)
    with FreeThreads(cores=cores):
        with FreeThreads(cores=cores):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_the_line_says_what_is_unusual(machine, cores):
    machine.pass_time(2.0, QUIET)
    with FreeThreads(cores=cores) as chosen:
        assert chosen.line(before=0) is None and chosen.line(before=2) is None
        assert chosen.line(before=1) == "2 CPU threads and 1 before; the weights differ by rounding"
    machine.pass_time(2.0, BUSY)
    with FreeThreads(cores=cores) as chosen:
        assert chosen.line(before=0) == "1 of 2 CPU threads, since other programs are computing"


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({}, math.inf),
    ],
)
def test_quota_of_a_container_is_read(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == expected


@pytest.mark.parametrize("running, expected", [(1, 0), (2, 1), (5, 4)])
def test_a_machine_is_quiet_where_only_this_thread_runs(tmp_path, running, expected):
    stat = tmp_path / "stat"
    stat.write_text(f"cpu  1 2 3\nprocs_running {running}\nprocs_blocked 0\n")
    assert running_others(stat) == expected
    assert running_others(tmp_path / "none") == 0


def test_core_times_of_this_system_are_read():
    times = threads.read_core_times()
    assert times.every > 0 and times.own > 0


def test_overlapping_work_leaves_the_number_that_was_before(machine, cores):
    """Two pieces of work, as in two threads of a server; the first one ends first."""
    machine.pass_time(2.0, BUSY)
    entered, ended = Event(), Event()
    numbers = []

    def first() -> None:
        with FreeThreads(cores=cores):
            entered.set()
            ended.wait(10)
        numbers.append(torch.get_num_threads())

    other = Thread(target=first)
    other.start()
    entered.wait(10)
    with FreeThreads(cores=cores) as second:
        assert torch.get_num_threads() == 1 and second.most == 2 and second.adapts
        ended.set()
        other.join()
    assert numbers == [2] and torch.get_num_threads() == 2
