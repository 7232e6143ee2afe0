"""A command's output is where it was before, and in the run; what the command is, is in the run too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sidestepd import status
from sidestepd.sinks import wandb_log

pytestmark = pytest.mark.e2e

TRAINING = """
import os, sys
if os.environ["RANK"] == "launcher":
    import subprocess
    ranks = [
        subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, "RANK": f"{rank}"})
        for rank in range(2)
    ]
    sys.exit(max(rank.wait() for rank in ranks))
import threading
import sidestep
from sidestep.logger import WandbConfig, WandbLogger
with WandbLogger(WandbConfig(save_code=True, log_system_metrics=False)) as logger:
    for step in range(3):
        print(f"\\rstep {step}", end="")
        logger.log_metrics({"loss": step}, step=step)
    print()
    print("to err", file=sys.stderr)
    for thread in threading.enumerate():
        if thread.name == "sidestep-program":
            thread.join()
    logger.finish(timeout=60)
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[bytes], Path]:
    """Two ranks, through the command line, into an offline run."""
    here = tmp_path_factory.mktemp("prints")
    (here / "train.py").write_text(TRAINING)
    environ = {
        **os.environ, "SIDESTEP_CONSOLE": "1", "SIDESTEP_PROGRAM": "1", "WORLD_SIZE": "2", "RANK": "launcher",
    }  # fmt: skip
    command = [sys.executable, "-m", "sidestep", "run", "--dir", str(here), "--", sys.executable, "train.py"]
    done = subprocess.run(command, cwd=here, env=environ, capture_output=True, timeout=200)
    (run_dir,) = (path for path in (here / "sidestep-runs").iterdir() if not path.name.startswith("."))
    return done, run_dir


class TestOneRun:
    def records(self, run_dir: Path) -> list[Any]:
        (segment,) = wandb_log.segments(run_dir / "wandb")
        return list(wandb_log.records(segment))

    def test_the_output_is_where_it_was(self, ran: tuple[subprocess.CompletedProcess[bytes], Path]):
        done, _ = ran

        assert 0 == done.returncode, done.stderr
        assert 2 == done.stdout.count(b"\rstep 2\n")
        assert 2 == done.stderr.count(b"to err")

    def test_it_is_in_the_run_too_by_rank(self, ran: tuple[subprocess.CompletedProcess[bytes], Path]):
        _, run_dir = ran
        said = [it.output_raw for it in self.records(run_dir) if it.HasField("output_raw")]

        expected = {
            (kind, f"[rank {rank}] {text}\n") for rank in (0, 1) for kind, text in ((1, "step 2"), (0, "to err"))
        }
        assert expected <= {(it.output_type, line) for it in said for line in it.line.splitlines(keepends=True)}
        (log,) = run_dir.glob("wandb/offline-run-*/files/output.log")
        assert {"[rank 0] step 2", "[rank 1] to err"} <= set(log.read_text().splitlines())

    def test_what_the_program_is_is_in_the_run(self, ran: tuple[subprocess.CompletedProcess[bytes], Path]):
        _, run_dir = ran
        (facts,) = (it.environment for it in self.records(run_dir) if it.HasField("environment"))

        assert sys.executable == facts.executable
        assert str((run_dir.parents[1] / "train.py").resolve()) == facts.program
        (files,) = run_dir.glob("wandb/offline-run-*/files")
        assert TRAINING == (files / "code" / "train.py").read_text()
        assert "msgpack==" in (files / "requirements.txt").read_text()

    def test_nothing_was_lost_and_nothing_was_sampled(self, ran: tuple[subprocess.CompletedProcess[bytes], Path]):
        _, run_dir = ran
        ledger = status.report(run_dir).ledger

        assert ledger.balances
        assert (0, 0) == (ledger.pending, sum(ledger.dropped.values()))
        assert [] == [it for it in self.records(run_dir) if it.HasField("stats")]
