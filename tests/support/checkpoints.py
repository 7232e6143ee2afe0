"""A training that logs a checkpoint at every step, as an artifact and as a file of the run; and what a run holds.

    python -m tests.support.checkpoints --steps 6 --megabytes 3 --until FILE

It goes on after its steps until FILE is there. A checkpoint says whose it is in its first bytes, and has that in
its metadata; it is written over the one before, once the daemon has that on its disk.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import sidestep
from sidestepd.sinks import wandb_log

PATIENCE_S = 120.0
MB = 1024 * 1024


def content(step: int, megabytes: float) -> bytes:
    """The bytes of a checkpoint: none is like another."""
    noise = np.random.default_rng(step).integers(0, 256, int(megabytes * MB), dtype=np.uint8).tobytes()
    return f"{step:08}".encode() + noise


def train(steps: int, megabytes: float, until: Path | None, folder: Path) -> int:
    """One rank."""
    run = sidestep.init(project="checkpoints")
    path = folder / "model.bin"
    for step in itertools.count():
        if step >= steps and (until is None or until.exists()):
            break
        draft = folder / "model.draft"
        draft.write_bytes(content(step, megabytes))
        draft.rename(path)
        artifact = sidestep.Artifact("model", "model", metadata={"step": step})
        artifact.add_file(path)
        with artifact.new_file("notes.txt") as file:
            file.write(f"step {step}")
        run.log_artifact(artifact, aliases=[f"step-{step}"])
        (folder / f"note-{step}.txt").write_text(f"note {step}")
        run.save(folder / f"note-{step}.txt", base_path=folder, policy="now")
        run.log({"mine": step}, step=step)
        if not run.flush(PATIENCE_S):
            print("not all came", file=sys.stderr)
    run.finish(timeout=60.0)
    if until is not None:
        until.with_suffix(".steps").write_text(str(step))
    return 0


def command(*, steps: int, folder: Path, megabytes: float = 1.0, until: Path | None = None) -> list[str]:
    """The command of it."""
    words = ["--steps", str(steps), "--megabytes", str(megabytes), "--folder", str(folder)]
    words += ["--until", str(until)] if until else []
    return [sys.executable, "-m", "tests.support.checkpoints", *words]


def steps_taken(until: Path) -> int:
    """How many steps it took in the end."""
    return int(until.with_suffix(".steps").read_text())


def versions(run_dir: Path) -> list[tuple[int, str, str]]:
    """Step, alias and SHA-256 of every checkpoint in a run, in their order, each read from its file."""
    found = _lines(run_dir) if (run_dir / "rows.jsonl").exists() else _segments(run_dir)
    return list(found)


def expected(steps: int, megabytes: float) -> list[tuple[int, str, str]]:
    """What that shall be."""
    sums = (hashlib.sha256(content(step, megabytes)).hexdigest() for step in range(steps))
    return [(step, f"step-{step}", sha256) for step, sha256 in enumerate(sums)]


def notes(run_dir: Path) -> set[tuple[str, str]]:
    """The files that were saved, and what is in them."""
    if not (run_dir / "rows.jsonl").exists():
        found = run_dir.glob("wandb/offline-run-*/files/note-*.txt")
        return {(path.name, path.read_text()) for path in found}
    entries = (it for line in _said(run_dir) for it in line.get("files", {}).get("entries", ()))
    return {(it["path"], (run_dir / it["file"]).read_text()) for it in entries}


def _said(run_dir: Path) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in (run_dir / "rows.jsonl").read_bytes().splitlines())


def _lines(run_dir: Path) -> Iterator[tuple[int, str, str]]:
    for line in _said(run_dir):
        if "artifact" in line:
            it = line["artifact"]
            files = {entry["path"]: run_dir / entry["file"] for entry in it["entries"]}
            yield _version(it["metadata"], it["aliases"], files)


def _segments(run_dir: Path) -> Iterator[tuple[int, str, str]]:
    for segment in wandb_log.segments(run_dir / "wandb"):
        for record in wandb_log.records(segment):
            if record.HasField("artifact"):
                it = record.artifact
                files = {entry.path: Path(entry.local_path) for entry in it.manifest.contents}
                yield _version(json.loads(it.metadata), it.aliases, files)


def _version(metadata: Any, aliases: Any, files: dict[str, Path]) -> tuple[int, str, str]:
    assert {"model.bin", "notes.txt"} == files.keys()
    assert f"step {metadata['step']}" == files["notes.txt"].read_text()
    (alias,) = set(aliases) - {"latest"}
    return metadata["step"], alias, hashlib.sha256(files["model.bin"].read_bytes()).hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--megabytes", type=float, default=1.0)
    parser.add_argument("--until", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    sys.exit(train(options.steps, options.megabytes, options.until, options.folder))
