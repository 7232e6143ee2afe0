"""A spool at its quota under a real training: its workers keep what they say, and all of it is in the run."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from sidestepd.control import Control
from tests.support.chaos import DEADLINE_S, Training, training
from tests.support.daemons import freeze
from tests.support.waiting import eventually

pytestmark = pytest.mark.chaos

STEPS, RANKS = 70_000, 2


def held_sessions(control: Control) -> int:
    """How many workers were told to keep what they have."""
    answer = control.ask_status()
    return int(answer["room"]["held"]) if answer else 0


@pytest.mark.nightly
def test_a_training_outlives_a_full_spool_and_loses_nothing(tmp_path: Path):
    options = {"spool.max_bytes": 4 << 20, "delivery.stall_s": 600.0}
    command = training(ranks=RANKS, steps=STEPS, rate=12_000.0)
    with Training(tmp_path, command, sink="jsonl", options=options) as run:
        delivery = run.wait_for("delivery")
        assert delivery is not None
        freeze(delivery)
        with Control(run.report().run.address) as control:
            eventually(lambda: run.over or held_sessions(control) == RANKS, DEADLINE_S, run.log)
        assert run.report().full
        boots, held = run.boots(), run.report().ledger.offered

        delivery.send_signal(signal.SIGCONT)

        assert run.wait() == 0
        assert held < RANKS * STEPS, "the training was over before the spool was full"
        assert boots == run.boots() == 1
        assert "the daemon refused: its disk has no room" in (tmp_path / "stderr").read_text()
        assert set(range(STEPS)) == {row.values["global_step"] for row in run.rows()}
        report = run.report()
    assert not report.full
    assert RANKS * STEPS + RANKS * 2 <= report.ledger.delivered
    assert (0, {}) == (report.ledger.pending, dict(report.ledger.dropped))
    assert report.ledger.balances
