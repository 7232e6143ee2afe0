"""The spool of a run, opened wherever it lies, and how much it may still take."""

from __future__ import annotations

from pathlib import Path

from sidestepd import placement
from sidestepd.config import Config
from sidestepd.room import Ballast, Room, open_spool
from sidestepd.rowlog import RowLogReader
from sidestepd.spool import Spool


def open_room(run_dir: Path, config: Config) -> tuple[Spool, Room]:
    """Raises what the disk has against it."""
    options = config.spool
    home = placement.settle(run_dir, options.dir)
    above = RowLogReader(home / placement.ROW_LOG).newest()
    ballast = Ballast(home / "spool.ballast", options.ballast_bytes)
    spool = open_spool(lambda: Spool(home / placement.SPOOL, above=above, quota=options.max_bytes), ballast)
    return spool, Room(spool, ballast, [home, run_dir], quota=options.max_bytes, reserve=options.reserve_bytes)
