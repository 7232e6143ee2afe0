"""What becomes of wandb's keywords of `init()` that are not simply taken over.

- each is honoured, or `REFUSED` says once what is done instead, or it is in `HARMLESS`: nobody misses it
- wandb's settings that name the run mean the same as the keyword of that name
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

HARMLESS = frozenset({"allow_val_change", "anonymous", "force"})
"""A configuration may always change; the key is the daemon's, so no login can be forced."""

REFUSED: Mapping[str, str] = {
    "fork_from": "a run is not forked here: it begins as a new one. `wandb` forks runs that are finished",
    "resume_from": "a run is not rewound here: it goes on behind its last row, and steps said again are rows of "
    "their own",
    "monitor_gym": "videos of gym are not recorded by themselves: log them as sidestep.Video",
}
"""Keyword to what is done instead. Any other keyword that is not known is without effect, and said."""

MEANINGS: Mapping[str, str] = {
    "run_id": "id", "run_name": "name", "run_group": "group", "run_job_type": "job_type", "run_notes": "notes",
    "run_tags": "tags", "project": "project", "entity": "entity", "mode": "mode", "resume": "resume",
    "root_dir": "dir",
}  # fmt: skip
"""wandb's settings that are keywords of `init()` under another name."""

QUIET_SETTINGS = frozenset(
    {
        "_disable_meta", "_disable_stats", "allow_val_change", "anonymous", "api_key", "autostart", "console",
        "disable_code", "disable_git", "disable_job_creation", "email", "finish_timeout",
        "finish_timeout_raises", "host", "init_timeout", "job_name", "label_disable", "login_timeout",
        "program", "program_relpath", "quiet", "save_code", "show_errors", "show_info", "show_warnings", "silent",
        "start_method", "sync_tensorboard", "sweep_id", "username", "x_disable_meta", "x_disable_stats", "x_label",
        "x_primary", "x_save_requirements", "x_stats_sampling_interval", "x_update_finish_state",
    }
)  # fmt: skip
"""Settings that change how wandb goes about it, which is the daemon's business and not missed in a worker."""


def named_by(settings: Mapping[Any, Any]) -> dict[str, Any]:
    """What settings call the run, as keywords of `init()`."""
    return {MEANINGS[name]: value for name, value in settings.items() if name in MEANINGS and value is not None}


def complain(
    keywords: Mapping[str, Any], settings: Mapping[Any, Any], say: Callable[[tuple[str, ...], str], None]
) -> None:
    """Say what is not honoured, each once."""
    given = {name for name, value in keywords.items() if value and name not in HARMLESS}
    for name in sorted(given & REFUSED.keys()):
        say(("init", name), f"init({name}=...): {REFUSED[name]}")
    if names := sorted(given - REFUSED.keys()):
        say(("init", *names), f"init({', '.join(names)}): without effect here")
    unknown = [str(name) for name in settings if name not in QUIET_SETTINGS and name not in MEANINGS]
    if unknown:
        names = sorted(unknown)
        say(("settings", *names), f"init(settings=...): {', '.join(names)[:500]}: without effect here")
