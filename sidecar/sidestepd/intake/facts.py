"""What a worker may know of the run, and how often it shall speak: by the files of its daemon.

- text that a message can not hold is made into some that it can
- a relay tells no id of its own making: the run is called what it is called above
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidestepd.config import Config
from sidestepd.processes import read_json
from sidestepd.rundir import UPSTREAM, RunFile

if TYPE_CHECKING:
    from sidestepd.intake.run import Intake

TOLD = ("id", "mode", "project", "entity", "name", "group", "job_type", "sweep_id")
MOST_TOLD_CHARS = 4000
"""Of one fact about the run, to workers that ask."""
_KNOWN: tuple[str, ...] = (
    "name", "project", "entity", "mode", "url", "starting_step", "resumed", "group", "job_type", "tags", "notes",
    "sweep_id", "start_time",
)  # fmt: skip


class Known:
    """What is known of a run by now. Each HELLO is told: what is written of it is read again when it changed."""

    def __init__(self, run: RunFile, run_dir: Path, *, is_relay: bool) -> None:
        self._run, self._run_dir, self._is_relay = run, run_dir, is_relay
        self._file = run_dir / "about.json"
        self._seen: tuple[int, ...] | None = None
        self._facts: dict[str, Any] = {}

    def __call__(self) -> dict[str, Any]:
        """Names and plain values."""
        seen = _state_of(self._file)
        if seen != self._seen or not self._facts:
            self._seen = seen  # as of before reading: what changes meanwhile is read the next time
            self._facts = _facts_of(self._run, self._run_dir, read_json(self._file), is_relay=self._is_relay)
        return dict(self._facts)


def _state_of(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _facts_of(run: RunFile, run_dir: Path, about: Mapping[str, Any], *, is_relay: bool) -> dict[str, Any]:
    facts = {name: getattr(run, name) for name in TOLD}
    if run.tags:  # none yet are not known to be none: a worker may have given some
        facts["tags"] = list(run.tags)
    names = _KNOWN
    if is_relay:
        names = (*_KNOWN, "id")
        if not run.named:
            del facts["id"]
    # What was written down of it; long notes would be too much for a message.
    known = {name: about[name] for name in names if about.get(name) and len(str(about[name])) <= MOST_TOLD_CHARS}
    return _sayable({**facts, **known, "dir": str(run_dir)})


FRAMES_PER_S = 4000
"""Of all ranks together. Where they are many each speaks less often, and says more at once."""
LONGEST_FLUSH_S = 2.0
FLUSH_TO_RELAY_S, FRAMES_PER_S_OF_RELAYS = 0.2, 2000
"""A relay's workers speak less often in any case: each of their frames is one for the daemon above too."""


def intervals_of(config: Config, run_dir: Path, world: int) -> dict[str, float]:
    """How often workers speak, and tell samples of their own: never more often than is wanted above."""
    frames_per_s = FRAMES_PER_S_OF_RELAYS if config.is_relay else FRAMES_PER_S
    flush = max(config.intake.flush_interval_s, min(LONGEST_FLUSH_S, world / frames_per_s))
    sample = config.samplers.torch_interval_s
    if config.is_relay:
        flush = max(flush, FLUSH_TO_RELAY_S)
        above = read_json(run_dir / UPSTREAM)
        flush = max(flush, above.get("flush_interval_s", 0.0))
        wanted = above.get("sample_interval_s", sample)
        sample = max(sample, wanted) if sample and wanted else 0.0
    return {"flush_interval_s": flush, "sample_interval_s": sample}


MOST_OFTEN_S, SELDOM_S = 0.5, 3600.0
"""Between which a worker may wish the machine to be read."""


def wished(options: Config, said: Mapping[str, Any]) -> dict[str, Any]:
    """What wandb's settings of a worker say of samplers, where our own options say nothing."""
    interval = said.get("x_stats_sampling_interval")
    in_range = isinstance(interval, float) and MOST_OFTEN_S <= interval < SELDOM_S
    ours = options.source("samplers.interval_s") != "default"
    return {
        "enabled": options.source("samplers.enabled") != "default" or said.get("x_disable_stats") is not True,
        "interval_s": interval if in_range and not ours else None,
    }


def _sayable(facts: dict[str, Any]) -> dict[str, Any]:
    """A path or an argument may hold bytes that are no text; a message can not."""
    return {
        name: value.encode(errors="replace").decode() if isinstance(value, str) else value
        for name, value in facts.items()
    }


def report_of(intake: Intake, *, held: int) -> dict[str, Any]:
    """How a run is; `held` sessions were told to keep what they have."""
    return {
        "run": intake.facts(),
        "boot": intake.boot,
        "closing": intake.closing,
        "silent_s": time.monotonic() - intake.went_round_at,
        "sessions": len(intake.roster.workers),
        "live": len(intake.roster.live),
        "relays": intake.relays.report(),
        "duplicates": intake.roster.duplicates,
        "gaps": intake.roster.gaps,
        "salvaged": intake.spool.salvaged,
        "room": {**intake.room.facts(), "held": held},
        "blobs": {"bytes": intake.blobs.used + intake.blobs.theirs, "closed": intake.blobs.closed},
        "collected": intake.collector.collected,
        "delivery": {"pid": intake.keeper.pid, "restarts": intake.keeper.restarts},
        "samplers": {"pid": intake.samplers.pid, "restarts": intake.samplers.restarts},
    }
