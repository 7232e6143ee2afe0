"""The command line as a user types it, with real processes. The sink is a file: wandb has its own tests."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest
import zmq

from sidestep.wire import Hello, encode
from sidestepd.control import Control
from sidestepd.status import Report, report
from tests.support.waiting import eventually

pytestmark = pytest.mark.e2e

SIDESTEP = [sys.executable, "-m", "sidestep"]
WAIT_S = 60.0
LOG_TEN = """
import sidestep
run = sidestep.init()
for step in range(10):
    run.log({"loss": step})
run.finish()
"""
SLOW_DRAIN = """
import os, signal, subprocess, sidestep
from sidestepd.control import Control
delivery = Control(os.environ["SIDESTEP_ADDRESS"]).ask_status(30)["delivery"]["pid"]
os.kill(delivery, signal.SIGSTOP)
run = sidestep.init()
for step in range(10):
    run.log({"loss": step})
run.finish()
quiet = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
subprocess.Popen(["sh", "-c", f"sleep 3; kill -CONT {delivery}"], start_new_session=True, **quiet)
"""
ANNOUNCE_FIVE_AND_DIE = """
import os, sys, zmq
from sidestep.wire import Hello, decode, encode
socket = zmq.Context().socket(zmq.DEALER)
socket.connect(os.environ["SIDESTEP_ADDRESS"])
socket.send_multipart(encode(Hello(session=bytes(range(16)), offered=5)))
socket.recv_multipart()
os._exit(0)
"""
SAY_SIGNALS = """
import signal, sys, time
count = {"SIGINT": 0, "SIGTERM": 0}
def note(number, frame):
    name = signal.Signals(number).name
    count[name] += 1
    print("got", name, count[name], flush=True)
    if name == "SIGTERM" or count[name] > 1:
        sys.exit(7)
signal.signal(signal.SIGINT, note)
signal.signal(signal.SIGTERM, note)
print("ready", flush=True)
deadline = time.monotonic() + 60
while time.monotonic() < deadline:
    time.sleep(0.05)
"""
SAY_WHO_SIGNALS = """
import signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
print("ready", flush=True)
for number in (1, 2, 3):
    sender = signal.sigwaitinfo([signal.SIGINT]).si_pid
    print(number, "from a process" if sender else "from the terminal", flush=True)
sys.exit(7)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory to stand in, without options from outside."""
    for name in [name for name in os.environ if name.startswith(("SIDESTEP_", "WANDB_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SIDESTEP_SINK_KIND", "jsonl")
    monkeypatch.setenv("SIDESTEP_SAMPLERS_ENABLED", "off")  # they have tests of their own
    monkeypatch.setenv("SIDESTEP_PROGRAM", "0")
    monkeypatch.setenv("SIDESTEP_CONSOLE", "0")
    monkeypatch.chdir(tmp_path)
    with tempfile.TemporaryDirectory(dir="/tmp") as sockets:  # a socket's path has to be short
        monkeypatch.setenv("XDG_RUNTIME_DIR", sockets)
        yield tmp_path


def sidestep(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SIDESTEP, *words], capture_output=True, text=True, timeout=WAIT_S, env=os.environ | environ
    )


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@contextmanager
def started(*words: str, **environ: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*SIDESTEP, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environ,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            stop_all(process)
        process.communicate()


def only_run(here: Path) -> Report:
    (run_file,) = here.glob("sidestep-runs/*/run.json")
    return report(run_file.parent)


def logged_steps(here: Path) -> list[int]:
    (rows,) = here.glob("sidestep-runs/*/rows.jsonl")
    lines = map(json.loads, rows.read_text().splitlines())
    return [line["global_step"] for line in lines if "global_step" in line]


class TestHelp:
    def test_the_version_is_that_of_the_package(self):
        shown = sidestep("--version")

        assert re.fullmatch(r"sidestep, version \d+\.\d+\.\d+\n", shown.stdout)

    def test_it_teaches_by_an_example(self):
        shown = sidestep("--help")

        assert "sidestep run -- torchrun --nproc-per-node 4 train.py" in shown.stdout

    def test_that_of_run_tells_exit_codes_and_environment(self):
        shown = sidestep("run", "--help").stdout

        told = ("Exit codes:", "127  there is no CMD", " 75  ", "SIDESTEP_ADDRESS", "WANDB_PROJECT", "--patience")
        assert told == tuple(part for part in told if part in shown)


class TestBadOptions:
    @pytest.mark.parametrize(
        ("words", "complaint"),
        [
            (
                ["--patience", "-1"],
                "sidestep: order.patience_s = -1 (from --patience): must be greater than 0\n",
            ),
            (
                ["--set", "order.lease_s=soon"],
                "sidestep: order.lease_s = soon (from --set order.lease_s): must be a valid number, "
                "unable to parse string as a number\n",
            ),
        ],
    )
    def test_one_names_its_source_and_nothing_is_made(self, here, words, complaint):
        ended = sidestep("run", *words, "--", "true")

        assert (2, complaint) == (ended.returncode, ended.stderr)
        assert [] == list(here.iterdir())

    def test_an_option_that_nobody_knows_is_refused(self, here):
        assert 2 == sidestep("run", "--set", "order.patients_s=1", "--", "true").returncode

    def test_run_without_a_command_is_refused(self, here):
        assert 2 == sidestep("run").returncode

    def test_an_address_that_others_could_reach_is_refused(self, here):
        ended = sidestep("serve", "--address", "tcp://0.0.0.0:5555")

        assert 2 == ended.returncode
        assert "--listen lets in other nodes, with keys" in ended.stderr

    def test_a_run_that_is_taken_up_keeps_the_options_it_began_with(self, here):
        sidestep("run", "--id", "mine", "--", "true")

        ended = sidestep("serve", only_run(here).run.dir, "--patience", "1")

        assert 2 == ended.returncode
        assert "--patience" in ended.stderr


class TestCommand:
    def test_its_exit_code_is_ours(self, here):
        assert 3 == sidestep("run", "--", "sh", "-c", "exit 3").returncode
        assert 3 == only_run(here).run.exit_code

    def test_one_that_a_signal_ended_has_the_code_of_a_shell(self, here):
        assert 137 == sidestep("run", "--", "sh", "-c", "kill -9 $$").returncode

    def test_one_that_is_not_there_is_said_and_nothing_is_made(self, here):
        ended = sidestep("run", "--", "no-such-command")

        assert (127, "sidestep: no-such-command: no such command\n") == (ended.returncode, ended.stderr)
        assert [] == list(here.iterdir())

    def test_one_that_can_not_be_executed_is_said(self, here):
        (here / "notes.txt").write_text("no program")

        ended = sidestep("run", "--", "./notes.txt")

        assert (126, "sidestep: ./notes.txt is not executable\n") == (ended.returncode, ended.stderr)

    def test_one_that_the_kernel_refuses_ends_its_run(self, here):
        broken = here / "broken"
        broken.write_bytes(b"\x00\x01\x02")
        broken.chmod(0o755)

        ended = sidestep("run", "--", "./broken")

        assert 126 == ended.returncode
        assert "finished" == only_run(here).state

    def test_its_options_are_its_own(self, here):
        shown = sidestep("run", "--", "echo", "--name", "x")

        assert "--name x\n" == shown.stdout

    def test_without_a_daemon_it_runs_all_the_same(self, here):
        shown = sidestep("run", "--mode", "disabled", "--", "sh", "-c", "echo $SIDESTEP_MODE; exit 4")

        assert (4, "disabled\n") == (shown.returncode, shown.stdout)
        assert [] == list(here.iterdir())


class TestWhatIsSaid:
    def test_in_a_pipe_nothing_but_what_the_command_says(self, here):
        ended = sidestep("run", "--", *python(LOG_TEN + "print('hello')"))

        assert ("hello\n", "") == (ended.stdout, ended.stderr)

    @pytest.mark.nightly
    def test_a_run_that_was_started_without_any_stream_runs_its_command(self, here):
        words = " ".join([*SIDESTEP, "run", "--", "sh", "-c", "'exit 5'"])

        ended = subprocess.run(["sh", "-c", f"exec {words} <&- >&- 2>&-"], timeout=WAIT_S, check=False)

        assert (5, "finished") == (ended.returncode, only_run(here).state)

    def test_a_loss_is_said_in_a_pipe_too(self, here):
        ended = sidestep("run", "--", *python(ANNOUNCE_FIVE_AND_DIE))

        assert ended.stderr.startswith(
            "sidestep: not in the run: 5 and whatever else 1 worker that ended without a word"
        )
        assert 1 == len(ended.stderr.splitlines())

    def test_in_a_terminal_where_the_run_is_and_what_it_holds(self, here):
        code, shown = in_terminal("run", "--id", "run4you", "--", *python(LOG_TEN))

        assert 0 == code
        assert re.search(r"^sidestep: run run4you in sidestep-runs/\d{8}-\d{6}-run4you\r$", shown, re.MULTILINE)
        assert "sidestep: 10 rows of 1 rank: 0 late, 0 dropped, 0 rejected\r\n" in shown

    @pytest.mark.nightly
    def test_a_drain_that_takes_its_time_shows_how_far_it_is_in_a_terminal(self, here):
        code, shown = in_terminal("run", "--", *python(SLOW_DRAIN))

        assert 0 == code
        assert "sidestep: writing the last rows" in shown
        assert "0/10 " in re.sub(r"\x1b\[[0-9;]*m", "", shown)

    @pytest.mark.nightly
    def test_a_drain_that_takes_its_time_is_quiet_in_a_pipe(self, here):
        ended = sidestep("run", "--", *python(SLOW_DRAIN))

        assert (0, "", "") == (ended.returncode, ended.stdout, ended.stderr)


class TestRun:
    def test_what_workers_log_is_in_it_when_the_command_line_returns(self, here):
        sidestep("run", "--", *python(LOG_TEN))

        found = only_run(here)

        assert list(range(10)) == logged_steps(here)
        assert ("finished", 10, True) == (found.state, found.rows, found.ledger.balances)

    def test_an_address_that_is_none_is_as_good_as_nobody(self, here):
        ended = sidestep("run", "--", "true", SIDESTEP_ADDRESS="garbage")

        assert 0 == ended.returncode
        assert "nobody answers at SIDESTEP_ADDRESS=garbage" in ended.stderr

    def test_one_inside_another_joins_it(self, here):
        both = 'echo $SIDESTEP_RUN_ID; "$0" -m sidestep run -- sh -c "echo \\$SIDESTEP_RUN_ID"'

        shown = sidestep("run", "--id", "outer", "--", "sh", "-c", both, sys.executable)

        assert "outer\nouter\n" == shown.stdout
        assert "outer" == only_run(here).run.id

    @pytest.mark.nightly
    def test_an_address_where_nobody_answers_is_said_and_replaced(self, here):
        left = {"SIDESTEP_ADDRESS": f"ipc://{here}/gone.sock", "SIDESTEP_RUN_DIR": f"{here}/20261122-101112-old"}

        shown = sidestep("run", "--", "sh", "-c", "echo $SIDESTEP_RUN_ID", SIDESTEP_RUN_ID="old", **left)

        assert f"nobody answers at SIDESTEP_ADDRESS={left['SIDESTEP_ADDRESS']}" in shown.stderr
        assert only_run(here).run.id == shown.stdout.strip() != "old"

    @pytest.mark.nightly
    def test_an_id_that_a_script_chose_is_kept_where_the_daemon_around_it_is_gone(self, here):
        """As in a job that was submitted from within a run: SLURM hands the environment on."""
        left = {"SIDESTEP_ADDRESS": f"ipc://{here}/gone.sock", "SIDESTEP_RUN_DIR": f"{here}/20261122-101112-old"}

        sidestep("run", "--", "true", SIDESTEP_RUN_ID="slurm-7", **left)

        assert "slurm-7" == only_run(here).run.id

    def test_its_files_and_its_socket_are_for_nobody_else(self, here):
        look = 'stat -c %a "$SIDESTEP_RUN_DIR" "$(dirname "${SIDESTEP_ADDRESS#ipc://}")"'

        shown = sidestep("run", "--", "sh", "-c", look)

        assert "700\n700\n" == shown.stdout

    def test_it_leaves_no_socket_behind(self, here):
        shown = sidestep("run", "--", "sh", "-c", "echo ${SIDESTEP_ADDRESS#ipc://}")

        address = Path(shown.stdout.strip())
        assert [] == list(address.parent.glob(f"{address.name}*"))

    def test_a_daemon_that_is_killed_is_started_again_and_nothing_is_missing(self, here):
        kill_half_way = """
import os, signal, sidestep, zmq
from sidestepd.control import Control
control = Control(os.environ["SIDESTEP_ADDRESS"])
run = sidestep.init()
for step in range(10):
    if step == 5:
        run.flush()
        before = control.ask_status(30)
        os.kill(before["pid"], signal.SIGKILL)
        answers = (control.ask_status(2) for _ in range(15))
        print(any(after and after["boot"] != before["boot"] for after in answers), flush=True)
    run.log({"loss": step})
run.finish(timeout=30)
"""

        ended = sidestep("run", "--", *python(kill_half_way))

        assert (0, "True\n") == (ended.returncode, ended.stdout)
        assert list(range(10)) == logged_steps(here)
        assert only_run(here).ledger.balances


class TestSignals:
    def test_sigterm_reaches_the_training_inside_a_shell(self, here):
        (here / "train.py").write_text(SAY_SIGNALS)
        with started("run", "--", "sh", "-c", '"$0" train.py; exit $?', sys.executable) as process:
            assert process.stdout is not None
            assert "ready\n" == process.stdout.readline()

            process.terminate()
            said, _ = process.communicate(timeout=WAIT_S)

        assert "got SIGTERM 1\n" == said
        assert "finished" == only_run(here).state

    def test_the_command_decides_what_a_signal_means(self, here):
        with started("run", "--", *python(SAY_SIGNALS)) as process:
            assert process.stdout is not None
            said = [process.stdout.readline()]
            for _ in range(2):
                process.send_signal(signal.SIGINT)
                said.append(process.stdout.readline())

            process.communicate(timeout=WAIT_S)

        assert ["ready\n", "got SIGINT 1\n", "got SIGINT 2\n"] == said
        assert 7 == process.returncode

    def test_ctrl_c_in_a_terminal_reaches_the_command_once_and_the_run_is_finished(self, here):
        # After whole lines: what a terminal has not shown when a Ctrl-C is typed, it throws away.
        ctrl_c = {f"{line}\r\n": b"\x03" for line in ("ready", "1 from the terminal", "2 from the terminal")}

        code, shown = in_terminal("run", "--", *python(SAY_WHO_SIGNALS), answers=ctrl_c)

        assert "ready\r\n1 from the terminal\r\n2 from the terminal\r\n3 from the terminal\r\n" in shown.replace(
            "^C", ""
        )
        assert 7 == code
        assert "finished" == only_run(here).state

    def test_workers_outlive_a_supervisor_that_is_killed_and_the_run_is_closed_as_failed(self, here):
        wait_for_orphanhood = LOG_TEN.replace(
            "run.finish()",
            "import os, time\nparent = os.getppid()\nprint('ready', flush=True)\n"
            "while os.getppid() == parent: time.sleep(0.02)\nrun.log({'loss': 10})\nrun.finish()",
        )
        with started("run", "--", *python(wait_for_orphanhood)) as process:
            assert process.stdout is not None
            assert "ready\n" == process.stdout.readline()

            process.kill()
            found = eventually(lambda: only_run(here) if only_run(here).state == "finished" else None)

        assert 11 == found.rows
        assert found.ledger.balances


class TestServe:
    def test_it_says_when_it_is_ready_and_when_it_stops(self, here):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(str(here / "notify"))
            manager.settimeout(WAIT_S)
            with started("serve", "--id", "mine", NOTIFY_SOCKET=str(here / "notify")) as process:
                said = [manager.recv(100), manager.recv(100)]
                process.terminate()
                said.append(manager.recv(100))

                process.communicate(timeout=WAIT_S)

        assert [b"READY=1", b"STATUS=0 workers", b"STOPPING=1\nEXTEND_TIMEOUT_USEC=90000000"] == said
        assert (0, "finished") == (process.returncode, only_run(here).state)

    def test_it_serves_workers_that_were_told_its_address(self, here):
        address = f"ipc://{here}/daemon.sock"
        with serving(address) as process:
            subprocess.run(python(LOG_TEN), env=os.environ | {"SIDESTEP_ADDRESS": address}, timeout=WAIT_S)

            process.terminate()
            process.communicate(timeout=WAIT_S)

        assert 0 == process.returncode
        assert list(range(10)) == logged_steps(here)

    @pytest.mark.nightly
    def test_a_second_one_at_the_same_address_is_refused(self, here):
        address = f"ipc://{here}/daemon.sock"
        with serving(address):
            second = sidestep("serve", "--address", address)

        assert 73 == second.returncode
        assert f"another daemon serves {address}" in second.stderr

    @pytest.mark.nightly
    def test_stopped_while_a_worker_is_there_it_can_be_taken_up_again(self, here):
        address = f"ipc://{here}/daemon.sock"
        with (
            serving(address, "--id", "mine", "--grace", "0.5", "--set", "order.lease_s=2") as process,
            Control(address) as control,
        ):
            say_hello(address)
            eventually(lambda: (control.ask_status() or {}).get("live"))

            process.terminate()
            process.communicate(timeout=WAIT_S)

        run_dir = only_run(here).run.dir
        assert (75, "interrupted") == (process.returncode, only_run(here).state)
        with serving(address, run_dir) as process:
            subprocess.run(python(LOG_TEN), env=os.environ | {"SIDESTEP_ADDRESS": address}, timeout=WAIT_S)
            process.terminate()
            process.communicate(timeout=WAIT_S)
        assert (0, "finished") == (process.returncode, only_run(here).state)
        assert 10 == len(logged_steps(here))

    @pytest.mark.nightly
    def test_a_run_that_was_told_to_finish_is_finished_by_taking_it_up(self, here):
        address = f"ipc://{here}/daemon.sock"
        with serving(address, "--id", "mine") as process, Control(address) as control:
            eventually(lambda: control.close_run(5))
            stop_all(process)

        ended = sidestep("serve", only_run(here).run.dir)

        assert 0 == ended.returncode
        assert "finished" == only_run(here).state

    @pytest.mark.nightly
    def test_a_run_whose_spool_was_damaged_meanwhile_is_salvaged_by_taking_it_up(self, here):
        address = f"ipc://{here}/daemon.sock"
        with serving(address, "--id", "mine") as process, Control(address) as control:
            subprocess.run(python(LOG_TEN), env=os.environ | {"SIDESTEP_ADDRESS": address}, timeout=WAIT_S)
            eventually(lambda: control.close_run(0))
            stop_all(process)
        run_dir = Path(only_run(here).run.dir)
        with closing(sqlite3.connect(run_dir / "spool.db")) as spool, spool:
            spool.execute("UPDATE session SET seal = 1")

        shown = sidestep("status", str(run_dir))
        ended = sidestep("serve", str(run_dir))

        assert (0, True) == (shown.returncode, "the spool is damaged" in shown.stdout)
        assert (0, "finished") == (ended.returncode, only_run(here).state), ended.stderr
        assert list(range(10)) == logged_steps(here)
        assert list((run_dir / "quarantine").iterdir())

    @pytest.mark.nightly
    def test_a_run_that_is_finished_is_left_as_it_is(self, here):
        sidestep("run", "--", *python(LOG_TEN))

        ended = sidestep("serve", only_run(here).run.dir)

        assert (0, "") == (ended.returncode, ended.stderr)
        assert list(range(10)) == logged_steps(here)


class TestStatus:
    @pytest.mark.nightly
    def test_it_shows_the_newest_run_unless_told(self, here):
        sidestep("run", "--id", "first", "--", "true")
        sidestep("run", "--id", "second", "--", "true")

        assert sidestep("status").stdout.startswith("run       second, finished\n")

    @pytest.mark.nightly
    def test_it_knows_the_run_it_is_called_in(self, here):
        shown = sidestep("run", "--id", "mine", "--", *SIDESTEP, "status")

        assert shown.stdout.startswith("run       mine, running\n")

    def test_as_json_it_says_everything(self, here):
        sidestep("run", "--id", "mine", "--", *python(LOG_TEN))

        found = json.loads(sidestep("status", "--json").stdout)

        assert ("mine", 10, 9, True) == (
            found["run"]["id"],
            found["rows"],
            found["last_step"],
            found["ledger"]["balances"],
        )

    def test_of_a_directory_that_is_no_run_says_so(self, here):
        assert 2 == sidestep("status", str(here)).returncode

    def test_where_there_are_no_runs_it_says_so(self, here):
        ended = sidestep("status")

        assert (2, "sidestep: there are no runs in sidestep-runs\n") == (ended.returncode, ended.stderr)


@contextmanager
def serving(address: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    with started("serve", "--address", address, *words) as process, Control(address) as control:
        eventually(control.ask_status)
        eventually(lambda: "at ipc://" in (process.stderr.readline() if process.stderr else ""))
        yield process


def say_hello(address: str) -> None:
    """Be a worker that came and says nothing."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.connect(address)
        peer.send_multipart(encode(Hello(session=bytes(range(16)))))
        peer.recv_multipart()


def stop_all(process: subprocess.Popen[str]) -> None:
    """Kill a daemon and all that it started, without a word."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in family:
        one.kill()
    psutil.wait_procs(family[1:], timeout=WAIT_S)
    process.wait()


def in_terminal(*words: str, answers: dict[str, bytes] | None = None) -> tuple[int, str]:
    """Type a command in a terminal, and each answer when its question appears; returns exit code and screen."""
    waiting = dict(answers or {})
    pid, screen = pty.fork()
    if pid == 0:
        os.execv(SIDESTEP[0], [*SIDESTEP, *words])
    shown = ""
    deadline = time.monotonic() + WAIT_S
    while select.select([screen], [], [], max(0.0, deadline - time.monotonic()))[0]:
        try:
            shown += os.read(screen, 4096).decode()
        except OSError:  # the terminal has no other end any more
            break
        for question in [question for question in waiting if question in shown]:
            os.write(screen, waiting.pop(question))
    else:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(screen)
    return os.waitstatus_to_exitcode(status), shown
