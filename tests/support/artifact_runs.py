"""The same artifacts and files in two offline runs: through the daemon, and by wandb itself.

sidestep run --mode offline --dir FOLDER -- python -m tests.support.artifact_runs worker FOLDER
python -m tests.support.artifact_runs wandb FOLDER
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import Any

NOISE = 5_000_000
"""Bytes of the file that is too large to be read at once."""


def worker(folder: Path) -> None:
    """As a training does it."""
    import sidestep

    with sidestep.init(project="artifacts", strict=True) as run:
        log_all(sidestep, run, folder)
        assert not {"wandb", "sidestepd", "numpy"} & set(sys.modules)


def reference(folder: Path) -> None:
    """With the settings of the daemon's sink."""
    import wandb

    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, x_disable_meta=True)
    with wandb.init(mode="offline", project="artifacts", dir=folder, id="same", settings=settings) as run:
        log_all(wandb, run, folder)


def log_all(module: Any, run: Any, folder: Path) -> None:
    made = folder / "made"
    (made / "nested" / "deeper").mkdir(parents=True, exist_ok=True)
    weights = random.Random(0).randbytes(NOISE)
    (made / "weights.bin").write_bytes(weights)
    (made / "nested" / "a.txt").write_text("a")
    (made / "nested" / "deeper" / "empty").write_text("")
    (made / "nested" / "code.py").write_text("print(1)\n")

    artifact = module.Artifact(
        "model",
        "model",
        description="what it is",
        metadata={"accuracy": 0.5, "none": float("nan"), "deep": {"n": [1]}},
    )
    artifact.add_file(str(made / "weights.bin"))
    artifact.add_file(str(made / "nested" / "a.txt"), name="other/name.txt")
    artifact.add_dir(str(made / "nested"), name="below")
    with artifact.new_file("written.txt") as file:
        file.write("written here")
    artifact.add(module.Table(columns=["a", "b"], data=[[1, "x"], [2, "y"]]), "table")
    run.log_artifact(artifact, aliases=["best", "step-1"], tags=["one tag"])

    (made / "draft").write_bytes(weights[::-1])
    (made / "draft").rename(made / "weights.bin")  # a file logged before is what it was then
    (made / "nested" / "a.txt").write_text("another a")
    run.log_artifact(str(made / "weights.bin"), name="by-path", type="dataset")
    run.log_artifact(str(made / "nested"))
    run.log_model(str(made / "weights.bin"), name="net", aliases=["final"])
    run.log_code(str(made), name="source-code")
    run.save(str(made / "nested" / "*.txt"), base_path=str(made), policy="now")
    module.log_artifact(str(made / "nested" / "a.txt"), name="from-module")
    os.chdir(made)
    module.save("nested/deeper/*", policy="now")


if __name__ == "__main__":
    {"worker": worker, "wandb": reference}[sys.argv[1]](Path(sys.argv[2]))
