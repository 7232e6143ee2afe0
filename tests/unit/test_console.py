"""What a program prints: where it went before, and in the run."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
import uuid
from collections.abc import Iterator

import pytest

import sidestep
from sidestep.console import BURST_BYTES, BYTES_PER_S, Console
from sidestep.outbox import DropReason
from sidestep.testing import FakeDaemon, environment
from sidestep.wire import Kind
from tests.support.waiting import eventually


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    with FakeDaemon(run={"id": uuid.uuid4().hex, "mode": "offline"}) as served:
        for name, value in environment(served, {}).items():
            monkeypatch.setenv(name, value)
        yield served
        sidestep.finish()


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.TextIOWrapper:
    """What `on` makes standard output, into memory; pytest puts its own there between setup and call."""
    monkeypatch.setenv("SIDESTEP_CONSOLE", "1")
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)


@contextlib.contextmanager
def on(screen: io.TextIOWrapper | None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "stdout", screen)
        yield


def shown(screen: io.TextIOWrapper) -> str:
    assert isinstance(screen.buffer, io.BytesIO)
    return screen.buffer.getvalue().decode()


def lines(daemon: FakeDaemon, stream: str = "stdout") -> list[str]:
    said = [it.data for it in daemon.records if it.kind is Kind.OUTPUT]
    return [line for it in said if it["stream"] == stream for line in it["text"].split("\n")]


class TestPrinting:
    def test_lines_are_on_the_screen_and_in_the_run(self, daemon: FakeDaemon, screen: io.TextIOWrapper):
        with on(screen), sidestep.init() as run:
            print("epoch", 1)
            print("a\nb", end="")
            sys.stdout.writelines(["c\n", "d"])
            assert run.flush()

        assert "epoch 1\na\nbc\nd" == shown(screen)
        assert ["epoch 1", "a", "bc", "d"] == lines(daemon)

    def test_both_streams_are_told_apart(self, daemon: FakeDaemon, screen: io.TextIOWrapper):
        with on(screen), sidestep.init():
            print("out")
            print("err", file=sys.stderr)

        assert (["out"], ["err"]) == (lines(daemon), lines(daemon, "stderr"))

    def test_a_progress_bar_is_one_line(self, daemon: FakeDaemon, screen: io.TextIOWrapper):
        with on(screen), sidestep.init():
            for percent in range(0, 101, 10):
                sys.stdout.write(f"\r\x1b[K{percent:3}%")
            sys.stdout.write("\n")
            sys.stdout.write("\x1b[31mred\x1b[0m\r\n")

        assert ["100%", "\x1b[31mred\x1b[0m"] == lines(daemon)

    def test_threads_do_not_cut_each_others_lines(self, daemon: FakeDaemon, screen: io.TextIOWrapper):
        def speak(word: str) -> None:
            for _ in range(50):
                for letter in word:
                    sys.stdout.write(letter)
                sys.stdout.write("\n")

        with on(screen), sidestep.init():
            threads = [threading.Thread(target=speak, args=(word,)) for word in ("aaaa", "bbbb")]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        assert {"aaaa": 50, "bbbb": 50} == {word: lines(daemon).count(word) for word in set(lines(daemon))}

    def test_what_the_stream_raises_is_the_programs(self, daemon: FakeDaemon, screen: io.TextIOWrapper):
        with on(screen), sidestep.init() as run:
            with pytest.raises(TypeError):
                sys.stdout.write(7)  # type: ignore[arg-type]
            screen.detach()
            with pytest.raises(ValueError, match="detached"):
                print("nobody sees it")
            assert 0 == sum(run.stats().dropped.values())

        assert [] == lines(daemon)

    def test_after_finish_the_stream_is_as_it_was(self, daemon: FakeDaemon, screen: io.TextIOWrapper):
        before = dict(vars(screen))
        with on(screen):
            with sidestep.init():
                assert before != dict(vars(screen))
            print("later")

        assert (before, []) == (dict(vars(screen)), lines(daemon))

    @pytest.mark.parametrize("off", ["setting", "WANDB_CONSOLE", "SIDESTEP_CONSOLE"])
    def test_it_can_be_switched_off(
        self, daemon: FakeDaemon, screen: io.TextIOWrapper, off: str, monkeypatch: pytest.MonkeyPatch
    ):
        if off != "setting":
            monkeypatch.setenv(off, "off")
        with on(screen), sidestep.init(settings={"console": "off"} if off == "setting" else None):
            print("unheard")

        assert [] == lines(daemon)

    def test_a_program_without_a_console_logs(self, daemon: FakeDaemon, screen: io.TextIOWrapper):
        with on(None), sidestep.init() as run:
            run.log({"loss": 1.0})

        assert [{"loss": 1.0}] == [it.data for it in daemon.records]


class TestBounds:
    @pytest.fixture
    def run(self, daemon: FakeDaemon) -> sidestep.Run:
        return sidestep.init()

    def test_more_than_the_rate_is_counted_and_the_log_says_where(self, daemon: FakeDaemon, run: sidestep.Run):
        now = [0.0]
        console = Console(run, clock=lambda: now[0])
        most = BURST_BYTES // (64 + 1000)

        for _ in range(most + 7):
            console._hear("stdout", "x" * 1000 + "\n")
        now[0] += 2 * (64 + 1000) / BYTES_PER_S
        console._hear("stdout", "after\n")
        assert run.flush()

        assert {DropReason.OUTPUT.value: 7} == run.stats().dropped
        assert ["[sidestep: 7 lines are left out here]", "after"] == lines(daemon)[-2:]
        assert most + 2 == len(lines(daemon))

    def test_metrics_keep_half_of_the_outbox(self, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("SIDESTEP_OUTBOX_BYTES", str(1024 * 1024))
        run = sidestep.init()
        console = Console(run)

        with daemon.frozen():
            for _ in range(1000):
                console._hear("stdout", "x" * 1000 + "\n")
            assert run.stats().dropped["output"] > 0
            run.log({"loss": 1.0})
            assert ["output"] == list(run.stats().dropped)

    def test_a_line_without_end_is_cut(self, daemon: FakeDaemon, run: sidestep.Run):
        console = Console(run)
        for _ in range(100):
            console._hear("stdout", "x" * 1000)
        assert sum(map(len, console._partial.values())) < 6000
        console._hear("stdout", "\n")
        assert run.flush()

        (line,) = lines(daemon)
        assert len(line) <= 4097

    def test_text_that_is_no_unicode_ends_nothing(self, daemon: FakeDaemon, run: sidestep.Run):
        Console(run)._hear("stdout", "\udcff\n")
        assert run.flush()

        assert ["?"] == lines(daemon)


class TestForks:
    def test_a_child_that_only_prints_is_no_session(self, daemon: FakeDaemon, screen: io.TextIOWrapper):
        with on(screen), sidestep.init() as run:
            print("parent")
            if (pid := os.fork()) == 0:
                print("child")
                os._exit(0)
            assert (pid, 0) == os.waitpid(pid, 0)
            assert run.flush()

        assert (["parent"], 1) == (lines(daemon), len(daemon.sessions))

    def test_a_child_that_logs_is_heard_from_then_on(self, daemon: FakeDaemon, screen: io.TextIOWrapper):
        run = sidestep.init()
        if (pid := os.fork()) == 0:
            code = 1
            try:
                run.log({"loss": 1.0})
                print("child")
                run.finish()
                code = 0
            finally:
                os._exit(code)
        assert (pid, 0) == os.waitpid(pid, 0)

        eventually(lambda: ["child"] == lines(daemon), 10, lambda: str(daemon.records))
