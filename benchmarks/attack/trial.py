"""Tries hostile inputs in processes of their own, and says what each one did. Knows no kind of
input.

An input is right where it works, or is refused by an error that commands show as it is
(`ValueError`, `OSError`). Everything else is a finding.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

MIB = 2048
"""Memory that a process may take, with torch and all libraries in it."""
_BLOCK = 250
"""Inputs per process. Its largest memory is that of all of them."""
_IDLE = 18
"""Hangs that use no processor are waited for so many times as long, as the machine may be busy."""
FORGED = "FORGED"
"""Hostile texts hold it after a line end. A line of a message must not begin with it."""
MODULE = "this"
"""A module that hostile inputs name, and nothing else imports."""
CANARY = "CANARY"
"""What files outside of the inputs hold. It must not be read."""


@dataclass(frozen=True)
class Input:
    """A hostile input that was written to a folder.

    Attributes:
        name: what it is.
        use: what a command does with it; may write to `out` next to the folder. Returns the
            texts that were read.
        names: whether it may name any file as an image, as tables may (docs/data.md).
    """

    name: str
    use: Callable[[], Sequence[str]]
    names: bool = False


Make = Callable[[random.Random, Path], Input]
"""Writes an input to a folder."""


@dataclass(frozen=True)
class Result:
    """What an input did: `works`, `refused`, or a finding."""

    name: str
    outcome: str
    message: str = ""

    @property
    def is_finding(self) -> bool:
        return self.outcome not in ("works", "refused")


class Hang(BaseException):
    """Takes too long. No `Exception`, so that no reader takes it for a damaged file."""


def results(
    kind: str, make: Make, numbers: Sequence[int], seed: int, seconds: float
) -> Iterator[Result]:
    """The result of each numbered input of a kind.

    Args:
        seconds: processor time that an input may take.
    """
    fork = multiprocessing.get_context("fork")
    left = list(numbers)
    while left:
        ours, theirs = fork.Pipe(duplex=False)
        work = fork.Process(target=_work, args=(kind, make, left[:_BLOCK], seed, seconds, theirs))
        work.start()
        theirs.close()
        for number in left[:_BLOCK]:
            result = _received(ours, 2 * _IDLE * seconds)
            left.remove(number)
            yield Result(f"{kind} {number}: {result.name}", result.outcome, result.message)
            if result.is_finding:  # its process may be spoiled
                break
        work.kill()
        work.join()
        ours.close()


def _received(connection: Connection, seconds: float) -> Result:
    try:
        if not connection.poll(seconds):
            return Result("", "hang in native code")
        result: Result = connection.recv()
    except EOFError:
        return Result("", "abort")
    return result


def _work(
    kind: str, make: Make, numbers: Sequence[int], seed: int, seconds: float, connection: Connection
) -> None:
    """Tries inputs one after another, in this process."""
    for descriptor in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
    resource.setrlimit(resource.RLIMIT_DATA, (2**34, 2**34))  # not the whole machine's
    signal.signal(signal.SIGALRM, _stop)
    signal.signal(signal.SIGPROF, _stop)
    watch = Watch()
    sys.addaudithook(watch)
    for number in numbers:
        with tempfile.TemporaryDirectory(prefix="attack") as scratch:
            chance = random.Random(f"{seed} {kind} {number}")
            connection.send(attempt(make, chance, Path(scratch), seconds, watch))


def attempt(
    make: Make, chance: random.Random, scratch: Path, seconds: float, watch: Watch
) -> Result:
    """Makes one input in a folder, uses it, and says what happened."""
    for name in ("data", "out", "tmp", "outside"):
        (scratch / name).mkdir()
    (scratch / "outside" / "secret.txt").write_text(CANARY)
    (scratch / "outside" / "secret.csv").write_text(f"image,text\n0.png,{CANARY}\n")
    (scratch / "outside" / "named.txt").write_text(CANARY)
    given = make(chance, scratch / "data")
    before = _listing(scratch)
    message = ""
    watch.begin(scratch, names=given.names)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, _IDLE * seconds)
    try:
        try:
            texts = given.use()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
        outcome = f"read {CANARY}" if any(CANARY in text for text in texts) else "works"
    except Hang:
        outcome = "hang"
    except (ValueError, OSError) as error:
        message = str(error)
        forged = any(line.startswith(FORGED) for line in message.split("\n"))
        outcome = "forged line" if forged or not message else "refused"
    except BaseException as error:  # what is looked for
        outcome = f"traceback {type(error).__name__}"
        message = str(error)
    if seen := watch.end():
        outcome, message = "outside", seen
    elif _listing(scratch) != before:
        outcome = "wrote"
    elif resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > MIB * 1024:
        outcome = "memory"
    for folder, _, _ in os.walk(scratch):
        os.chmod(folder, 0o700)  # or it could not be removed
    shutil.rmtree(scratch / "data")
    return Result(given.name, outcome, message[:500])


def _stop(*_: object) -> None:
    raise Hang


def _listing(scratch: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file that may not change."""
    return {
        str(path): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for name in ("data", "outside")
        for path in (scratch / name).rglob("*")
    }


class Watch:
    """An audit hook that remembers the first file opened outside of an input, other programs
    started, and connections."""

    _CODE = tuple({sys.prefix, sys.base_prefix, str(Path(__file__).parents[2]), "/usr", "/proc"})
    _SYSTEM = ("/sys", "/dev/null", "/dev/urandom", "/etc/localtime", "/etc/mime.types")
    _NEVER = ("subprocess.Popen", "os.system", "os.exec", "socket.connect", "socket.getaddrinfo")

    def __init__(self) -> None:
        self._allowed: tuple[str, ...] | None = None
        self._names = False
        self._seen = ""

    def begin(self, scratch: Path, *, names: bool = False) -> None:
        """Watches from now on. What lies in the folder may be opened, `outside` excepted, and where
        the input `names` files, those that it can name."""
        self._seen = ""
        real = os.path.realpath(scratch)
        tempfile.tempdir = f"{real}/tmp"
        shared = os.path.dirname(os.environ["HF_HOME"])  # the small bundles, and a cache
        own = (f"{real}/data", f"{real}/out", f"{real}/tmp", shared, *self._CODE)
        near = (f"{real}/outside/named.txt", f"{real}/outside/secret.txt")
        named = (*near, "/etc/passwd", "/dev/zero") if names else ()
        self._names = names
        self._allowed = (*named, *(f"{folder}/" for folder in own), *self._SYSTEM)

    def end(self) -> str:
        """What was seen; '' where nothing was."""
        self._allowed = None
        tempfile.tempdir = None
        return self._seen

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if self._allowed is None or self._seen:
            return
        if event in self._NEVER or (event == "import" and arguments[0] == MODULE):
            self._seen = f"{event} {arguments!r}"
        elif event in ("open", "os.remove", "os.rename", "os.mkdir") and isinstance(
            arguments[0], str | bytes | os.PathLike
        ):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not f"{path}/".startswith(self._allowed) or (
                path.endswith("/environ") and not self._names
            ):
                self._seen = f"{event} {path}"
