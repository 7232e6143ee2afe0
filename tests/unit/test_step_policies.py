"""What users do with steps, through every stage: each keeps all its rows, and its charts are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from sidestepd.rows import MAIN_AXIS, Row
from tests.support.builders import Tape, counted, define, log
from tests.support.line import Disk, Line, Options

PATIENCE = 5.0


class Training:
    """Ranks on a tape, and delivery that reads along."""

    def __init__(self, ranks: int = 1) -> None:
        self.tape, self.line = Tape(now=1000.0), Line(Disk(), Options(patience=PATIENCE))
        self.ranks = ranks
        for rank in range(ranks):
            self.tape.hello(rank, world=ranks)

    def wait(self, seconds: float) -> None:
        """Time passes, and delivery reads every tenth of a second."""
        for _ in range(max(1, round(seconds * 10))):
            self.tape.now += seconds / max(1, round(seconds * 10))
            self.line.read(self.tape.entries, clock=self.tape.now)

    def end(self) -> Sequence[Row]:
        for rank in range(self.ranks):
            self.tape.bye(rank)
        self.line.read(self.tape.entries, clock=self.tape.now)
        self.line.finish()
        return self.line.disk.held


def chart(rows: Sequence[Row], name: str, against: str) -> list[tuple[Any, Any]]:
    """What a chart of a name against an axis shows."""
    return [
        (row.values[against], row.values[name]) for row in rows if name in row.values and against in row.values
    ]


def late(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.late]


class TestTwoSubExperimentsThatBothStartAtZero:
    def test_as_stages_each_has_an_axis(self):
        training = Training()
        for stage in ("e_p2_1", "e_p2_2"):
            for step in range(20):
                training.tape.say(0, log(step, {"loss": step / 10}, stage=stage))
                training.wait(0.1)

        rows = training.end()

        for stage in ("e_p2_1", "e_p2_2"):
            expected = [(step, step / 10) for step in range(20)]
            assert expected == chart(rows, f"{stage}/loss", f"{stage}/step")
            assert f"{stage}/step" == training.line.assembler.defined[f"{stage}/loss"].step_metric
        assert [] == late(rows)

    def test_on_one_axis_the_second_s_are_rows_of_their_own_with_their_true_step(self):
        training = Training()
        for name in ("a", "b"):
            for step in range(20):
                training.tape.say(0, log(step, {f"{name}/loss": step / 10}))
                training.wait(0.1)

        rows = training.end()

        for name in ("a", "b"):
            assert [(step, step / 10) for step in range(20)] == sorted(chart(rows, f"{name}/loss", MAIN_AXIS))

    def test_against_a_metric_of_their_own(self):
        training = Training()
        training.tape.say(0, define("*/loss", step_metric="epoch"))
        for name in ("a", "b"):
            for epoch in range(5):
                training.tape.say(0, log(epoch, {"epoch": epoch}), log(epoch, {f"{name}/loss": epoch / 10}))
                training.wait(0.1)

        rows = training.end()

        for name in ("a", "b"):
            assert [(epoch, epoch / 10) for epoch in range(5)] == sorted(chart(rows, f"{name}/loss", "epoch"))
            assert "epoch" == training.line.assembler.defined[f"{name}/loss"].step_metric


class TestSlowAndFast:
    def test_ten_second_steps_with_stage_rows_between_meet(self):
        """A stage row waits for the next main row, though that is longer than patience away."""
        training = Training()
        for step in range(8):
            training.tape.say(0, log(step))
            training.wait(4.0)
            training.tape.say(0, log(step, {"acc": 0.5}, stage="eval"))
            training.wait(6.0)

        rows = training.end()

        merged = [row for row in rows if len(row.places) == 2]
        assert len(merged) >= 5
        assert list(range(8)) == [step for step, _ in chart(rows, "eval/acc", "eval/step")]
        assert [] == late(rows)

    def test_ranks_that_log_at_different_rates_share_their_steps(self):
        training = Training(ranks=2)
        for step in range(100):
            training.tape.say(0, log(step, {"loss": 1.0}))
            if step % 10 == 0:
                training.tape.say(1, log(step, {"loss": 3.0}))
            training.wait(0.1)

        rows = training.end()

        assert [2.0 if step % 10 == 0 else 1.0 for step in range(100)] == [
            it for _, it in chart(rows, "loss", MAIN_AXIS)
        ]
        assert [] == late(rows)

    @pytest.mark.parametrize("kind", [log, counted])
    def test_rank_0_that_writes_a_checkpoint_for_a_minute_holds_the_others_for_one_patience(self, kind: Any):
        training = Training(ranks=2)
        for step in range(20):
            for rank in (0, 1):
                training.tape.say(rank, kind(step, {f"loss{rank}": 1.0} if kind is log else {"loss": float(rank)}))
            training.wait(0.1)
        for step in range(20, 80):
            training.tape.say(1, kind(step, {"loss1": 1.0} if kind is log else {"loss": 1.0}))
            training.wait(1.0)

        assert 80 - 3 * PATIENCE <= training.line.assembler.last

        for step in range(20, 120):
            training.tape.say(0, kind(step, {"loss0": 1.0} if kind is log else {"loss": 0.0}))
            training.wait(0.1)
        rows = training.end()
        assert 2 * 20 + 60 + 100 == sum(len(row.positions) for row in rows)
        assert [row.step for row in rows] == sorted({row.step for row in rows})

    def test_a_rank_that_is_stopped_and_goes_on_holds_again(self):
        training = Training(ranks=2)
        for step in range(10):
            for rank in (0, 1):
                training.tape.say(rank, log(step))
            training.wait(0.1)
        for step in range(10, 30):
            training.tape.say(0, log(step))
            training.wait(1.0)
        for step in range(30, 60):
            for rank in (0, 1):
                training.tape.say(rank, log(step))
            training.wait(0.1)

        rows = training.end()

        assert [] == late(rows)
        assert [2] * 29 == [row.values["sidestep/ranks_reported"] for row in rows if row.places[MAIN_AXIS] > 30]


class TestSummary:
    def test_it_keeps_the_newest_step_s_value_whatever_came_last(self):
        training = Training()
        for step in (1, 5, 9):
            training.tape.say(0, log(step, {"loss": float(step)}))
            training.wait(1.0)
        training.wait(10.0)
        training.tape.say(0, log(3, {"loss": 3.0}))
        training.wait(1.0)

        rows = training.end()

        assert 9.0 == training.line.assembler.newest()["loss"]
        [row] = late(rows)
        assert {"loss": 9.0} == {name: value for name, value in row.restore.items() if name == "loss"}
