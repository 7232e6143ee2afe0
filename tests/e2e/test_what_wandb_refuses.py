"""A slip in a script costs what it names, never the run; and what a run comes to does not depend on kills."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from sidestepd.sinks import wandb_log
from sidestepd.status import losses
from tests.support.chaos import Training

pytestmark = pytest.mark.e2e


def script(text: str) -> list[str]:
    return [sys.executable, "-c", f"import sidestep\n{text}"]


def summary_of(run: Training) -> dict[str, Any]:
    """The newest value of each name, over all segments; names in dicts joined by dots."""
    found: dict[str, Any] = {}
    for segment in wandb_log.segments(run.run_dir / "wandb"):
        for record in wandb_log.records(segment):
            for item in record.summary.update:
                name, value = ".".join(item.nested_key) or item.key, json.loads(item.value_json)
                inner = value if isinstance(value, dict) else {"": value}
                found |= {f"{name}.{key}".rstrip("."): one for key, one in inner.items()}
    return {name: value for name, value in found.items() if not name.startswith("_")}


SLIPS = {
    "a summary that wandb does not know": "run = sidestep.init()\nrun.define_metric('ok', summary='bogus')",
    "the best of an old wandb": "run = sidestep.init()\nrun.define_metric('ok', summary='best', goal='minimize')",
    "a project with a slash": "run = sidestep.init(project='my/project')",
    "a group that is no text": "run = sidestep.init(group=5)",
    "a tag that is too long": "run = sidestep.init(tags=['t' * 200, ''])",
    "a name of no characters": "run = sidestep.init()\nrun.log({'': 1}, step=0, commit=False)",
}

OFTEN = ("a project with a slash", "a name of no characters")


class TestSlips:
    @pytest.mark.parametrize(
        "slip",
        [slip if what in OFTEN else pytest.param(slip, marks=pytest.mark.nightly) for what, slip in SLIPS.items()],
        ids=SLIPS,
    )
    def test_cost_what_they_name_and_no_row(self, tmp_path: Path, slip: str):
        rows = "for step in range(3): run.log({'ok': step}, step=step)"

        with Training(tmp_path, script(f"{slip}\n{rows}")) as run:
            exit_code = run.wait()

        report = run.report()
        assert [0, 1, 2] == [row.values["ok"] for row in run.rows()], run.log()
        assert (0, "finished", True) == (exit_code, report.state, report.ledger.balances)


class TestValues:
    def test_that_wandb_does_not_keep_are_counted_and_told(self, tmp_path: Path):
        slip = "run = sidestep.init()\nfor step in range(3): run.log({'ok': step, '': 1}, step=step)"

        with Training(tmp_path, script(slip)) as run:
            exit_code = run.wait()

        report = run.report()
        assert [0, 1, 2] == [row.values["ok"] for row in run.rows()], run.log()
        assert (0, 3, True) == (exit_code, report.ledger.values_refused, report.ledger.balances)
        assert "3 values that can not be logged" in losses(report)


class TestSummaryAfterAKill:
    COMMAND = """
run = sidestep.init()
run.define_metric("acc", summary="min,max,mean,first,last")
run.define_metric("junk", summary="none")
run.summary["own"] = 5
for step in range(5):
    run.log({"acc": [5, 9, 1, 4, 6][step], "junk": step, "loss": -step}, step=step)
run.flush(10)
import sys
sys.stdin.readline()
run.log({"acc": 2, "junk": 9, "loss": -9}, step=5)
"""

    @pytest.mark.nightly
    def test_is_what_it_is_without_one(self, tmp_path: Path):
        plain, killed = (self.run(tmp_path / name, kill=name == "killed") for name in ("plain", "killed"))

        wanted = {"acc.min": 1, "acc.max": 9, "acc.first": 5, "acc.last": 2, "own": 5, "loss": -9}
        assert wanted == {name: killed.get(name) for name in wanted}
        assert plain == killed
        assert "junk" not in killed

    def run(self, base: Path, *, kill: bool) -> dict[str, Any]:
        """The summary in the end; the last row is logged after the kill."""
        base.mkdir()
        os.mkfifo(base / "go")
        listening = ["sh", "-c", f'exec < {base / "go"}; exec "$@"', "sh"]
        with Training(base, [*listening, *script(self.COMMAND)]) as run:
            with (base / "go").open("w") as word:
                run.wait_for_progress()
                assert not kill or run.kill("delivery")
                word.write("go on\n")
            assert run.wait() == 0
        return summary_of(run)
