"""What the run is called, and how it is to be opened: settled once, from all who have a say, for all lives."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sidestepd import placement
from sidestepd.config import Config
from sidestepd.processes import Beat, read_json
from sidestepd.rowlog import RowLog, RowLogReader
from sidestepd.rundir import earlier_of
from sidestepd.sinks import MODES, RunFacts
from sidestepd.spool import EntryKind, SpoolReader


def settle_facts(run: Mapping[str, Any], config: Config, said: Mapping[str, Any]) -> dict[str, Any]:
    """What the run is called: the command line's word, then the first worker's `init()`, then the rest."""
    facts = {}
    for name in (
        "project", "entity", "name", "group", "job_type", "tags", "notes", "mode", "resume", "sweep_id",
    ):  # fmt: skip
        given = config.source(f"run.{name}").startswith("-")
        facts[name] = run.get(name) if given else _named(name, said) or run.get(name)
    return {name: value for name, value in facts.items() if value}


def _named(name: str, said: Mapping[str, Any]) -> Any:
    """What `init()` calls the run, if it is of a kind that wandb takes."""
    value = said.get(name)
    match name:
        case "tags":
            return [tag for tag in value if isinstance(tag, str) and tag] if isinstance(value, list) else None
        case "mode":
            return value if value in MODES["wandb"] else None
        case "resume":
            return value if value in ("allow", "must", "never") else None
    return value if isinstance(value, str) else None


def wait_for_facts(
    spool: SpoolReader, rowlog: RowLog, run: Mapping[str, Any], config: Config, beat: Beat
) -> RunFacts:
    """The run to open, once the first worker said what it is called; later lives open the same."""
    facts = rowlog.meta("run", None)
    if facts is None and (about := read_json(Path(run["dir"]) / "about.json")):
        facts = settle_facts(run, config, about)  # it was opened before, and the row log lost that
        rowlog.settle(run=facts, base=about.get("base", -1))
    while facts is None:
        beat()
        first = spool.first(EntryKind.HELLO, EntryKind.CLOSE)
        if first is None:
            time.sleep(config.delivery.poll_interval_s)
            continue
        facts = settle_facts(run, config, first.facts.get("settings", {}))
        before = _reached_before(run) if facts.get("mode") != "online" else -1  # online the server knows better
        if before >= 0:
            rowlog.settle(run=facts, base=before)
        else:
            rowlog.settle(run=facts)
    names = {name: facts.pop(name, None) for name in ("project", "entity", "name")}
    how = {name: facts.pop(name) for name in ("mode", "resume", "sweep_id") if name in facts}
    return RunFacts(
        id=run["id"],
        directory=Path(run["dir"]),
        server=config.sink.server,
        ask_every_s=config.sink.ask_every_s,
        stall_s=config.delivery.stall_s,
        earlier=earlier_of(Path(run["dir"]), run["id"]),
        options=facts,
        **names,
        **how,
    )


def _reached_before(run: Mapping[str, Any]) -> int:
    """The last step of the runs of this id that began before; this one goes on behind it."""
    return max(map(_last_step, earlier_of(Path(run["dir"]), run["id"])), default=-1)


def _last_step(run_dir: Path) -> int:
    rowlog = RowLogReader(placement.home(run_dir) / placement.ROW_LOG)
    return int(rowlog.meta("marks", {}).get("last", -1))
