"""What a run has beside rows, out of its files into another run: artifacts, tables, media, and files of the run.

- an artifact is handed over as it was written down; its files are read where they lie
- of a file that several segments have, the newest counts
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import wandb
from wandb.proto import wandb_internal_pb2 as pb

from sidestepd.sinks import wandb_log

logger = logging.getLogger(__name__)

OF_A_SEGMENT = frozenset({"output.log", "config.yaml", "wandb-summary.json", "wandb-metadata.json"})
"""Files that wandb makes anew for each."""


def held_artifacts(folder: Path) -> Iterator[Any]:
    """The records of all artifacts in a run's files, in their order, each once."""
    seen = set()
    for path in wandb_log.segments(folder):
        for record in wandb_log.records(path):
            if record.HasField("artifact") and record.artifact.client_id not in seen:
                seen.add(record.artifact.client_id)
                yield record.artifact


def held_files(folder: Path) -> dict[str, Path]:
    """The files of a run that are there, by their names in it."""
    found = {}
    for segment in wandb_log.segments(folder):
        for record in wandb_log.records(segment):
            for it in record.files.files if record.HasField("files") else ():
                path = segment.parent / "files" / it.path
                if it.path not in OF_A_SEGMENT and path.is_file():
                    found[str(it.path)] = path
    return found


def carry_files(run: wandb.Run, folder: Path) -> None:
    """Into another run."""
    own = Path(run.settings.files_dir)
    for name, source in held_files(folder).items():
        target = own / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(source, target)
        except OSError:  # another disk
            shutil.copyfile(source, target)
        run.save(str(target), base_path=str(own), policy="now", glob=False)


def carry_artifacts(
    run: wandb.Run, folder: Path, *, skip: Container[str], hand_over: Callable[[Any], None]
) -> None:
    """Into another run, but for those in `skip`, by their client ids; `hand_over` takes each record."""
    for held in held_artifacts(folder):
        if held.client_id in skip:
            continue
        gone = [it.path for it in held.manifest.contents if it.local_path and not Path(it.local_path).is_file()]
        if gone:
            logger.error("the artifact %s is left out: %s is not where it was", held.name, ", ".join(gone[:5]))
            continue
        record = pb.ArtifactRecord()  # type: ignore[attr-defined]
        record.CopyFrom(held)
        record.run_id, record.project, record.entity = run.id, run.project or "", run.entity or ""
        hand_over(record)
