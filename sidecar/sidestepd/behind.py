"""A process behind a run's spool, delivery or a relay's forwarder: what it finds when it starts, and how it ends.

- it holds a lock, so that there is never a second one, and dies with intake
- it shows that it is not stuck, and waits for room where a disk is full
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from sidestepd import placement
from sidestepd.clock import Horizon
from sidestepd.config import Config
from sidestepd.errors import ExitCode, Fatal, SpoolDamaged, Trouble
from sidestepd.processes import Beat, Lock, die_with_parent, step_back
from sidestepd.room import Ballast, Patience
from sidestepd.rowlog import RowLog
from sidestepd.rundir import tell_trouble
from sidestepd.spool import SpoolReader


@dataclass(frozen=True, slots=True, kw_only=True)
class Behind:
    """What stands in a run directory for who works behind its spool."""

    directory: Path
    config: Config
    beat: Beat
    patience: Patience
    spool: SpoolReader
    rowlog: RowLog
    horizon: Horizon
    troubled: Callable[[Trouble | None], None]
    """Tells those who ask for the run's status why nothing moves; None when it does again."""
    lock: Lock

    @property
    def is_done(self) -> bool:
        """Whether the last life did all of it, and died before it could say so."""
        return bool(self.rowlog.meta("state", None) == "closed")

    @contextmanager
    def told(self) -> Iterator[None]:
        """What can not be done by this process is told before it ends."""
        try:
            yield
        except Fatal as error:
            if error.trouble:
                self.troubled(error.trouble)
            raise


def begin(module: str, what: str, arguments: Sequence[str] | None, *, niceness: int) -> Behind:
    """Start as intake started it: `python -m MODULE RUN_DIR --parent PID`."""
    parser = argparse.ArgumentParser(prog=module, description=what)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--parent", type=int, required=True, help="die when this process ends")
    options = parser.parse_args(arguments)
    die_with_parent(options.parent)
    step_back(niceness)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the command; the run is drained after it
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    directory: Path = options.run_dir
    lock = Lock(directory / "delivery.lock")
    lock.acquire()
    config = Config.from_json((directory / "config.json").read_text())
    beat = Beat(directory / "delivery.beat")
    home = placement.home(directory)
    ballast = Ballast(home / "delivery.ballast", config.spool.ballast_bytes)
    patience = Patience(ballast, [home, directory], beat=beat)
    return Behind(
        directory=directory,
        config=config,
        beat=beat,
        patience=patience,
        spool=SpoolReader(home / placement.SPOOL),
        rowlog=RowLog(home / placement.ROW_LOG, when_full=patience.when_full),
        horizon=Horizon(directory / "horizon"),
        troubled=partial(tell_trouble, directory),
        lock=lock,
    )


def end(main: Callable[[], int], logger: logging.Logger) -> NoReturn:
    """Do it, and leave at once: wandb's exit hooks wait without bound for a core that may be gone."""
    try:
        code = main()
    except SpoolDamaged:
        logger.exception("the spool is damaged")
        code = ExitCode.DISK
    except Exception:
        logger.exception("this process ends, and will be started again")
        code = ExitCode.SOFTWARE
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)
