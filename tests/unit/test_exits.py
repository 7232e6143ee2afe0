"""Exits: the end of a process is seen at once, whoever started it, also while nobody has waited for it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sidestep.ranks import pid_namespace
from sidestepd.exits import Exits, Lifeline, is_here
from tests.support.waiting import eventually

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="the kernel has no pidfds")


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def told_of(*processes: subprocess.Popen[bytes], kill: list[int]) -> list[bytes]:
    """In which order the ends of processes are told, when they are killed in this order."""
    told: asyncio.Queue[bytes] = asyncio.Queue()
    exits = Exits(asyncio.get_running_loop(), told.put_nowait)
    for number, process in enumerate(processes):
        exits.follow(bytes([number]), process.pid)
    for number in kill:
        processes[number].kill()
    found = [await asyncio.wait_for(told.get(), 30) for _ in kill]
    for process in processes:
        process.kill()
        process.wait()
    return found


class TestAnEnd:
    def test_is_told_before_anybody_waits_for_the_process(self):
        assert [b"\x01"] == asyncio.run(told_of(sleeper(), sleeper(), kill=[1]))

    def test_of_a_process_that_is_gone_already_is_told_too(self):
        process = sleeper()
        process.kill()
        process.wait()

        assert [b"\x00"] == asyncio.run(told_of(process, kill=[0]))

    def test_is_told_to_who_looks_before_the_loop_comes_to_it(self):
        async def scene() -> list[bytes]:
            dead, alive, told = sleeper(), sleeper(), list[bytes]()
            exits = Exits(asyncio.get_running_loop(), told.append)
            exits.follow(b"dead", dead.pid)
            exits.follow(b"alive", alive.pid)
            dead.kill()
            dead.wait()
            exits.look()
            exits.look()
            found = list(told)
            exits.forget(b"alive")
            alive.kill()
            alive.wait()
            return found

        assert [b"dead"] == asyncio.run(scene())

    def test_of_who_was_forgotten_is_not_told(self):
        async def scene() -> None:
            process, told = sleeper(), []
            exits = Exits(asyncio.get_running_loop(), told.append)
            exits.follow(b"x", process.pid)
            exits.follow(b"x", process.pid)
            before = descriptors()
            exits.forget(b"x")
            exits.forget(b"x")
            assert descriptors() == before - 1
            process.kill()
            process.wait()
            await asyncio.sleep(0)
            assert told == []

        asyncio.run(scene())

    @pytest.mark.parametrize("pid", [0, -5])
    def test_of_no_process_is_not_told(self, pid):
        async def scene() -> None:
            told: list[bytes] = []
            Exits(asyncio.get_running_loop(), told.append).follow(b"x", pid)
            await asyncio.sleep(0)
            assert told == []

        asyncio.run(scene())


class TestHere:
    def test_is_what_this_node_calls_itself(self):
        assert is_here(os.uname().nodename, {})
        assert is_here("cn042", {"SLURMD_NODENAME": "cn042"})
        assert is_here("cn042", {"SIDESTEP_NODE": "cn042"})

    def test_is_no_other_node(self):
        assert not is_here("cn043", {"SLURMD_NODENAME": "cn042"})
        assert not is_here("", {})

    def test_is_not_where_pids_have_other_meanings(self):
        """The containers of a pod have one host name, and pids of their own."""
        here, ours = os.uname().nodename, pid_namespace()

        assert is_here(here, {}, pids=ours)
        assert is_here(here, {}, pids="")
        assert not is_here(here, {}, pids="pid:[1]")


class TestLifeline:
    def test_ends_with_its_process_before_anybody_waited_for_it(self):
        process, before = sleeper(), descriptors()
        lifeline = Lifeline(process.pid)
        assert lifeline.is_alive()

        process.kill()

        eventually(lambda: not lifeline.is_alive(), 30, "it is not seen to end")
        assert descriptors() == before
        process.wait()
        assert not lifeline.is_alive()

    @pytest.mark.parametrize("pid", [0, -1, 2**22 + 1])
    def test_of_nobody_is_none(self, pid: int):
        assert not Lifeline(pid).is_alive()

    def test_is_seen_by_looking_where_the_kernel_has_no_pidfds(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.delattr(os, "pidfd_open")
        process = sleeper()
        lifeline = Lifeline(process.pid)
        assert (None, True) == (lifeline.descriptor, lifeline.is_alive())

        process.kill()

        eventually(lambda: not lifeline.is_alive(), 30, "it is not seen to end")
        process.wait()
