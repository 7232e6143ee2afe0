"""A real model is watched and tensors logged, under a real daemon: the run holds what numpy and wandb count."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sidestepd.sinks import wandb_log
from tests.support.chaos import Training
from tests.support.watched import EVERY, STEPS

pytestmark = pytest.mark.e2e

SLOW_S = 400.0
"""Two processes that load torch, on a machine that does other things too."""
LAYERS = ["0.bias", "0.weight", "2.bias", "2.weight"]
NAMES = [f"{kind}/{layer}" for kind in ("gradients", "parameters") for layer in LAYERS]


def by_wandb(folder: Path) -> dict[int, Mapping[str, Any]]:
    """The rows that wandb itself writes of the same training."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SIDESTEP_", "WANDB_"))}
    command = [sys.executable, "-m", "tests.support.watched", "wandb", str(folder / "unused.npz")]
    subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env={**environ, "WANDB_DIR": str(folder), "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"},
        check=True,
        timeout=300,
    )
    (segment,) = wandb_log.segments(folder / "wandb")
    return {row.step: histograms(row.values) for row in wandb_log.history(segment)}


def histograms(values: Mapping[str, Any]) -> dict[str, Any]:
    """The histograms of a row, whose parts are named `name.bins` and so on in the file."""
    names = [name.removesuffix("._type") for name, value in values.items() if value == "histogram"]
    return {name: {part: values[f"{name}.{part}"] for part in ("values", "bins")} for name in names}


def same(ours: Any, theirs: Any) -> bool:
    """Whether two histograms are one; wandb reckons its edges as float32."""
    return ours["values"] == theirs["values"] and np.allclose(ours["bins"], theirs["bins"], rtol=1e-5, atol=1e-6)


class TestOneProcess:
    @pytest.mark.nightly
    def test_the_run_holds_what_numpy_and_wandb_count(self, tmp_path: Path):
        file, theirs = tmp_path / "arrays.npz", tmp_path / "wandb-itself"
        theirs.mkdir()
        command = [sys.executable, "-m", "tests.support.watched", "sidestep", str(file)]
        with Training(tmp_path, command) as run:
            assert 0 == run.wait(SLOW_S), run.log()

        rows = {row.step: histograms(row.values) for row in run.rows()}
        assert list(range(STEPS)) == sorted(rows)
        wandb_rows = by_wandb(theirs)
        for name in NAMES:
            found = [step for step, values in rows.items() if name in values]
            assert [step for step, values in wandb_rows.items() if name in values] == found
            assert STEPS // EVERY == len(found)
            assert all(same(rows[step][name], wandb_rows[step][name]) for step in found), name
        for name in ("weights", "array"):
            assert all(same(values[name], wandb_rows[step][name]) for step, values in rows.items()), name
        last = max(step for step, values in rows.items() if NAMES[0] in values)
        for name, array in np.load(file).items():
            counts, edges = np.histogram(array.astype(float), bins=64)
            held = rows[last][name]
            if array.size > 1:
                assert np.allclose(edges, held["bins"])
                assert 4 >= sum(abs(one - other) for one, other in zip(counts, held["values"], strict=True))
        assert run.report().ledger.balances


@pytest.mark.nightly
class TestSeveralRanks:
    def test_watching_a_model_of_ddp_hangs_nobody(self, tmp_path: Path):
        torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 -m tests.support.watched sidestep"
        command = [sys.executable, *torchrun.split(), str(tmp_path / "arrays.npz"), "--ddp"]
        with Training(tmp_path, command) as run:
            assert 0 == run.wait(SLOW_S), run.log()

        rows = {row.step: row.values for row in run.rows()}
        assert list(range(STEPS)) == sorted(rows)
        assert {0.5} == {values["rank"] for values in rows.values()}  # of two ranks the mean
        found = {name.partition("/rank")[0] for values in rows.values() for name in values}
        assert {name.replace("/", "/module.") for name in NAMES} == {name for name in found if "module" in name}
        assert run.report().ledger.balances
