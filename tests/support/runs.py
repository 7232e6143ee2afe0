"""A run in one process, without a daemon, and what waits in its outbox."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from sidestep._run import Run
from sidestep.notices import Notices
from sidestep.ranks import Identity
from sidestep.session import Session
from sidestep.settings import WorkerSettings
from sidestep.wire import Kind, Record, Undecodable, decode_records

ME = Identity(rank=1, world=2, local_rank=1, node="here", pid=os.getpid(), launch="test", attempt=0)


def new_run(**options: Any) -> Run:
    session = Session(
        settings=WorkerSettings(**{"when_full": "drop", **options}), identity=ME, keywords={}, notices=Notices()
    )
    return Run(session, {})


def records(run: Run) -> list[Record | Undecodable]:
    """What waits in the outbox."""
    found = []
    run._session.outbox.credit = 1 << 30
    while (frame := run._session.outbox.next_frame()) is not None:
        found += decode_records(frame.body, frame.count)
        run._session.outbox.ack(frame.end)
    return found


def logged(run: Run) -> list[tuple[Kind, int | None, Mapping[str, Any]]]:
    found = records(run)
    assert [] == [record for record in found if isinstance(record, Undecodable)]
    return [(record.kind, record.step, record.data) for record in found if isinstance(record, Record)]


def data(run: Run) -> list[Mapping[str, Any]]:
    return [entries for _, _, entries in logged(run)]


def steps(run: Run) -> list[tuple[Kind, int | None]]:
    return [(kind, step) for kind, step, _ in logged(run)]


def balanced(run: Run) -> bool:
    stats = run.stats()
    return stats.offered == stats.acknowledged + stats.pending + sum(stats.dropped.values())
