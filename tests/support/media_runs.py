"""The same media in two offline runs: packed here and shown, and as wandb itself does it.

    python -m tests.support.media_runs FOLDER [heavy]

- all is packed before wandb is loaded, in a process that never heard of the daemon
- writes `FOLDER/ours` and `FOLDER/theirs`, one row for each name, and what went wrong into `FOLDER/told.json`
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sidestep import media, plot
from sidestep.media.implicit import media_of
from sidestep.testing import BlobFolder
from tests.support import media_cases


def main(folder: Path, *, heavy: bool) -> None:
    """Pack, show, log, and log again as wandb does."""
    blobs, made = BlobFolder(_made(folder / "blobs")), _made(folder / "made")
    ours = SimpleNamespace(**{name: getattr(media, name) for name in media.NAMES}, plot=plot)
    wrong: dict[str, str] = {}
    packed = _each(media_cases.values(ours, made, with_heavy=heavy), lambda value: pack(value, blobs), wrong)
    grown = [pack(table, blobs) for table in media_cases.growing(ours)]
    loaded = sorted({"wandb", "sidestepd", "pydantic"} & set(sys.modules))
    shown = _each(packed, lambda value: media.shown(value, blobs), wrong)
    _log(shown, (media.shown(value, blobs) for value in grown), folder / "ours", wrong)

    import wandb

    values = media_cases.values(wandb, made, with_heavy=heavy)
    _log(values, media_cases.growing(wandb), folder / "theirs", wrong)
    (folder / "told.json").write_text(json.dumps({"wrong": wrong, "loaded_to_pack": loaded}))


def pack(value: Any, blobs: BlobFolder) -> Any:
    """What stands in a record for a value that has media in it."""
    if (medium := media_of(value)) is not None:
        return media.packed(medium, blobs)
    if isinstance(value, dict):
        return {name: pack(item, blobs) for name, item in value.items()}
    return [pack(item, blobs) for item in value] if isinstance(value, list) else value


def _each(values: Mapping[str, Any], make: Callable[[Any], Any], wrong: dict[str, str]) -> dict[str, Any]:
    made = {}
    for name, value in values.items():
        try:
            made[name] = make(value)
        except (TypeError, ValueError) as error:
            wrong[name] = repr(error)
    return made


def _log(values: Mapping[str, Any], grown: Iterable[Any], folder: Path, wrong: dict[str, str]) -> None:
    import wandb

    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, x_disable_meta=True)
    with wandb.init(mode="offline", dir=_made(folder), reinit="create_new", id="same", settings=settings) as run:
        for step, (name, value) in enumerate(sorted(values.items())):
            try:
                run.log({name: value}, step=step, commit=True)
            except (TypeError, ValueError, wandb.Error) as error:
                wrong[name] = f"{folder.name}: {error!r}"
        for step, table in enumerate(grown, start=len(values)):
            run.log({media_cases.GROWING: table}, step=step, commit=True)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    main(Path(sys.argv[1]), heavy="heavy" in sys.argv)
