"""Locks, parents, small files and recorded processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from sidestepd.errors import AlreadyRunning
from sidestepd.processes import Lock, kill_recorded, read_json, write_json
from tests.support.waiting import eventually

HOLDER = """
import sys, time
from pathlib import Path
from sidestepd.processes import Lock
lock = Lock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""
PARENT = """
import os, subprocess, sys, time
child = "from sidestepd.processes import die_with_parent; import time; die_with_parent({}); time.sleep(600)"
child = child.format(sys.argv[1] if len(sys.argv) > 1 else os.getpid())
print(subprocess.Popen([sys.executable, "-c", child]).pid, flush=True)
time.sleep(600)
"""


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])


def record_of(pid: int) -> dict[str, float]:
    return {"pid": pid, "started": psutil.Process(pid).create_time()}


class TestLock:
    def test_is_held_once(self, tmp_path: Path):
        Lock(tmp_path / "lock").acquire()

        with pytest.raises(AlreadyRunning, match="lock"):
            Lock(tmp_path / "lock").acquire()

    def test_is_free_until_it_is_held(self, tmp_path: Path):
        path = tmp_path / "lock"
        assert Lock.is_free(path)
        lock = Lock(path)
        assert Lock.is_free(path)

        lock.acquire()

        assert not Lock.is_free(path)

    def test_looking_at_it_makes_no_file(self, tmp_path: Path):
        assert Lock.is_free(tmp_path / "lock")

        assert list(tmp_path.iterdir()) == []

    def test_ends_with_its_holder_however_that_ends(self, tmp_path: Path):
        holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "lock")], stdout=subprocess.PIPE)
        with holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            assert not Lock.is_free(tmp_path / "lock")

            holder.kill()

        assert Lock.is_free(tmp_path / "lock")

    def test_is_not_inherited(self, tmp_path: Path):
        """Else a wandb-core would hold the lock of the delivery that was killed."""
        lock = Lock(tmp_path / "lock")

        assert not os.get_inheritable(lock._descriptor)


class TestDieWithParent:
    def test_a_child_is_killed_when_its_parent_is(self):
        with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
            assert parent.stdout is not None
            child = psutil.Process(int(parent.stdout.readline()))
            parent.kill()

        eventually(lambda: not child.is_running() or child.status() == "zombie", 30, "the child lives on")

    def test_a_child_whose_parent_is_gone_already_ends_at_once(self):
        with subprocess.Popen([sys.executable, "-c", PARENT, "1"], stdout=subprocess.PIPE) as parent:
            assert parent.stdout is not None
            child = psutil.Process(int(parent.stdout.readline()))
            eventually(lambda: child.status() == "zombie", 30, "the child lives on")
            parent.kill()


class TestSmallFiles:
    def test_are_read_as_they_were_written(self, tmp_path: Path):
        write_json(tmp_path / "a.json", {"id": "ä", "core": None})

        assert {"id": "ä", "core": None} == read_json(tmp_path / "a.json")
        assert ["a.json"] == [path.name for path in tmp_path.iterdir()]

    def test_that_are_not_there_say_nothing(self, tmp_path: Path):
        assert read_json(tmp_path / "a.json") == {}

    @pytest.mark.parametrize("content", [b"", b'{"core": ', b"\xff\xfe", b"[1]"])
    def test_that_a_power_failure_left_say_nothing(self, tmp_path: Path, content: bytes):
        """Intake reads what delivery wrote many times a second; it may not die of it, and start, and die."""
        (tmp_path / "a.json").write_bytes(content)

        assert read_json(tmp_path / "a.json") == {}


class TestKillRecorded:
    def test_nothing_recorded_is_gone(self):
        assert kill_recorded(None)
        assert kill_recorded({})

    def test_kills_the_one_that_was_meant(self):
        with sleeper() as process:
            assert not kill_recorded(record_of(process.pid))

            assert process.wait(30) == -signal.SIGKILL
            assert kill_recorded({"pid": process.pid, "started": 0.0})

    def test_a_zombie_is_gone(self):
        with sleeper() as process:
            record = record_of(process.pid)
            process.kill()
            eventually(lambda: psutil.Process(process.pid).status() == "zombie")

            assert kill_recorded(record)

    def test_a_stopped_one_is_killed(self):
        with sleeper() as process:
            process.send_signal(signal.SIGSTOP)
            eventually(lambda: psutil.Process(process.pid).status() == "stopped")

            kill_recorded(record_of(process.pid))

            assert process.wait(30) == -signal.SIGKILL

    def test_leaves_a_stranger_alone_that_got_the_number(self):
        with sleeper() as process:
            record = record_of(process.pid)

            assert kill_recorded({**record, "started": record["started"] - 100})

            assert process.poll() is None
            process.kill()


def test_what_steps_back_comes_after_others_and_is_killed_before_them():
    script = """
import os
from pathlib import Path
from sidestepd.processes import step_back
adjustment = Path("/proc/self/oom_score_adj")
first = os.getpriority(os.PRIO_PROCESS, 0), int(adjustment.read_text())
step_back(3)
print(*first, os.getpriority(os.PRIO_PROCESS, 0), int(adjustment.read_text()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    nice, kills, nicer, kills_first = map(int, done.stdout.split())
    assert (min(nice + 3, 19), max(kills, 500)) == (nicer, kills_first)
