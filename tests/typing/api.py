"""What a user writes, as a type checker sees it. Never run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, assert_type

import sidestep
from sidestep import Metric, Run, Scope, Stage, Stats
from sidestep.testing import Recorder, record


def train(steps: int) -> None:
    run = sidestep.init(project="digits", config={"lr": 1e-3}, tags=["a"], mode="offline")
    assert_type(run, Run)
    run.define_metric("eval/*", step_metric="epoch", reduce=["mean", "max"])
    for step in range(steps):
        assert_type(run.log({"train/loss": 0.5, "nested": {"a": [1, 2]}}, step=step), None)
    stage = run.stage("training/operator")
    assert_type(stage, Stage)
    assert_type(run.scope("e_p2_1", step_offset=1000), Scope)
    run.scope("e_p2_1", step_offset=1000).log({"loss": 0.5}, step=0)
    stage.log({"loss": 0.1}, commit=False)
    assert_type(stage.stage("inner").name, str)
    assert_type(run.define_metric("loss", summary="min"), Metric)
    assert_type(run.flush(timeout=1.0), bool)
    stats = run.stats()
    assert_type(stats, Stats)
    assert_type(stats.offered, int)
    assert_type(stats.dropped, Mapping[str, int])
    assert_type(run.url, str | None)
    assert_type(run.rank, int)
    run.config.update({"batch": 8}, allow_val_change=True)
    run.config.lr = 0.1
    run.summary["best"] = 0.9
    run.finish(exit_code=0, timeout=2.0)


def as_context() -> None:
    with sidestep.init() as run:
        assert_type(run, Run)
        run.log({"loss": 1.0})


def without_naming_a_run() -> None:
    sidestep.log({"loss": 1.0}, step=3, commit=True)
    sidestep.define_metric("loss", step_metric="epoch")
    sidestep.config["lr"] = 0.1
    sidestep.summary.update({"best": 1.0})
    assert_type(sidestep.run, Run | None)
    sidestep.finish()


def in_tests() -> None:
    with record(strict=False) as logged:
        without_naming_a_run()
    assert_type(logged, Recorder)
    assert_type(logged["loss"], list[Any])
    assert_type(logged.steps("loss"), list[int | None])
    assert_type(logged.config, dict[str, Any])


def what_the_run_is_called(run: Run) -> None:
    assert_type(run.name, str | None)
    run.name = "second"
    run.tags += ("best",)
    run.notes = None
    assert_type(run.tags, tuple[str, ...])
    assert_type(run.starting_step, int)
    assert_type(run.resumed, bool)
    assert_type(run.start_time, float)
    assert_type(run.sweep_url, str | None)
    assert_type(run.settings, sidestep.Settings)
    run.alert("title", "text", level=sidestep.AlertLevel.WARN, wait_duration=60)
    sidestep.alert("title", "text", "ERROR")
    run.mark_preempting()


def as_a_script_for_wandb_expects() -> None:
    import sidestep as wandb

    assert_type(wandb.login(key="0" * 40, relogin=True), bool)
    wandb.setup()
    wandb.termwarn("careful", repeat=False)
    assert_type(wandb.util.generate_id(), str)
    try:
        wandb.init(config="config.yaml", config_exclude_keys=["data"], reinit="finish_previous", anonymous="allow")
    except (wandb.errors.CommError, wandb.Error, wandb.UsageError):
        pass
    wandb.teardown(exit_code=1)
