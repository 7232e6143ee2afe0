"""The same media in two offline runs: through the daemon, and by wandb itself.

    sidestep run --mode offline --dir FOLDER -- python -m tests.support.media_runs worker FOLDER [heavy]
    python -m tests.support.media_runs wandb FOLDER [heavy]

- one row for each name, in the same order
- the worker raises for what it refuses, and writes down what it has loaded to pack all of it
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support import media_cases


def worker(folder: Path, *, heavy: bool) -> None:
    """As a training does it."""
    import sidestep

    with sidestep.init(strict=True) as run:
        _log(sidestep, run.log, folder, heavy=heavy)
        run.log(media_cases.implied(), step=1000)
        loaded = sorted({"wandb", "sidestepd", "pydantic", "click"} & set(sys.modules))
        (folder / "loaded.json").write_text(json.dumps(loaded))
        _wait_until_all_are_in_the_run(run)


def _wait_until_all_are_in_the_run(run: Any) -> None:
    """A run that ends does not wait for what takes long to encode on a slow machine: this one ends later."""
    from sidestepd import status
    from tests.support.waiting import eventually

    directory, said = Path(os.environ["SIDESTEP_RUN_DIR"]), run.stats().offered
    run.flush(60.0)

    def all_there() -> bool:
        found = status.report(directory)
        return not found.media.get("waiting") and found.ledger.delivered >= said

    eventually(all_there, 150.0, lambda: f"{status.report(directory)}")


def reference(folder: Path, *, heavy: bool) -> None:
    """With the settings of the daemon's sink."""
    import wandb

    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, x_disable_meta=True)
    with wandb.init(mode="offline", dir=folder, id="same", settings=settings) as run:
        _log(wandb, lambda values, step: run.log(values, step=step, commit=True), folder, heavy=heavy)


def _log(module: Any, log: Callable[[dict[str, Any], int], object], folder: Path, *, heavy: bool) -> None:
    made = folder / "made"
    made.mkdir(exist_ok=True)
    values = media_cases.values(module, made, with_heavy=heavy)
    for step, name in enumerate(sorted(values)):
        log({name: values[name]}, step)
    for step, table in enumerate(media_cases.growing(module), start=len(values)):
        log({media_cases.GROWING: table}, step)


if __name__ == "__main__":
    {"worker": worker, "wandb": reference}[sys.argv[1]](Path(sys.argv[2]), heavy="heavy" in sys.argv)
