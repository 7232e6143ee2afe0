"""Every kind of media is in the run as the same call to wandb puts it there: pixels, samples, rows, captions."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Pillow

from sidestep.media import KINDS
from sidestepd import status
from sidestepd.sinks import wandb_log

NAMES = {"artifact_path", "_latest_artifact_path", "sha256", "size", "path"}
"""What depends on how a file was written, and not on what is in it."""
GROWING = "table/growing"
PICTURES = {".png", ".jpg", ".bmp"}


@pytest.fixture(scope="module", params=["light", pytest.param("heavy", marks=pytest.mark.nightly)])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs with the same media; the heavy ones take torch and scikit-learn."""
    made = tmp_path_factory.mktemp("media")
    environ = {**os.environ, "WANDB_DATA_DIR": str(made), "WANDB_CACHE_DIR": str(made), "MPLCONFIGDIR": str(made)}
    python = sys.executable
    worker = [python, "-m", "tests.support.media_runs", "worker", made, request.param]
    served = [
        python,
        "-m",
        "sidestep",
        "run",
        "--mode",
        "offline",
        "--samplers",
        "off",
        "--dir",
        made,
        "--",
        *worker,
    ]
    for command in (served, [python, "-m", "tests.support.media_runs", "wandb", made, request.param]):
        subprocess.run(command, env=environ, check=True, timeout=200)
    return made


@pytest.fixture(scope="module")
def ours(folder: Path) -> Path:
    """The run that the daemon wrote."""
    (run,) = (folder / "sidestep-runs").glob("2*")
    return run


def history(run: Path) -> dict[str, Any]:
    """What was logged under each name, with the content of the files in the place of their names."""
    (segment,) = wandb_log.segments(run / "wandb")
    return {
        name: with_content(value, segment.parent / "files")
        for row in wandb_log.nested_history(segment)
        for name, value in row.values.items()
        if not name.startswith("_") and name not in (GROWING, "global_step")
    }


def with_content(value: Any, files: Path) -> Any:
    if isinstance(value, list):
        return [with_content(item, files) for item in value]
    if not isinstance(value, dict):
        return value
    found = {name: with_content(item, files) for name, item in value.items() if name not in NAMES}
    if isinstance(path := value.get("path"), str):
        found["content"] = content(files / path)
    if "filenames" in found:
        found["filenames"] = [content(files / path) for path in value["filenames"]]
    return found


def content(path: Path) -> Any:
    suffix = path.suffix
    if suffix in PICTURES:
        with Pillow.open(path) as image:
            return suffix, image.mode, image.size, hashlib.sha256(image.tobytes()).hexdigest()
    if suffix == ".json":
        return json.loads(path.read_text())
    return suffix, path.read_bytes()


def increments(run: Path) -> list[dict[str, Any]]:
    """What was logged of the table that grows."""
    (segment,) = wandb_log.segments(run / "wandb")
    return [
        with_content(row.values[GROWING], segment.parent / "files")
        for row in wandb_log.nested_history(segment)
        if GROWING in row.values
    ]


def drawings(run: Path) -> Any:
    """What the run's charts are drawn by."""
    (segment,) = wandb_log.segments(run / "wandb")
    return {
        name: value
        for record in wandb_log.records(segment)
        if record.HasField("config")
        for item in record.config.update
        for name, value in [("/".join(item.nested_key), item.value_json)]
        if "visualize" in name or "viz" in name
    }


def kind_of(name: str) -> str:
    first = name.removeprefix("Custom Chart Tables/").partition("/")[0]
    return {"plot": "chart", "list": "html", "nested": "image"}.get(first, first)


class TestAgainstWandb:
    def test_packing_loads_nothing_that_a_worker_goes_without(self, folder: Path):
        assert [] == json.loads((folder / "loaded.json").read_text())

    def test_nothing_is_left_out(self, ours: Path):
        ledger = status.report(ours).ledger

        assert ledger.offered == ledger.delivered
        assert 0 == ledger.values_refused
        assert not status.report(ours).media.get("left_out")

    @pytest.mark.parametrize("kind", KINDS)
    def test_what_is_in_the_run_is_the_same(self, folder: Path, ours: Path, kind: str):
        found, expected = history(ours), history(folder)

        names = {name for name in expected if kind_of(name) == kind}
        assert names == {name for name in found if kind_of(name) == kind}
        assert names
        assert {name: expected[name] for name in names} == {name: found[name] for name in names}

    def test_what_is_an_image_without_being_called_so_is_one(self, folder: Path, ours: Path):
        found, expected = history(ours), history(folder)

        assert expected["image/pil"] == found["implied/pil"]
        assert expected["image/figure"] == found["implied/figure"]

    def test_a_table_that_grows_tells_of_what_was_before(self, folder: Path, ours: Path):
        found, expected = increments(ours), increments(folder)

        assert [0, 1, 2] == [len(told.pop("previous_increments_paths")) for told in expected]
        assert [0, 1, 2] == [len(told.pop("previous_increments_paths")) for told in found]
        assert expected == found

    def test_charts_are_drawn_the_same(self, folder: Path, ours: Path):
        assert drawings(folder) == drawings(ours)
        assert drawings(ours)
