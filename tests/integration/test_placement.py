"""A run whose spool lies elsewhere: it is found by everybody, survives kills, and comes home in the end."""

from __future__ import annotations

import shutil
from pathlib import Path

from sidestepd.errors import ExitCode
from tests.support.daemons import Serve, assert_run_whole


def test_a_run_is_served_from_another_disk_and_comes_home(serve: Serve, tmp_path: Path):
    served = serve(spool__dir=str(tmp_path / "local"))
    worker = served.worker()
    worker.hello()
    worker.log(0, 1, 2)

    assert tmp_path / "local" in served.home.parents
    assert not (served.run_dir / "spool.db").exists()
    worker.bye()
    assert served.finish() == ExitCode.COMPLETE

    assert served.home == served.run_dir
    assert [] == list((tmp_path / "local").iterdir())
    assert_run_whole(served, range(3))


def test_a_kill_leaves_it_where_it_is(serve: Serve, tmp_path: Path):
    served = serve(spool__dir=str(tmp_path / "local"))
    worker = served.worker()
    worker.hello()
    worker.log(0, 1)
    home = served.home

    served.kill()
    served.start()

    assert home == served.home
    assert worker.hello().first == 2
    worker.log(2)
    worker.bye()
    assert served.finish() == ExitCode.COMPLETE
    assert_run_whole(served, range(3))


def test_an_undrained_spool_goes_to_another_machine_with_its_run_directory(serve: Serve, tmp_path: Path):
    """The job ended in good order, and its local disk was wiped."""
    served = serve(spool__dir=str(tmp_path / "local"), order__patience_s=600.0)
    worker = served.worker(world=2)  # the other rank never comes, so all this waits in the spool
    worker.hello()
    worker.log(0, 1, 2)

    assert served.stop() == ExitCode.INTERRUPTED
    shutil.rmtree(tmp_path / "local")
    assert served.frames() == 3
    assert served.ledger().pending == 3
    served.start()

    assert tmp_path / "local" in served.home.parents
    assert worker.hello().first == 3
    worker.log(3)
    worker.bye()
    assert served.finish() == ExitCode.COMPLETE
    assert_run_whole(served, range(4))


def test_a_disk_that_is_gone_without_warning_costs_what_was_on_it(serve: Serve, tmp_path: Path):
    """Counted, and everything goes on: the run knows what it holds already."""
    served = serve(spool__dir=str(tmp_path / "local"), delivery__confirm_interval_s=600.0)
    worker = served.worker()
    worker.hello()
    worker.log(0, 1, 2)
    served.delivery()
    served.kill()
    held = served.steps()
    shutil.rmtree(tmp_path / "local")

    served.start()

    worker.hello(first=3)
    worker.log(3)
    worker.bye()
    assert served.finish() == ExitCode.COMPLETE
    assert [*held, 3] == served.steps()
    assert "is not here" in (served.run_dir / "logs" / "intake.log").read_text()
    ledger = served.ledger()
    assert (1, {"spool_lost": 3}, 0) == (ledger.delivered, dict(ledger.dropped), ledger.pending)
    assert ledger.balances
