"""Artifacts and files are in the run as the same calls to wandb put them there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sidestepd import status
from sidestepd.sinks import wandb_log


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs with the same artifacts."""
    made = tmp_path_factory.mktemp("artifacts")
    environ = {**os.environ, "WANDB_DATA_DIR": str(made), "WANDB_CACHE_DIR": str(made)}
    module = [sys.executable, "-m", "tests.support.artifact_runs"]
    options = ["--mode", "offline", "--samplers", "off", "--dir", str(made)]
    served = [sys.executable, "-m", "sidestep", "run", *options, "--", *module, "worker", str(made)]
    for command in (served, [*module, "wandb", str(made)]):
        subprocess.run(command, env=environ, check=True, timeout=200)
    return made


@pytest.fixture(scope="module")
def ours(folder: Path) -> Path:
    """The run that the daemon wrote."""
    (run,) = (folder / "sidestep-runs").glob("2*")
    return run


def artifacts(run: Path) -> list[dict[str, Any]]:
    """Every artifact in the files of a run, without what differs from run to run."""
    (segment,) = wandb_log.segments(run / "wandb")
    id_ = segment.stem.removeprefix("run-")
    return sorted(
        (
            {
                "name": record.artifact.name.replace(id_, "ID"),
                "type": record.artifact.type,
                "digest": record.artifact.digest,
                "description": record.artifact.description,
                "metadata": json.loads(record.artifact.metadata or "{}"),
                "aliases": sorted(record.artifact.aliases),
                "tags": list(record.artifact.tags),
                "project": record.artifact.project,
                "finalize": record.artifact.finalize,
                "entries": {it.path: (it.digest, it.size, it.ref) for it in record.artifact.manifest.contents},
                "contents": {
                    it.path: Path(it.local_path).read_bytes()
                    for it in record.artifact.manifest.contents
                    if it.local_path
                },
            }
            for record in wandb_log.records(segment)
            if record.HasField("artifact")
        ),
        key=lambda it: str(it["name"]),
    )


def saved(run: Path) -> dict[str, bytes]:
    """The files of the run that its program saved, and their content."""
    (segment,) = wandb_log.segments(run / "wandb")
    paths = [it.path for it in _files(segment) if it.path.startswith("nested/")]
    return {path: (segment.parent / "files" / path).read_bytes() for path in paths}


def _files(segment: Path) -> list[Any]:
    records = (record.files for record in wandb_log.records(segment) if record.HasField("files"))
    return [it for files in records for it in files.files]


class TestArtifacts:
    def test_they_are_what_wandb_makes_of_the_same_calls(self, folder: Path, ours: Path):
        theirs, found = artifacts(folder), artifacts(ours)

        assert [it["name"] for it in theirs] == [it["name"] for it in found]
        for expected, actual in zip(theirs, found, strict=True):
            assert expected == actual

    def test_files_lie_among_those_of_the_run(self, folder: Path, ours: Path):
        assert saved(folder) == saved(ours)
        assert {"nested/a.txt", "nested/deeper/empty"} == saved(ours).keys()

    def test_each_is_counted_and_nothing_is_left_of_what_came(self, ours: Path):
        report = status.report(ours)

        assert {"delivered": 8, "unchanged": 0, "waiting": 0, "left_out": {}} == report.artifacts
        assert report.ledger.balances
        assert (report.ledger.offered, 0) == (report.ledger.delivered, report.ledger.pending)
        assert [] == list((ours / "blobs").iterdir())
