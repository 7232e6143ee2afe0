"""Two trainings into one service whose processes are killed: each has its run, and every step in it once."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from sidestepd import status
from sidestepd.control import Control
from tests.support.chaos import QUICK, steps_of_ranks, training
from tests.support.daemons import read_jsonl, see_gone
from tests.support.waiting import eventually

pytestmark = [pytest.mark.chaos, pytest.mark.nightly]

DEADLINE_S = 120.0
ROOT = Path(__file__).resolve().parents[2]
STEPS = 2500
JOBS = ("left", "right")


@contextmanager
def started(words: list[str], log: Path, **environ: str) -> Iterator[psutil.Popen]:
    own = {k: v for k, v in os.environ.items() if not k.startswith(("SIDESTEP_", "WANDB_"))}
    with log.open("ab") as output:
        process = psutil.Popen(words, cwd=ROOT, env=own | environ, stdout=output, stderr=output)
    try:
        yield process
    finally:
        if process.poll() is None:
            for one in [*process.children(recursive=True), process]:
                one.kill()
        process.wait()


def test_every_step_of_every_run_is_there_once(tmp_path: Path):
    def said() -> str:
        return "\n".join(path.read_text()[-2000:] for path in (tmp_path / "serve", *map(tmp_path.joinpath, JOBS)))

    def reports() -> dict[str, status.Report]:
        found = [status.report(path.parent) for path in tmp_path.glob("sidestep-runs/*/run.json")]
        return {one.run.id: one for one in found}

    with tempfile.TemporaryDirectory(dir="/tmp") as sockets:
        address = f"ipc://{sockets}/daemon.sock"
        settings = [f"{name}={value}" for name, value in {**QUICK, "sink.kind": "jsonl"}.items()]
        serve = [sys.executable, "-m", "sidestep", "serve", "--dir", str(tmp_path), "--address", address]
        serve += [word for setting in settings for word in ("--set", setting)]
        job = training(ranks=2, steps=STEPS, rate=100.0)
        with (
            started(serve, tmp_path / "serve") as service,
            started(job, tmp_path / "left", SIDESTEP_ADDRESS=address, WANDB_RUN_ID="left") as left,
            started(job, tmp_path / "right", SIDESTEP_ADDRESS=address, WANDB_RUN_ID="right") as right,
        ):
            boots = set()
            for _ in range(3):
                before = {name: one.rows for name, one in reports().items()}

                def both_went_on(before: dict[str, int] = before) -> bool:
                    now = reports()
                    return now.keys() == set(JOBS) and all(now[name].rows > before.get(name, 0) for name in JOBS)

                eventually(both_went_on, DEADLINE_S, said)
                with Control(address) as control:
                    intake = psutil.Process(eventually(control.ask_status, DEADLINE_S, said)["pid"])
                assert left.poll() is right.poll() is None, "it is over before it was killed"
                intake.kill()
                see_gone(intake)
                boots.add(intake.pid)
            assert (0, 0) == (left.wait(DEADLINE_S), right.wait(DEADLINE_S)), said()
            service.terminate()
            assert 0 == service.wait(DEADLINE_S), said()

    assert 3 == len(boots)
    for name in JOBS:
        report = reports()[name]
        assert {rank: list(range(STEPS)) for rank in range(2)} == steps_of_ranks(read_jsonl(Path(report.run.dir)))
        assert ("finished", 0, True) == (report.state, report.run.exit_code, report.ledger.balances)
        assert report.ledger.offered == report.ledger.delivered
