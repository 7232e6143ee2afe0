"""The row log: what was decided outlives any crash, and is forgotten when nothing needs it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sidestepd.rowlog import RowLog, RowLogReader
from sidestepd.rows import Alert, Checkpoint, Dead, Definition, Latest, Position, Row


def row(step: int, *, entries: tuple[int, ...] = (1,), **values: Any) -> Row:
    return Row(
        step=step,
        time=step + 0.5,
        values={"loss": float(step), "global_step": step, **values},
        places={"global_step": step},
        positions=tuple(Position(entry, step) for entry in entries),
    )


def append(log: RowLog, *rows: Row) -> None:
    log.append(rows, marks={"last": rows[-1].step})


def steps(log: RowLog) -> list[int]:
    return [one.step for one, _ in log.rows()]


def fates(log: RowLog) -> list[str]:
    return [fate for _, fate in log.rows()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "delivery.db"


@pytest.fixture
def log(path: Path) -> RowLog:
    return RowLog(path)


class TestRows:
    def test_come_back_word_for_word_in_the_order_of_their_steps(self, path: Path, log: RowLog):
        late = Row(
            step=8, time=1.0, values={"a": {"b": [1, None, "x"]}, "big": 2**63}, places={"eval/step": 2},
            positions=(Position(4, 9), Position(5, 0)), late=True, restore={"a": 1},
        )  # fmt: skip
        append(log, row(7), late)
        append(log, row(9))
        log.close()

        again = RowLog(path)

        assert [(row(7), "sent"), (late, "sent"), (row(9), "sent")] == again.rows()

    def test_are_written_together_with_marks_and_definitions(self, path: Path, log: RowLog):
        definition = Definition(name="loss", step_metric="global_step")

        log.append([row(1), row(2)], marks={"last": 2, "released": {"global_step": 2}}, definitions=[definition])

        again = RowLog(path)
        assert [1, 2] == steps(again)
        assert {"last": 2, "released": {"global_step": 2}} == again.meta("marks", {})
        assert [definition] == again.definitions()

    def test_a_step_that_was_given_is_not_given_again(self, log: RowLog):
        """It would overwrite a row that the run may hold."""
        append(log, row(1))

        with pytest.raises(Exception, match="UNIQUE"):
            append(log, row(0), row(1))

        assert [1] == steps(log)
        assert {"last": 1} == log.meta("marks", {})


class TestSettle:
    def test_writes_fates_and_everything_else_together(self, path: Path, log: RowLog):
        append(log, row(1), row(2), row(3))
        latest = Latest(axis="global_step", step=2, time=2.5, value=2.0)

        log.settle(
            confirmed=[1], rejected=[(2, "rejected: unloggable")], dead=[Dead(entry=9, seq=4, reason="corrupt")],
            latest={"loss": latest}, checkpoint=Checkpoint(cursor=9, fold=b"folded"),
            bookmark={"offset": 17}, counts={"rows": 1},
        )  # fmt: skip

        again = RowLog(path)
        assert ["confirmed", "rejected: unloggable", "sent"] == fates(again)
        assert Checkpoint(cursor=9, fold=b"folded") == again.checkpoint()
        assert {"loss": latest} == again.latest()
        assert ({"offset": 17}, {"rows": 1}) == (again.meta("bookmark", {}), again.meta("counts", {}))
        assert {"corrupt": 1} == RowLogReader(path).dead()

    def test_without_a_new_checkpoint_keeps_the_old_one(self, log: RowLog):
        log.settle(checkpoint=Checkpoint(cursor=9, fold=b"folded"))

        log.settle(confirmed=[], counts={})

        assert Checkpoint(cursor=9, fold=b"folded") == log.checkpoint()

    def test_of_a_record_that_was_dead_before_changes_nothing(self, path: Path, log: RowLog):
        for _ in range(2):
            log.settle(dead=[Dead(entry=9, seq=4, reason="corrupt")])

        assert {"corrupt": 1} == RowLogReader(path).dead()

    def test_that_fails_changes_nothing(self, log: RowLog):
        append(log, row(1))

        with pytest.raises(TypeError):
            log.settle(confirmed=[1], checkpoint=Checkpoint(cursor=9), counts=object())

        assert (["sent"], Checkpoint()) == (fates(log), log.checkpoint())


class TestForgetting:
    """A row goes when it is confirmed, lies wholly before the cursor, and has left the window of late values."""

    def settled(self, log: RowLog, *, confirmed: list[int], cursor: int, keep_above: int) -> list[int]:
        log.append([row(step, entries=(step, step + 1)) for step in range(1, 7)], marks={})
        log.settle(confirmed=confirmed, checkpoint=Checkpoint(cursor=cursor), keep_above=keep_above)
        return steps(log)

    def test_forgets_what_meets_all_three(self, log: RowLog):
        assert [5, 6] == self.settled(log, confirmed=[1, 2, 3, 4, 5, 6], cursor=100, keep_above=4)

    def test_keeps_what_is_not_confirmed(self, log: RowLog):
        assert [3, 5, 6] == self.settled(log, confirmed=[1, 2, 4], cursor=100, keep_above=4)

    def test_keeps_what_reaches_beyond_the_cursor(self, log: RowLog):
        """Its records will be read again, and are not to be ordered again."""
        assert [3, 4, 5, 6] == self.settled(log, confirmed=[1, 2, 3, 4, 5, 6], cursor=3, keep_above=4)

    def test_keeps_everything_before_the_first_checkpoint(self, log: RowLog):
        log.append([row(1)], marks={})

        log.settle(confirmed=[1], keep_above=100)

        assert [1] == steps(log)

    def test_forgets_what_was_rejected(self, log: RowLog):
        log.append([row(1)], marks={})

        log.settle(rejected=[(1, "rejected: x")], checkpoint=Checkpoint(cursor=5), keep_above=100)

        assert [] == steps(log)


KILLED = """
import sys
from pathlib import Path
from tests.unit.test_rowlog import row
from sidestepd.rowlog import RowLog
from sidestepd.rows import Checkpoint
log = RowLog(Path(sys.argv[1]))
step = log.meta("marks", {"last": 0})["last"]
print("started", flush=True)
while True:
    log.append([row(step + 1, entries=(step,)), row(step + 2, entries=(step,))], marks={"last": step + 2})
    print("appended", step + 2, flush=True)
    log.settle(
        confirmed=[step + 1], checkpoint=Checkpoint(cursor=step, fold=b"%d" % step), counts={"step": step + 1}
    )
    print("settled", step + 1, flush=True)
    step += 2
"""


class TestKillNine:
    def test_each_commit_is_there_wholly_or_not_at_all(self, path: Path):
        for lines in (2, 7, 16, 31, 8):
            said = self._write_until_killed(path, lines)

            log = RowLog(path)
            last, settled = log.meta("marks", {"last": 0})["last"], log.meta("counts", {"step": 0})["step"]
            checkpoint = log.checkpoint()
            assert list(range(1, last + 1)) == steps(log)
            assert last >= said.get("appended", 0)
            assert settled >= said.get("settled", 0)
            assert checkpoint.fold == (b"%d" % checkpoint.cursor if checkpoint.fold else b"")
            assert settled == 0 or fates(log)[settled - 1] == "confirmed"
            log.close()

    def _write_until_killed(self, path: Path, lines: int) -> dict[str, int]:
        command = [sys.executable, "-c", KILLED, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            said = [writer.stdout.readline().split() for _ in range(lines)]
            writer.kill()
            said += [line.split() for line in writer.stdout.read().splitlines()]
        assert writer.returncode == -signal.SIGKILL
        return {words[0]: int(words[1]) for words in said if len(words) == 2}


class TestReader:
    @pytest.mark.parametrize("content", [None, b""])
    def test_of_a_log_that_is_not_there_yet_knows_nothing(self, path: Path, content: bytes | None):
        if content is not None:
            path.write_bytes(content)

        reader = RowLogReader(path)

        assert (0, None, {}) == (reader.cursor(), reader.meta("state"), reader.dead())
        assert (path.exists(), path.stat().st_size if content is not None else 0) == (content is not None, 0)

    def test_sees_what_was_settled_since(self, path: Path, log: RowLog):
        reader = RowLogReader(path)
        assert reader.cursor() == 0

        log.settle(checkpoint=Checkpoint(cursor=9), ledger={"rows": 3}, state="closed")

        assert (9, {"rows": 3}, "closed") == (reader.cursor(), reader.meta("ledger"), reader.meta("state"))

    def test_knows_the_newest_entry_that_anything_speaks_of(self, path: Path, log: RowLog):
        """A spool that was lost and begins anew must not give such an id again: rows hold records by it."""
        reader = RowLogReader(path)
        assert reader.newest() == 0

        log.settle(checkpoint=Checkpoint(cursor=3))
        assert reader.newest() == 3
        log.settle(ledger={"read_through": 5})
        assert reader.newest() == 5
        append(log, row(1, entries=(2, 9)), row(2, entries=(7,)))
        assert reader.newest() == 9

    def test_of_a_log_that_was_closed_reads_it(self, path: Path, log: RowLog):
        log.settle(checkpoint=Checkpoint(cursor=9))
        log.close()

        assert RowLogReader(path).cursor() == 9

    def test_of_a_damaged_log_knows_nothing(self, path: Path):
        """Intake asks it what may be deleted, and must go on serving workers."""
        path.write_bytes(b"no database at all" * 1000)

        reader = RowLogReader(path)

        assert (0, {}) == (reader.cursor(), reader.meta("ledger", {}))


class TestAlerts:
    def test_come_back_in_their_order_with_the_entry_that_was_read_last(self, path: Path, log: RowLog):
        one = Alert(cause="silent/1", title="rank 1 is silent", text="for 60 s", level="WARN", time=1.5)
        other = Alert(cause="silent/1", title="rank 1 is back", text="", level="INFO", time=2.5, over=True)
        log.warn([one], through=7)
        log.warn([other, one], through=9)

        assert ([one, other, one], 9) == log.alerts()
        assert [one, other, one] == RowLogReader(path).alerts()

    def test_are_none_at_first(self, path: Path, log: RowLog):
        assert ([], 0) == log.alerts()
        assert [] == RowLogReader(path).alerts()
