"""The samplers of one run directory: a process of their own, and a worker like any other, but no rank.

    python -m sidestepd.samplers RUN_DIR --parent PID

- what is read leaves through the client, over the socket and the spool, as every rank's words do
- each sampler has a thread; the main thread waits for SIGTERM, then says BYE, whoever may hang
- it dies with intake
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sidestep.notices import Notices
from sidestep.ranks import NODE, Identity
from sidestep.session import Session
from sidestep.settings import WorkerSettings
from sidestep.wire import SAMPLER, Kind
from sidestepd.config import Config
from sidestepd.processes import die_with_parent, read_json, step_back
from sidestepd.samplers.base import Pace, Reading, Sampler

logger = logging.getLogger("sidestepd.samplers")

NICENESS = 10
LAST_WORD_S = 2.0
TOLD = "gpus.json"
"""In the run directory: what people were told of GPUs."""
OUTBOX_BYTES = 4 * 1024 * 1024
"""Hours of samples."""


def make_samplers(config: Config, run_dir: Path) -> list[Sampler]:
    """Those that are switched on. Only here are they, and what they read with, imported."""
    options = config.samplers
    made: list[Sampler] = []
    if options.gpu:
        from sidestepd.samplers.gpu import GpuSampler
        from sidestepd.samplers.owners import Owners
        from sidestepd.samplers.told import Told

        owners, told = Owners.of_run(run_dir), Told(run_dir / TOLD)
        made.append(GpuSampler(slow_interval_s=options.slow_interval_s, owners=owners, told=told))
    if options.host:
        from sidestepd.samplers.host import HostSampler

        made.append(HostSampler(run_dir, paths=[Path(path) for path in options.paths]))
    if options.own:
        from sidestepd.samplers.own import OwnSampler

        made.append(OwnSampler(run_dir))
    return made


def make_session(run: dict[str, Any]) -> Session:
    """This process's session with the run's intake."""
    return Session(
        settings=WorkerSettings(
            address=run["address"], run_id=run["id"], outbox_bytes=OUTBOX_BYTES, when_full="drop", autostart=False
        ),
        identity=Identity(
            rank=0,
            world=1,
            local_rank=0,
            node=os.environ.get(NODE) or os.uname().nodename,
            pid=os.getpid(),
            launch=SAMPLER,
            attempt=0,
        ),
        keywords={},
        notices=Notices(),
        role=SAMPLER,
    )


class Tell:
    """Sends what the samplers read, from their threads, until `end`; what is read later was offered to nobody."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._lock = threading.Lock()
        self._ended = False

    def __call__(self, reading: Reading) -> None:
        """One record of samples, and one for each notice."""
        with self._lock:
            if not self._ended:
                self._send(reading)

    def end(self) -> None:
        """Nothing is sent any more when this returns."""
        with self._lock:
            self._ended = True

    def _send(self, reading: Reading) -> None:
        if reading.values or reading.gpus is not None:
            gpus = {} if reading.gpus is None else {"gpus": dict(reading.gpus)}
            self._session.send(Kind.SAMPLES, {"values": reading.values, **gpus})
        for notice in reading.notices:
            logger.warning("%s: %s", notice.title, notice.text)
            self._session.send(Kind.ALERT, {"title": notice.title, "text": notice.text, "level": notice.level})


def main(arguments: Sequence[str] | None = None) -> None:
    """Until SIGTERM."""
    parser = argparse.ArgumentParser(prog="sidestepd.samplers", description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--parent", type=int, required=True, help="die when this process ends")
    parser.add_argument("--interval", type=float, help="seconds, instead of what the run's options say")
    options = parser.parse_args(arguments)
    die_with_parent(options.parent)
    step_back(NICENESS)
    stop = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the command
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    directory: Path = options.run_dir
    config = Config.from_json((directory / "config.json").read_text())
    session = make_session(read_json(directory / "run.json"))
    tell = Tell(session)
    interval = options.interval or config.samplers.interval_s
    for sampler in make_samplers(config, directory):
        pace = Pace(sampler, tell, stop, interval_s=interval)
        threading.Thread(target=pace.run, name=type(sampler).__name__, daemon=True).start()
    stop.wait()
    tell.end()
    session.finish(LAST_WORD_S, 0)


if __name__ == "__main__":
    try:
        main()
    except Exception:
        logger.exception("the samplers end, and will be started again")
        code = 1
    else:
        code = 0
    logging.shutdown()
    os._exit(code)  # a thread that hangs in a driver is not waited for
