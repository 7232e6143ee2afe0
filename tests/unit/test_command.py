"""The command under `sidestep run`: how it is found, what it hears, what its end is called."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sidestepd.command import Command, Signals, check
from sidestepd.errors import CanNotRun

WAIT_S = 30.0
SAY_FIRST_SIGNAL = """
import signal, sys
both = [signal.SIGINT, signal.SIGTERM]
signal.pthread_sigmask(signal.SIG_BLOCK, both)
open(sys.argv[1], "w").close()
sys.exit(signal.sigwait(both))
"""


@pytest.fixture
def signals():
    with Signals() as signals:
        yield signals


def listening(folder: Path, *, in_foreground: bool) -> Command:
    """A command whose exit code is the lowest of the signals that reached it."""
    ready = folder / "ready"
    command = Command(
        [sys.executable, "-c", SAY_FIRST_SIGNAL, str(ready)], os.environ, in_foreground=in_foreground
    )
    with Signals() as pause:
        wait_for(ready.exists, pause)
    return command


def wait_for(condition: Callable[[], object], pause: Signals) -> None:
    for _ in range(int(WAIT_S / 0.02)):
        if condition():
            return
        pause.wait(0.02)
    raise AssertionError("waited in vain")


def exit_code(command: Command) -> int | None:
    with Signals() as pause:
        wait_for(lambda: command.exit_code is not None, pause)
    return command.exit_code


class TestPassingOn:
    def test_what_is_typed_in_a_terminal_reaches_the_command_by_itself(self, tmp_path):
        command = listening(tmp_path, in_foreground=True)

        command.pass_on(signal.SIGINT)
        command.pass_on(signal.SIGTERM)

        assert signal.SIGTERM == exit_code(command)

    def test_without_a_terminal_an_interrupt_is_passed_on(self, tmp_path):
        command = listening(tmp_path, in_foreground=False)

        command.pass_on(signal.SIGINT)

        assert signal.SIGINT == exit_code(command)

    def test_a_command_that_is_gone_is_no_error(self, tmp_path):
        command = Command(["true"], os.environ, in_foreground=False)
        assert 0 == exit_code(command)

        command.pass_on(signal.SIGTERM)


class TestSignals:
    def test_one_that_comes_ends_nothing_and_is_returned(self, signals):
        os.kill(os.getpid(), signal.SIGTERM)

        assert [signal.SIGTERM] == signals.wait(WAIT_S)

    def test_the_end_of_a_child_ends_the_waiting(self, signals):
        Command(["true"], os.environ, in_foreground=False)

        assert [] == signals.wait(WAIT_S)

    def test_one_that_our_caller_ignores_stays_ignored(self):
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with Signals():
                found = signal.getsignal(signal.SIGHUP)
        finally:
            signal.signal(signal.SIGHUP, before)

        assert signal.SIG_IGN == found

    def test_afterwards_they_do_what_they_did(self):
        before = signal.getsignal(signal.SIGTERM)

        with Signals():
            pass

        assert before == signal.getsignal(signal.SIGTERM)


class TestFinding:
    def test_a_command_on_the_path_is_found(self):
        assert check(["true"], os.environ) is None

    @pytest.mark.parametrize(
        ("word", "code"), [("no-such-command", 127), ("./no/such/file", 127), ("/etc/passwd", 126)]
    )
    def test_one_that_can_not_run_has_the_exit_code_of_a_shell(self, word, code):
        with pytest.raises(CanNotRun) as caught:
            check([word], os.environ)

        assert code == caught.value.exit_code

    def test_the_end_by_a_signal_is_told_as_a_shell_does(self):
        command = Command(["sh", "-c", "kill -9 $$"], os.environ, in_foreground=False)

        assert 128 + signal.SIGKILL == exit_code(command)
