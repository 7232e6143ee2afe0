"""Delivery's memory is damaged or lost: it starts, and the run and the spool tell it what it forgot."""

from __future__ import annotations

import random
import shutil
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from sidestepd.errors import ExitCode
from sidestepd.rowlog import RowLog
from tests.support.daemons import DEADLINE_S, Serve, ServedRun, logged
from tests.support.waiting import eventually
from tests.support.wandb_server import KEY, StandIn


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    without_log(path)


def emptied(path: Path) -> None:
    path.write_bytes(b"")
    without_log(path)


def gone(path: Path) -> None:
    path.unlink()
    without_log(path)


def a_directory(path: Path) -> None:
    gone(path)
    path.mkdir()
    (path / "something").touch()


def rubbish(path: Path) -> None:
    path.write_bytes(b"no database" * 1000)
    without_log(path)


def without_its_log(path: Path) -> None:
    """The last commits are gone, and SQLite does not notice."""
    wal = path.with_name(f"{path.name}-wal")
    assert wal.stat().st_size > 0
    wal.write_bytes(bytes(wal.stat().st_size))
    path.with_name(f"{path.name}-shm").unlink(missing_ok=True)


def with_a_row_flipped(path: Path) -> None:
    """SQLite's own check does not see it."""
    spoil(path, "UPDATE row SET content = substr(content, 1, 3) || x'00' || substr(content, 5)")


def with_its_cursor_flipped(path: Path) -> None:
    """Believed, it would have intake delete what is in no row."""
    spoil(path, "UPDATE meta SET value = value + 1000 WHERE key = 'cursor'")


def spoil(path: Path, change: str) -> None:
    with sqlite3.connect(path) as db:
        assert db.execute(change).rowcount
    db.close()


def without_log(path: Path) -> None:
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


DAMAGES = [
    truncated, emptied, gone, a_directory, rubbish, without_its_log, with_a_row_flipped, with_its_cursor_flipped,
]  # fmt: skip
OFTEN = (gone, rubbish, with_a_row_flipped)


def interrupted(served: ServedRun, steps: int = 60) -> int:
    """A run of two ranks, killed when part of it is settled and part of it is not; returns the next step."""
    workers = [served.worker(rank, world=2) for rank in range(2)]
    for worker in workers:
        worker.hello()
    for step in range(steps):
        for worker in workers:
            worker.log(step)
        if step == steps // 2:
            eventually(lambda: served.frames() < steps, DEADLINE_S, "nothing was deleted")
    workers[0].log(steps)  # a row that waits for the other rank
    eventually(lambda: served.told().get("rows", 0) >= steps - 10, DEADLINE_S, served.log)
    served.kill()
    return steps


@pytest.mark.parametrize("sink", ["jsonl", pytest.param("wandb", marks=pytest.mark.nightly)])
@pytest.mark.parametrize(
    "damage", [it if it in OFTEN else pytest.param(it, marks=pytest.mark.nightly) for it in DAMAGES]
)
def test_a_damaged_row_log_costs_nothing_and_doubles_nothing(
    serve: Serve, damage: Callable[[Path], None], sink: str
):
    served = serve(sink=sink)
    at = interrupted(served)
    held = set(served.steps())
    path = served.run_dir / "delivery.db"

    damage(path)
    served.start()
    workers = [served.worker(rank, world=2, launch="after") for rank in range(2)]
    for worker in workers:
        worker.hello()
        worker.log(*range(at + 1, at + 11))
        worker.bye()

    assert served.finish() == ExitCode.COMPLETE
    assert "lost something" in served.log() or "damaged" in served.log()
    steps = served.steps()
    assert sorted(set(steps)) == steps
    assert held <= set(steps)
    assert list(range(at + 11)) == sorted({row.values["global_step"] for row in served.rows()})
    assert len(steps) == at + 11
    ledger = served.ledger()
    assert (2 * at + 1 + 20, {}, 0) == (ledger.delivered, dict(ledger.dropped), ledger.pending)
    assert ledger.balances


@pytest.mark.nightly
def test_a_metric_that_has_the_name_of_the_axis_does_not_hide_what_the_run_holds(serve: Serve):
    served = serve()
    worker = served.worker()
    worker.hello()
    for step in range(20):
        worker.log(records=[logged(step, loss=step, global_step=1000.5 + 7 * step)])
    eventually(lambda: len(served.steps()) >= 19, DEADLINE_S, served.log)
    served.kill()

    gone(served.run_dir / "delivery.db")
    served.start()

    assert served.finish() == ExitCode.COMPLETE
    assert "lost something" in served.log() or "damaged" in served.log()
    assert [(step, step, step) for step in range(20)] == [
        (row.step, row.values["loss"], row.values["sidestep/global_step"]) for row in served.rows()
    ]


@pytest.mark.nightly
@pytest.mark.parametrize("damage", DAMAGES)
def test_of_an_online_run_sends_the_server_nothing_twice(
    serve: Serve, damage: Callable[[Path], None], tmp_path: Path
):
    """What the server holds is in the run, also where nothing here says so any more."""
    with StandIn(tmp_path / "server") as server:
        key = {"WANDB_API_KEY": KEY}
        where = {"run__mode": "online", "run__project": "p", "sink__ask_every_s": 0.3}
        served = serve(sink="wandb", environment={**server.environment, **key}, **where)
        at = interrupted(served)
        held = server.steps("tested")
        assert len(held) >= at - 10

        damage(served.run_dir / "delivery.db")
        served.start()
        workers = [served.worker(rank, world=2, launch="after") for rank in range(2)]
        for worker in workers:
            worker.hello()
            worker.log(*range(at + 1, at + 11))
            worker.bye()

        assert served.finish() == ExitCode.COMPLETE
        assert "lost something" in served.log() or "damaged" in served.log()
        rows = server.rows("tested")
        assert held == [row["_step"] for row in rows][: len(held)]
        assert list(range(at + 11)) == sorted(row["global_step"] for row in rows)
        assert [] == server.breaches()
        ledger = served.ledger()
        assert (2 * at + 1 + 20, {}, 0) == (ledger.delivered, dict(ledger.dropped), ledger.pending)
        assert ledger.balances


@pytest.mark.nightly
def test_killed_while_it_learns_from_the_run_learns_it_again(serve: Serve):
    served = serve()
    at = interrupted(served)
    emptied(served.run_dir / "delivery.db")

    with served.kept_alive(crash_at="delivery.settled:2") as codes:
        eventually(lambda: served.log().count("lost something") >= 2, DEADLINE_S, served.log)
    served.kill()
    served.start()

    assert served.finish() == ExitCode.COMPLETE
    assert codes == [-signal.SIGKILL]  # intake's, from before: it is delivery that dies here
    assert len(served.steps()) == at + 1
    assert list(range(at + 1)) == sorted(row.values["global_step"] for row in served.rows())
    ledger = served.ledger()
    assert (2 * at + 1, {}, 0) == (ledger.delivered, dict(ledger.dropped), ledger.pending)
    assert ledger.balances


@pytest.mark.nightly
def test_of_arbitrary_damage_always_opens(serve: Serve, tmp_path: Path):
    """Bits flipped, pages zeroed, the end cut off, of the file and of its log."""
    served = serve()
    interrupted(served)
    luck = random.Random(7)
    for number in range(150):
        copy = tmp_path / f"copy{number}"
        copy.mkdir()
        for part in served.run_dir.glob("delivery.db*"):
            shutil.copy(part, copy)
        victim = luck.choice(sorted(copy.glob("delivery.db*")))
        content = bytearray(victim.read_bytes())
        at = luck.randrange(len(content))
        match luck.randrange(3):
            case 0:
                content[at] ^= 1 << luck.randrange(8)
            case 1:
                content[at : at + 4096] = bytes(len(content[at : at + 4096]))
            case _:
                del content[at:]
        victim.write_bytes(content)

        log = RowLog(copy / "delivery.db")

        log.settle(confirmed=[1], bookmark={"offset": 1})
        assert all(row.step >= 0 for row, _ in log.rows())
        log.close()
