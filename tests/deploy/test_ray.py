"""The example of deploy/ray with a real Ray: two workers of Ray Train, one run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sidestepd import status
from sidestepd.sinks import wandb_log
from tests.support.workshop import DEPLOY, Workshop, do

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def python(workshop: Workshop) -> Path:
    """An environment with Ray and this tree's wheel."""
    python = workshop.launcher("ray[train]") / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--find-links", workshop.wheels]
    do(*pip, "sidestep[daemon]")
    do(*pip, "--force-reinstall", "--no-deps", "--no-index", "sidestep")
    return python


def test_all_workers_are_one_run(python: Path, tmp_path: Path):
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SIDESTEP_", "WANDB_"))}
    environ |= {"RAY_USAGE_STATS_ENABLED": "0", "SIDESTEP_SAMPLERS_ENABLED": "off", "HOME": str(tmp_path)}
    words = [python.parent / "sidestep", "run", "--id", "rayed", "--", python, DEPLOY / "ray/train.py"]

    do(*words, "--workers", "2", "--steps", "50", env=environ, cwd=tmp_path)

    (run_dir,) = tmp_path.glob("sidestep-runs/*-rayed")
    report = status.report(run_dir)
    rows = [row.values for path in wandb_log.segments(run_dir / "wandb") for row in wandb_log.history(path)]
    assert list(range(50)) == [row["global_step"] for row in rows]
    assert [pytest.approx(1.5 / (step + 1)) for step in range(50)] == [row["loss"] for row in rows]  # the mean
    assert ("finished", True, 0, 0) == (
        report.state, report.ledger.balances, report.ledger.pending, report.lost_sessions
    )  # fmt: skip
    assert {0, 1} == {one.rank for one in report.sessions}
