"""Training scripts written for wandb, with only the import changed: the run they make is the one wandb makes.

Each script runs twice, once with wandb itself, offline, and once with sidestep under `sidestep run`; both as
runs of a sweep, by what `wandb agent` puts into the environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sidestepd.sinks import wandb_log

pytestmark = pytest.mark.e2e

WAIT_S = 240.0
REINFORCEMENT = """
import argparse, random, time
import wandb

parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--total", type=int, default=12)
args = parser.parse_args([])
run_name = f"cart__{args.lr}__{int(0)}"
wandb.login()
wandb.init(project="scripts", config=vars(args), name=run_name, group="g", monitor_gym=False, save_code=False)
wandb.config.update({"net": {"depth": 2, "act": "relu"}, "seed": 7}, allow_val_change=True)
wandb.config.setdefaults({"seed": 8, "gamma": 0.99})
wandb.define_metric("charts/return", summary="max")
best = 0.0
for step in range(wandb.config.total):
    value = (step * 7) % 5 + wandb.config["lr"]
    best = max(best, value)
    wandb.log({"losses/value": value, "charts/return": value * 2, "note": f"s{step}"}, step=step)
wandb.run.summary["best_return"] = best
wandb.summary.update({"nested": {"a": 1, "b": [1, 2]}})
wandb.run.name = run_name + "-done"
wandb.alert(title="done", text="it is", level=wandb.AlertLevel.INFO)
wandb.finish()
"""
LANGUAGE = """
import dataclasses
import wandb
from wandb import AlertLevel

@dataclasses.dataclass
class Options:
    lr: float = 0.1
    layers: tuple = (1, 2)
    optimizer: str = "adam"

try:
    run = wandb.init(project="scripts", config=dataclasses.asdict(Options()), tags=["base"], notes="first",
                     job_type="train", settings=wandb.Settings(init_timeout=100))
except wandb.errors.CommError:
    raise SystemExit(3)
with run:
    assert wandb.run is run
    run.define_metric("epoch")
    run.define_metric("val/*", step_metric="epoch")
    for epoch in range(3):
        for batch in range(4):
            run.log({"train": {"loss": 1.0 / (1 + epoch * 4 + batch), "lr": run.config.lr}})
        run.log({"epoch": epoch}, commit=False)
        run.log({"val/acc": 0.5 + epoch / 10})
    run.summary["final"] = {"acc": 0.75}
    run.summary["final"]["acc"] = 0.8
    run.tags += ("best",)
    run.notes = "second"
    run.alert("t", "x", level=AlertLevel.WARN, wait_duration=1)
"""
SCIKIT = """
import numpy as np
import wandb
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

wandb.init(config={"lr": 1.0})
data, labels = load_iris(return_X_y=True)
model = LogisticRegression(max_iter=200).fit(data, labels)
guessed, sure = model.predict(data), model.predict_proba(data)
names = ["setosa", "versicolor", "virginica"]
wandb.sklearn.plot_classifier(
    model, data, data, labels, labels, guessed, sure, names, model_name="L", feature_names=["a", "b", "c", "d"]
)
wandb.log({"pair": (data[:, 0], data[:3, 0].tolist(), np.arange(40).reshape(40, 1))})
"""
WORKER = """
import json, os
import sidestep
run = sidestep.init(project="mine", config={"lr": 0.1, "net": {"width": 3, "depth": 1}, "batch": 8})
run.config.update({"lr": 0.9 + run.rank})
run.log({"loss": 1.0})
with open(f"{run.rank}.json", "w") as file:
    json.dump(dict(run.config), file)
run.finish()
"""
SCRIPTS = [
    pytest.param(REINFORCEMENT, id="reinforcement"),
    pytest.param(LANGUAGE, id="language", marks=pytest.mark.nightly),
    pytest.param(SCIKIT, id="charts of scikit-learn", marks=pytest.mark.nightly),
]


@dataclass(kw_only=True)
class Found:
    """What somebody who opens the run finds in it, without what wandb or sidestep add of their own."""

    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    called: dict[str, Any] = field(default_factory=dict)
    alerts: list[tuple[str, str, str]] = field(default_factory=list)


def read(folder: Path) -> Found:
    found = Found()
    for segment in wandb_log.segments(folder):
        found.rows += [_own(row.values) for row in wandb_log.nested_history(segment)]
        for record in wandb_log.records(segment):
            if record.HasField("run"):
                it = record.run
                found.called = {
                    "name": it.display_name, "tags": list(it.tags), "notes": it.notes, "group": it.run_group,
                    "job_type": it.job_type, "project": it.project, "sweep": it.sweep_id, "id": it.run_id,
                }  # fmt: skip
                found.config |= _items(it.config.update)
            found.config |= _items(record.config.update)
            found.summary |= _items(record.summary.update)
            if record.HasField("alert"):
                found.alerts.append((record.alert.title, record.alert.text, record.alert.level))
    found.config = _own(found.config)
    found.summary = _own(_flat(found.summary))
    found.rows = [row for row in found.rows if row]
    return found


def _items(items: Any) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Names in dicts joined by dots; what was set later counts."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= {f"{name}.{key}": it for key, it in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _own(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is said of the run itself, and the names of artifacts, which are made up anew each time."""
    ours, made_up = ("_", "sidestep/", "system/", "global_step"), "artifact_path"
    return {
        name: {key: it for key, it in value.items() if not key.endswith(made_up)}
        if isinstance(value, dict)
        else value
        for name, value in values.items()
        if name.startswith("_wandb.vi") or not (name.startswith(ours) or name.endswith(made_up))
    }


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory, in the environment that `wandb agent` makes for a command."""
    for name in [name for name in os.environ if name.startswith(("SIDESTEP_", "WANDB_"))]:
        monkeypatch.delenv(name)
    params = tmp_path / "config-r1.yaml"
    params.write_text("wandb_version: 1\nlr:\n  value: 0.25\nnet:\n  value:\n    depth: 5\n")
    for name, value in {
        "WANDB_SWEEP_ID": "sw1", "WANDB_RUN_ID": "r1", "WANDB_SWEEP_PARAM_PATH": str(params),
        "WANDB_PROJECT": "of-the-sweep", "WANDB_MODE": "offline",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    with tempfile.TemporaryDirectory(dir="/tmp") as sockets:  # a socket's path has to be short
        monkeypatch.setenv("XDG_RUNTIME_DIR", sockets)
        yield tmp_path


def run_it(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_worker_of_a_sweep_has_what_the_sweep_chose(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SIDESTEP_SINK_KIND", "jsonl")
    monkeypatch.delenv("WANDB_MODE")
    (here / "train.py").write_text(WORKER)
    workers = [f"RANK={rank} WORLD_SIZE=2 {sys.executable} train.py" for rank in range(2)]

    run_it(sys.executable, "-m", "sidestep", "run", "--", "sh", "-c", f"{workers[0]} & {workers[1]} && wait")

    (run_dir,) = here.glob("sidestep-runs/*-r1")
    run = json.loads((run_dir / "run.json").read_text())
    assert ("sw1", "online", "of-the-sweep") == (run["sweep_id"], run["mode"], run["project"])
    whole = {"lr": 0.25, "net": {"width": 3, "depth": 5}, "batch": 8}
    assert [whole, whole] == [json.loads((here / f"{rank}.json").read_text()) for rank in range(2)]
    lines = [json.loads(line) for line in (run_dir / "rows.jsonl").read_text().splitlines()]
    assert whole == {name: value for line in lines for name, value in line.get("config", {}).items()}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_makes_the_run_that_wandb_makes(here: Path, script: str):
    (here / "theirs.py").write_text(script)
    changed = script.replace("import wandb\n", "import sidestep as wandb\n").replace("from wandb", "from sidestep")
    (here / "ours.py").write_text(changed)

    run_it(sys.executable, "theirs.py")
    run_it(sys.executable, "-m", "sidestep", "run", "--", sys.executable, "ours.py")

    (run_dir,) = here.glob("sidestep-runs/*-r1")
    theirs, ours = read(here / "wandb"), read(run_dir / "wandb")
    assert 0.25 == theirs.config["lr"] == ours.config["lr"]
    assert theirs == ours
