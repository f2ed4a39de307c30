"""Signals during training and outside of it: what is saved, printed and left behind."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from pipeline.cli.main import main
from pipeline.runtime.signals import TrainingInterrupted, catch_signals, interrupts_raise
from pipeline.stages import encode
from pipeline.training import trainer
from pipeline.training.checkpoint import newest_checkpoint
from stage1_tokenizer import TokenizerModule
from tests.helpers.signals import send
from tests.helpers.training import train

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]

SIGNALS = {
    signal.SIGINT: ("Ctrl-C", 130),
    signal.SIGTERM: ("SIGTERM", 143),
    signal.SIGHUP: ("SIGHUP", 129),
}


@pytest.fixture(autouse=True)
def ctrl_c_is_heeded():
    """Shells have what they start in the background ignore Ctrl-C, and Python then leaves it at
    that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("step", [4, 5, 8])
def test_signal_saves_after_the_step_and_resumes_bit_identically(tmp_path, capfd, number, step):
    """Also where an evaluation is due, which may choose the best weights, and in the last step."""
    options = {"save_best": True, "eval_every": 3, "learning_rate": 0.1}
    whole, metrics = train(tmp_path / "whole", **options)
    before = handlers()
    with pytest.raises(
        TrainingInterrupted,
        match=rf"stopped by {SIGNALS[number][0]} after step {step + 1} of 9 \(line\), which is "
        r"saved",
    ) as caught:
        train(tmp_path / "cut", on_step=lambda now: now == step and send(number), **options)
    assert caught.value.status == SIGNALS[number][1] and handlers() == before
    again = "Ctrl-C again" if number == signal.SIGINT else "Ctrl-C"
    assert f"; {again} stops at once, without saving" in capfd.readouterr().err
    assert newest_checkpoint(tmp_path / "cut" / "checkpoints").name == f"step-{step + 1}"
    again, metrics_again = train(tmp_path / "cut", **options)
    assert all(
        torch.equal(v, again.network.state_dict()[k]) for k, v in whole.network.state_dict().items()
    )
    assert metrics == metrics_again


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch, capfd):
    """By the process's end, whatever its threads are waiting for."""
    before = handlers()

    def left(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr("pipeline.runtime.signals.os._exit", left)
    with pytest.raises(SystemExit, match="130"):
        train(tmp_path, on_step=lambda step: step == 5 and send(signal.SIGINT, signal.SIGINT))
    assert newest_checkpoint(tmp_path / "checkpoints").name == "step-4" and handlers() == before
    assert "Ctrl-C: stopping at once, nothing more is saved" in capfd.readouterr().err


def test_repeated_other_signals_are_ignored(tmp_path):
    """`timeout` sends SIGTERM twice, a closed terminal SIGHUP."""
    with pytest.raises(TrainingInterrupted, match="stopped by SIGTERM after step 6"):
        train(
            tmp_path,
            on_step=lambda step: step == 5 and send(signal.SIGTERM, signal.SIGTERM, signal.SIGHUP),
        )


ENDS_AT_ONCE = [
    (signal.SIGINT, signal.SIGINT),
    (signal.SIGTERM, signal.SIGINT),
    (signal.SIGHUP, signal.SIGINT),
    (signal.SIGINT, signal.SIGTERM),
]


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_two_signals_to_a_process_that_saves(tmp_path, first, second):
    """The second one comes while the file is half-written: it ends the process or changes nothing,
    and leaves no torn file."""
    path = tmp_path / "weights"
    path.write_text("old")
    ends = (first, second) in ENDS_AT_ONCE
    with subprocess.Popen(
        [sys.executable, "-c", SAVES, str(path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(first)
        assert process.stdout.readline() == "half-written\n"
        process.send_signal(second)
        process.communicate("" if ends else "go on\n")
    number = second if ends else first
    assert process.returncode == SIGNALS[number][1]
    assert path.read_text() == ("old" if ends else "new")


SAVES = """
import signal, sys, time
from pathlib import Path
from pipeline.runtime.atomic_io import atomic_write
from pipeline.runtime.signals import TrainingInterrupted, catch_signals
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores
with catch_signals() as caught:
    print("ready", flush=True)
    while not caught.number:
        time.sleep(0.01)  # signal.pause would miss a signal that came before it
    with atomic_write(Path(sys.argv[1])) as beside:
        beside.write_text("n")
        print("half-written", flush=True)
        if not sys.stdin.readline():
            sys.exit("the second signal did not end the process")
        beside.write_text("new")
sys.exit(TrainingInterrupted(caught.number).status)
"""


def test_signal_during_the_last_evaluation_is_handled(tmp_path):
    from tests.helpers.training import Line

    class Signalled(Line):
        def evaluate(self, batches):
            send(signal.SIGTERM)
            return super().evaluate(batches)

    with pytest.raises(TrainingInterrupted, match="after step 9 of 9"):
        train(tmp_path, Signalled(), eval_every=100)


def test_training_in_another_thread_installs_no_handlers(tmp_path):
    before, seen = handlers(), []
    thread = threading.Thread(
        target=lambda: seen.append(
            train(tmp_path, on_step=lambda step: seen.append(handlers() == before))
        )
    )
    thread.start()
    thread.join()
    assert seen[:-1] == [True] * 9 and seen[-1][1]["error"] > 0


def test_signal_handlers_are_always_restored():
    before = handlers()
    with pytest.raises(RuntimeError), catch_signals() as caught:
        send(signal.SIGTERM)
        assert caught.number == signal.SIGTERM
        raise RuntimeError
    with pytest.raises(TrainingInterrupted), interrupts_raise(str):
        send(signal.SIGTERM)
    assert handlers() == before


@pytest.mark.parametrize("number", SIGNALS)
def test_interruption_message_names_the_command_to_resume(
    tiny_yaml, tmp_path, monkeypatch, capsys, number
):
    seed = trainer.step_seed
    monkeypatch.setattr(
        trainer,
        "step_seed",
        lambda base, step, process: (step == 3 and send(number), seed(base, step, process))[1],
    )
    arguments = ["train-tokenizer", "--config", str(tiny_yaml), "--name", "my run"]
    assert main(arguments) == SIGNALS[number][1]
    line = next(
        line for line in capsys.readouterr().err.splitlines() if line.startswith("minidalle")
    )
    text = (
        f"minidalle train-tokenizer: stopped by {SIGNALS[number][0]} after step 4 of 6 "
        "(tokenizer), which is saved; to resume: "
    )
    assert line.startswith(text) and "--name 'my run'" in line
    monkeypatch.setattr(trainer, "step_seed", seed)
    command = shlex.split(line.removeprefix(text))
    assert command == ["minidalle", *arguments] and main(command[1:]) == 0
    assert "resuming from" in capsys.readouterr().out
    assert main([*arguments, "--name", "whole"]) == 0
    one, two = (
        TokenizerModule.from_pretrained(tmp_path / "runs" / name / "tokenizer").fingerprint
        for name in ("my run", "whole")
    )
    assert one == two and not list((tmp_path / "runs").glob("*/.lock"))


def test_signals_outside_training_exit_with_one_line(finished_run, tmp_path, monkeypatch, capsys):
    path, folder = finished_run
    before = handlers()
    for number, (name, status) in SIGNALS.items():
        monkeypatch.setattr(encode, "_encoded", lambda *_, number=number: send(number))
        arguments = [
            "encode",
            "--config",
            str(path),
            "--tokenizer",
            str(folder / "tokenizer"),
            "--out",
            str(tmp_path / "codes"),
        ]
        assert main(arguments) == status
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert (
            line == f"minidalle encode: stopped by {name}; to resume: "
            f"{shlex.join(['minidalle', *arguments])}"
        )
        monkeypatch.setattr(
            "pipeline.inference.generate.generate", lambda *_, number=number, **__: send(number)
        )
        assert (
            main(
                ["generate", "--bundle", str(folder / "bundle"), "x", "--out", str(tmp_path / "y")]
            )
            == status
        )
        assert capsys.readouterr().err == f"minidalle generate: stopped by {name}\n"
    assert handlers() == before and not Path(tmp_path / "codes").exists()


def test_an_ignored_sighup_stays_ignored():
    """As nohup asks for."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupts_raise(str), catch_signals() as caught:
            send(signal.SIGHUP)
        assert caught.number == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("second", [signal.SIGHUP, signal.SIGTERM])
def test_a_second_signal_does_not_interrupt_the_clean_up(tmp_path, second):
    """The kernel sends one and the shell another."""
    with pytest.raises(TrainingInterrupted), interrupts_raise(str):
        try:
            send(signal.SIGHUP)
        finally:
            send(second)
            (tmp_path / "done").touch()
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize(("first", "second"), ENDS_AT_ONCE)
def test_a_second_request_ends_the_clean_up(monkeypatch, capfd, first, second):
    """Threads that are waited for may take long."""

    def left(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr("pipeline.runtime.signals.os._exit", left)
    name, status = SIGNALS[second]
    with pytest.raises(SystemExit, match=str(status)), interrupts_raise(str):
        try:
            send(first)
        finally:
            send(second)
    assert capfd.readouterr().err == f"stopped by {name}\n"


def test_a_signal_is_said_where_the_terminal_is_gone(tmp_path):
    """Its lines are lost, and the step is saved all the same."""
    stderr = os.dup(2)
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 2)
    try:
        with pytest.raises(TrainingInterrupted, match="after step 6 of 9"):
            train(tmp_path, on_step=lambda step: step == 5 and send(signal.SIGHUP))
    finally:
        os.dup2(stderr, 2)
        os.close(write)
        os.close(stderr)
    assert newest_checkpoint(tmp_path / "checkpoints").name == "step-6"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_during_imports_ends_with_one_line(number):
    """Modules may turn an exception into an error of their own, or lose it, as here."""
    done = _python(
        SENDS.format(module="pipeline.inference.generate", number=number.value)
        + "from pipeline.cli import main\n"
        "sys.exit(main(['generate', '--bundle', 'x', 'a red heart']))"
    )
    name, status = SIGNALS[number]
    assert (done.returncode, done.stderr) == (status, f"minidalle generate: stopped by {name}\n")


def test_ctrl_c_while_the_command_line_is_imported_ends_with_one_line():
    script = SENDS.format(module="pipeline.cli.commands", number=2) + "import pipeline.cli"
    done = _python(script)
    assert (done.returncode, done.stderr) == (130, "minidalle: stopped by Ctrl-C\n")


SENDS = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Sends:
    def find_spec(self, name, *_):
        try:
            if name == "{module}":
                signal.raise_signal({number})
        except BaseException:
            pass
sys.meta_path.insert(0, Sends())
"""


def _python(script: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
