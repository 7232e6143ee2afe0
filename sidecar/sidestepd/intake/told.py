"""What workers that ask are told of the run: as it was begun, and as wandb has it since."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sidestepd.processes import read_json
from sidestepd.rundir import RunFile

TOLD = ("id", "mode", "project", "entity", "name", "group", "job_type", "sweep_id")
MOST_TOLD_CHARS = 4000
"""Of one fact."""


def facts_of(run: RunFile, run_dir: Path) -> dict[str, Any]:
    """All of it, as a message can say it."""
    about = read_json(run_dir / "about.json")
    facts = {name: getattr(run, name) for name in TOLD}
    return _sayable({**facts, "tags": list(run.tags), **_known(about), "dir": str(run_dir)})


def _known(about: dict[str, Any]) -> dict[str, Any]:
    """What delivery wrote down of the run, and workers may ask for; long notes would be too much for a message."""
    names = (
        "name", "project", "entity", "mode", "url", "starting_step", "resumed", "group", "job_type", "tags",
        "notes", "sweep_id", "start_time",
    )  # fmt: skip
    return {name: about[name] for name in names if about.get(name) and len(str(about[name])) <= MOST_TOLD_CHARS}


def _sayable(facts: dict[str, Any]) -> dict[str, Any]:
    """A path or an argument may hold bytes that are no text; a message can not."""
    return {
        name: value.encode(errors="replace").decode() if isinstance(value, str) else value
        for name, value in facts.items()
    }
