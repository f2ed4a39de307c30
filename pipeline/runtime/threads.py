"""How many threads torch computes with on a CPU: at most as many as other programs leave cores.
Knows cores and times; nothing of what is computed.

The threads of an operation wait for one another. Where one of them finds its core taken, all wait
for its next time slice, some milliseconds. Sampling an image has thousands of operations, so that
two threads on two cores, one of them busy, are many times slower than one thread.
"""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch

_NAMED = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables by which a user chooses the number of threads."""
_BUSY = ("user", "nice", "system", "irq", "softirq", "steal")
"""Times of a core that are not idle; which of them there are differs by system."""
_TOLERANCE = 0.1
"""Fraction of a core that others may use while it counts as free."""


@dataclass(frozen=True)
class CoreTimes:
    """Seconds of computing so far, summed over the cores that this process may use."""

    every: float
    """By all programs."""
    own: float
    """By this process."""


def usable_cores() -> list[int]:
    """Numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def read_core_times() -> CoreTimes:
    """The times of now. Where the system tells none, other programs seem to compute nothing."""
    try:
        times = psutil.cpu_times(percpu=True)
    except OSError:
        return CoreTimes(0.0, 0.0)
    used = [times[core] for core in usable_cores() if core < len(times)]
    busy = sum(getattr(core, name, 0.0) for core in used for name in _BUSY)
    return CoreTimes(busy, time.process_time())


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Cores' worth of time that a container allows this process; infinite without a limit."""
    try:
        if (file := root / "cpu.max").is_file():  # cgroup v2: "max 100000" or "150000 100000"
            limit, period = file.read_text().split()
        else:
            limit = (root / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu/cpu.cfs_period_us").read_text()
        return math.inf if limit in ("max", "-1") else int(limit) / int(period)
    except (OSError, ValueError):
        return math.inf


def running_others(stat: Path = Path("/proc/stat")) -> int:
    """How many threads besides the calling one compute at this moment; 0 where the system does not
    tell (Linux does)."""
    fewest = math.inf
    for attempt in range(3):  # what runs for less than 20 ms does not count
        if attempt:
            time.sleep(0.01)
        try:
            running = re.search(r"^procs_running (\d+)", stat.read_text(), re.MULTILINE)
        except OSError:
            return 0
        fewest = min(fewest, max(int(running[1]) - 1, 0) if running else 0)
        if not fewest:
            break
    return int(fewest)


def is_chosen(threads: int) -> bool:
    """Whether the user chose this number of threads: by the environment, or by a call of
    `torch.set_num_threads` with another number than torch's own."""
    if any(name in os.environ for name in _NAMED):
        return True
    usable = len(usable_cores())
    physical = psutil.cpu_count(logical=False) or usable
    return threads not in (usable, min(physical, usable))


class FreeCores:
    """Cores that other programs left free lately."""

    WINDOW = 1.0
    """Seconds that a reading covers at least."""
    STALE = 30.0
    """Seconds above which a mean says nothing about now."""

    def __init__(
        self,
        read: Callable[[], CoreTimes] = read_core_times,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._read = read
        self._clock = clock
        self._before = read()
        self._at = clock()
        self.free: float | None = None
        """Of the last reading; None before the first one, and where it is stale."""

    def update(self) -> bool:
        """Takes a reading if the last one is long enough ago; returns whether it did."""
        now = self._clock()
        seconds = now - self._at
        if seconds < self.WINDOW:
            return False
        times = self._read()
        others = (times.every - self._before.every) - (times.own - self._before.own)
        stale = seconds > self.STALE
        self.free = None if stale else len(usable_cores()) - max(others, 0.0) / seconds
        self._before = times
        self._at = now
        return True


_CORES = FreeCores()
_lock = threading.Lock()
_active: list[FreeThreads] = []
"""Those that are entered, in any Python thread of this process."""


class FreeThreads:
    """A context manager, within which torch computes with at most as many threads as cores are
    free. Afterwards torch has the number that it had before.

    A number that the user chose stays as it is (see `is_chosen`).

    Args:
        threads: `auto`, or the number to compute with.
        adapts: whether `auto` follows what is free; else it leaves the number as it is.
        agreeing: successive readings that must agree before `update` changes the number.
        spare: threads fewer than that, where other threads of this process need a core each. All
            threads of torch wait for the slowest at each operation.
        cores: what is free.
    """

    def __init__(
        self,
        threads: int | Literal["auto"] = "auto",
        *,
        adapts: bool = True,
        agreeing: int = 1,
        spare: int = 0,
        cores: FreeCores = _CORES,
    ) -> None:
        self.adapts = adapts and threads == "auto"
        self._threads = threads
        self._agreeing = agreeing
        self._spare = spare
        self._cores = cores
        self.most = 0

    def __enter__(self) -> FreeThreads:
        self._found = torch.get_num_threads()
        self._thread = threading.get_ident()
        with _lock:
            # While another one is entered, torch's number is that one's choice.
            self._whole = self.most = _active[0].most if _active else self._found
            _active.append(self)
            self.adapts = self.adapts and self.most > 1 and not is_chosen(self.most)
            if self.adapts:
                self.most = max(self.most - self._spare, 1)
        if self._threads != "auto":
            torch.set_num_threads(self._threads)
        if self.adapts:
            self._cores.update()
            _set_threads(self._fitting())
        self._is_new = True
        self._differing = 0
        return self

    def __exit__(self, *error: object) -> None:
        with _lock:
            _active.remove(self)
            is_inner = any(other._thread == self._thread for other in _active)
        _set_threads(self._found if is_inner else self._whole)

    def update(self) -> bool:
        """Adapts the number to what is free now, at most once a second. To be called before each
        step of a loop; returns whether the number is new, as it is at the first step."""
        is_new = self._is_new
        self._is_new = False
        if not (self.adapts and self._cores.update()):
            return is_new
        fitting = self._fitting()
        self._differing = self._differing + 1 if fitting != torch.get_num_threads() else 0
        if self._differing < self._agreeing:
            return is_new
        self._differing = 0
        _set_threads(fitting)
        return True

    def line(self, before: int) -> str | None:
        """What is unusual about the number, if anything.

        Args:
            before: the number until now; 0 for none.
        """
        now = torch.get_num_threads()
        why = ", since other programs are computing" if self.adapts and now < self.most else ""
        if before in (0, now):
            return f"{now} of {self.most} CPU threads{why}" if why else None
        return f"{now} CPU threads and {before} before{why}; the weights differ by rounding"

    def _fitting(self) -> int:
        free = self._cores.free
        if free is None:
            free = float(self.most - running_others())
        usable = min(free, cpu_quota())
        return min(max(math.floor(usable + _TOLERANCE), 1), self.most)


def _set_threads(threads: int) -> None:
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@contextmanager
def free_threads() -> Iterator[None]:
    """`FreeThreads` for one piece of work; also a decorator."""
    with FreeThreads():
        yield
