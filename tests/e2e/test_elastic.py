"""A training that torchrun starts again: it goes on from its checkpoint, and what it says again is told apart."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.chaos import Training
from tests.support.elastic import CRASHED_AT, SAVED_AT, STEPS

pytestmark = pytest.mark.e2e


def test_a_crash_and_a_resume_are_two_attempts_of_one_run(tmp_path: Path):
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 1 --monitor-interval 0.1"
    program = ["-m", "tests.support.elastic", "--checkpoint", str(tmp_path / "checkpoint")]
    command = [sys.executable, *torchrun.split(), *program]
    with Training(tmp_path, command, options={"reduce.ranks": "sum", "reduce.li*": "max"}) as run:
        assert 0 == run.wait(), run.log()

    rows = run.rows()
    before = [row for row in rows if row.values.get("life") == 0]
    after = [row for row in rows if row.values.get("life") == 1]
    assert set(range(CRASHED_AT)) <= {row.values["global_step"] for row in before}
    assert list(range(SAVED_AT, STEPS)) == [row.values["global_step"] for row in after]
    assert {2} == {row.values["ranks"] for row in after}
    again = [row.values["global_step"] for row in rows if "sidestep/attempt" in row.values]
    said_before = max(row.values["global_step"] for row in before)
    assert list(range(SAVED_AT, said_before + 1)) == again
    assert not any("sidestep/late_rows" in row.values or "mine.late" in row.values for row in rows)
    assert sorted({row.step for row in rows}) == [row.step for row in rows]
    ledger = run.report().ledger
    assert ledger.balances
    assert 0 == ledger.pending
