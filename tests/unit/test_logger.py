"""The loggers that frameworks are built on: what each call becomes, and that none does harm."""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import sidestep
from sidestep.errors import SettingsError
from sidestep.logger import (
    LogConfig,
    PipelineContext,
    Runner,
    UnifiedLogger,
    WandbConfig,
    WandbLogger,
    to_python_types,
)
from sidestep.logger.resuming import FILE
from sidestep.testing import FakeDaemon, Recorder, environment, record


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in ("SIDESTEP_RUN_ID", "WANDB_RUN_ID", "SIDESTEP_CONTEXT", "WANDB_CONTEXT_FILE"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def logged() -> Iterator[Recorder]:
    with record() as recorder:
        yield recorder


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    with FakeDaemon(run={"id": uuid.uuid4().hex, "mode": "offline"}) as served:
        for name, value in environment(served, {}).items():
            monkeypatch.setenv(name, value)
        yield served
        sidestep.finish()


class TestOptions:
    def test_the_page_lists_each_with_its_default(self):
        page = (Path(sidestep.__file__).parent / "logger" / "OPTIONS.md").read_text()

        listed = re.findall(
            r"`(\w+)`", "".join(row.split("|")[1] for row in page.splitlines() if row[:3] == "| `")
        )

        assert {it.name for it in dataclasses.fields(WandbConfig)} == set(listed)

    def test_all_reach_the_daemon(self, daemon: FakeDaemon, tmp_path: Path):
        options = {
            "project": "p", "entity": "e", "name": "n", "notes": "t", "group": "g", "job_type": "j",
            "mode": "offline", "dir": str(tmp_path), "tags": ["a", "b"],
        }  # fmt: skip
        with WandbLogger(WandbConfig(**options, resume="allow", save_code=False, save_requirements=False)):
            pass

        (seen,) = daemon.sessions.values()
        said = seen.hello.settings
        assert options == {name: said[name] for name in options}
        assert {"resume": "allow", "save_code": False, "x_save_requirements": False} == {
            name: said[name] for name in ("resume", "save_code", "x_save_requirements")
        }

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({}, {"x_stats_sampling_interval": 60.0}),
            ({"system_metrics_interval": 2}, {"x_stats_sampling_interval": 2.0}),
            ({"log_system_metrics": False}, {"x_disable_stats": True}),
        ],
    )
    def test_of_the_machine_are_wandbs_own_settings(self, options: dict[str, float], said: dict[str, float]):
        settings = WandbConfig(**options).keywords()["settings"]

        assert said == {name: it for name, it in settings.items() if "stats" in name}

    @pytest.mark.parametrize(
        "bad",
        [
            {"mode": "on"}, {"resume": "maybe"}, {"max_images_to_log": -1}, {"system_metrics_interval": 0},
            {"system_metrics_interval": float("nan")},
        ],
    )  # fmt: skip
    def test_that_can_not_be_meant_name_themselves(self, bad: dict[str, object]):
        with pytest.raises(SettingsError, match=next(iter(bad))):
            WandbConfig(**bad)

    def test_disabled_does_nothing(self):
        with WandbLogger(WandbConfig(mode="disabled")) as logger:
            logger.log_metrics({"loss": 1.0})

        assert 0 == logger.run.stats().offered

    def test_reinit_begins_another_run(self, logged: Recorder):
        with WandbLogger() as first, WandbLogger(WandbConfig(reinit=True)) as second:
            assert first.run is not second.run
        with WandbLogger() as first, WandbLogger() as second:
            assert first.run is second.run


class TestWandbLogger:
    def test_metrics_have_the_prefix_and_the_step(self, logged: Recorder):
        with WandbLogger(WandbConfig(metric_prefix="metrics/")) as logger:
            logger.log_metrics({"loss": 0.5}, step=100)
            logger.log_metrics({"loss": 0.25})

        assert [0.5, 0.25] == logged["metrics/loss"]
        assert [100, 100] == logged.steps("metrics/loss")  # wandb's way: a call without a step joins the open one

    def test_configuration_is_nested_as_given(self, logged: Recorder):
        with WandbLogger(WandbConfig(config={"seed": 1})) as logger:
            logger.log_config({"model": {"params": 1e9}})

        assert {"seed": 1, "model": {"params": 1e9}} == logged.config

    def test_an_exception_inside_is_how_it_ended(self, logged: Recorder):
        with pytest.raises(KeyError), WandbLogger():
            raise KeyError

        assert [1] == logged.exit_codes

    def test_what_is_no_dict_is_counted_and_raises_nothing(self):
        with record(strict=False), WandbLogger(WandbConfig(metric_prefix="m/")) as logger:
            logger.log_metrics([1.0])  # type: ignore[arg-type]

            assert {"unsupported": 1} == logger.run.stats().dropped

    def test_the_console_is_told_of_the_run(self, logged: Recorder, caplog: pytest.LogCaptureFixture):
        with caplog.at_level(logging.INFO), WandbLogger(WandbConfig(name="first"), logging.getLogger("mine")):
            pass

        assert "first" in caplog.text


class TestResume:
    def test_a_training_that_failed_is_gone_on_with(self, logged: Recorder, tmp_path: Path):
        first, second = (WandbConfig(dir=tmp_path, resume=True) for _ in range(2))

        with pytest.raises(KeyError), WandbLogger(first) as failed:
            raise KeyError
        with WandbLogger(second) as resumed:
            assert (tmp_path / FILE).exists()

        assert failed.run._session._keywords["id"] == resumed.run._session._keywords["id"]
        assert "allow" == resumed.run._session._keywords["resume"]
        assert not (tmp_path / FILE).exists()

    def test_under_a_command_its_run_is_joined(self, logged: Recorder, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("SIDESTEP_RUN_ID", "of-the-command")

        with WandbLogger(WandbConfig(resume=True)) as logger:
            assert "id" not in logger.run._session._keywords

    def test_all_ranks_of_a_launch_come_to_one_id(self, tmp_path: Path):
        from sidestep.logger.resuming import Resuming

        launch = {"TORCHELASTIC_RUN_ID": "job-7", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        one, other = (Resuming(tmp_path / f"{rank}", {**launch, "RANK": f"{rank}"}) for rank in range(2))

        assert one.begin() == other.begin()
        assert [True, False] == [(tmp_path / f"{rank}" / FILE).exists() for rank in range(2)]

    def test_a_directory_that_can_not_be_written_ends_nothing(self, logged: Recorder, tmp_path: Path):
        (tmp_path / "file").write_text("")

        with WandbLogger(WandbConfig(dir=tmp_path / "file", resume=True)) as logger:
            logger.log_metrics({"loss": 1.0})

        assert [1.0] == logged["loss"]


class TestConsole:
    def test_it_goes_to_the_console_and_the_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        with UnifiedLogger(LogConfig(name="train")) as logger:
            logger.info("begins with %d", 7)
            logger.debug("not at this level")
            logger.log_metrics({"loss": 0.123456789, "ok": True, "gpu": object()}, step=3)

        for text in (capsys.readouterr().out, (tmp_path / "logs" / "train.log").read_text()):
            assert "begins with 7" in text
            assert "step 3 | loss 0.123457 | ok True | gpu <object>" in text
            assert "not at this level" not in text

    def test_the_file_rotates(self, tmp_path: Path):
        with UnifiedLogger(LogConfig(console=False, max_bytes=200, backup_count=2)) as logger:
            for number in range(50):
                logger.info(f"line {number}")

        assert ["training.log", "training.log.1", "training.log.2"] == sorted(
            it.name for it in (tmp_path / "logs").iterdir()
        )

    def test_other_ranks_are_quiet_and_have_their_own_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ):
        monkeypatch.setenv("RANK", "3")
        monkeypatch.setenv("WORLD_SIZE", "4")
        with UnifiedLogger(LogConfig(name="train")) as logger:
            logger.info("all is well")
            logger.warning("look")

        said = capsys.readouterr().out
        assert ("look" in said, "all is well" in said) == (True, False)
        assert "all is well" in (tmp_path / "logs" / "train.rank3.log").read_text()

    def test_a_second_one_of_a_name_does_not_say_things_twice(self, tmp_path: Path):
        first, second = UnifiedLogger(LogConfig(console=False)), UnifiedLogger(LogConfig(console=False))

        second.info("once")
        second.close()
        first.close()

        assert 1 == (tmp_path / "logs" / "training.log").read_text().count("once")

    def test_a_directory_that_can_not_be_made_is_said(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        (tmp_path / "file").write_text("")

        with UnifiedLogger(LogConfig(console=False, log_dir=tmp_path / "file")) as logger:
            logger.info("on")

        assert "can not be written" in caplog.text

    def test_progress_without_rich_is_a_line_for_each_tenth(self, tmp_path: Path):
        with UnifiedLogger(LogConfig(rich=False)) as logger:
            logger.start_progress(total=100, description="epoch")
            for _ in range(95):
                logger.update_progress(1)

        said = re.findall(r"epoch: (\d+)/100", (tmp_path / "logs" / "training.log").read_text())
        assert ["10", "20", "30", "40", "50", "60", "70", "80", "90", "95"] == said

    def test_progress_with_rich_is_a_bar(self, capsys: pytest.CaptureFixture[str]):
        with UnifiedLogger(LogConfig(rich=True, file=False)) as logger:
            logger.start_progress(total=10, description="epoch")
            for _ in range(10):
                logger.update_progress()
            logger.info("said above it")

        said = capsys.readouterr().out
        assert "10/10" in said
        assert "said above it" in said

    def test_a_bad_level_names_itself(self):
        with pytest.raises(SettingsError, match="console_level"):
            LogConfig(console_level="LOUD")


class TestRunner:
    def test_metrics_go_to_the_run_that_there_is(self, logged: Recorder):
        with sidestep.init() as run:
            runner = Runner()
            runner.log_metrics({"e_p2_1/loss": 0.1})

        assert runner.run is run
        assert [0.1] == logged["e_p2_1/loss"]

    def test_results_are_whole_files_whose_paths_come_back(self, logged: Recorder, tmp_path: Path):
        with Runner(results_dir=tmp_path / "out") as runner:
            path = runner.results.save_artifact("plots/loss.png", b"\x89PNG")
            data = runner.results.save_json_artifact("results.json", {"accuracy": np.float32(0.5)})

        assert b"\x89PNG" == path.read_bytes()
        assert {"accuracy": 0.5} == json.loads(data.read_text())
        assert [data, path.parent] == sorted((tmp_path / "out").iterdir(), reverse=True)

    def test_no_name_leads_out_of_the_directory(self, logged: Recorder, tmp_path: Path):
        with Runner(results_dir=tmp_path / "out") as runner:
            path = runner.results.save_artifact("../../etc/passwd", "mine")

        assert tmp_path / "out" / "etc" / "passwd" == path

    def test_a_disk_that_takes_nothing_is_counted(self, tmp_path: Path):
        (tmp_path / "out").write_text("in the way")
        with record(strict=False), Runner(results_dir=tmp_path / "out") as runner:
            runner.results.save_artifact("a", b"")

            assert 1 <= runner.run.stats().values_refused


class TestPythonTypes:
    def test_arrays_and_tensors_of_any_size_become_lists(self):
        found = to_python_types(
            {
                "scalar": np.float64(0.5), "array": np.arange(100),
                "tensor": torch.ones(2, 2, dtype=torch.bfloat16),
                "bool": np.bool_(True), "int": np.int64(2**60), 3: {1, 2}, "path": Path("a"), "none": None,
                "when": datetime.date(2025, 1, 2), "config": LogConfig(),
                "grad": torch.ones((), requires_grad=True),
            }
        )  # fmt: skip

        assert found == json.loads(json.dumps(found))
        assert (list(range(100)), [[1.0, 1.0], [1.0, 1.0]], 1.0) == (
            found["array"],
            found["tensor"],
            found["grad"],
        )
        assert (True, 2**60, [1, 2], "a", "2025-01-02") == tuple(
            found[name] for name in ("bool", "int", "3", "path", "when")
        )

    def test_a_loop_ends(self):
        loop: list[object] = []
        loop.append(loop)

        assert to_python_types(loop)


class TestPipeline:
    def test_each_stage_has_a_step_of_its_own(self, logged: Recorder):
        with PipelineContext.begin() as context:
            for step in (10, 11):
                context.log_training_metric("operator", "loss", 1.0 / step, step)
            context.log_training_metric("consistency_distill", "loss", 0.5, 0)
            context.log_training_metrics("consistency_distill", {"loss": 0.25, "lr": 0.1}, 1)

        assert [10, 11] == logged.steps("training/operator/loss")
        assert [0, 1] == logged.steps("training/consistency_distill/loss")

    def test_an_evaluation_is_in_the_summary(self, logged: Recorder):
        with PipelineContext.begin() as context:
            context.log_eval_summary({"nrmse": 0.09, "physics/mass": 1})

        assert {"eval/nrmse": 0.09, "eval/physics/mass": 1} == logged.summary

    def test_who_loads_the_file_joins_the_run(
        self, daemon: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        with PipelineContext.begin() as context:
            where = context.save(tmp_path / "context.json")
        for variable in ("SIDESTEP_ADDRESS", "SIDESTEP_RUN_ID"):
            monkeypatch.delenv(variable)
        monkeypatch.setenv("WANDB_CONTEXT_FILE", str(where))
        monkeypatch.setenv("SIDESTEP_CONTEXT", "")

        with PipelineContext.load() as loaded:
            loaded.log_training_metric("operator", "loss", 0.5, 3)
            assert loaded.run.flush()

        assert [{"loss": 0.5}] == [it.data for it in daemon.records]
        assert daemon.run["id"] == loaded.run.id

    def test_a_run_whose_daemon_has_ended_is_gone_on_with(self, logged: Recorder, tmp_path: Path):
        where = tmp_path / "context.json"
        where.write_text(json.dumps({"address": "ipc:///nowhere", "run_id": "r7", "project": "p"}))

        with PipelineContext.load(where) as context:
            said = context.run._session._keywords

        assert ("r7", "allow", "p") == (said["id"], said["resume"], said["project"])

    @pytest.mark.parametrize("content", [None, "", "[]", "{}", "\0"])
    def test_what_is_no_context_is_said_at_once(self, tmp_path: Path, content: str | None):
        if content is not None:
            (tmp_path / "context.json").write_text(content)

        with pytest.raises(SettingsError, match="context"):
            PipelineContext.load(tmp_path / "context.json")
