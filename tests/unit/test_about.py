"""What a worker's run knows of itself, what may be set, and the rest of wandb's surface that a worker has."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import sidestep
from sidestep import _current, configs, elsewhere
from sidestep.notices import Notices
from sidestep.testing import FakeDaemon, environment
from sidestep.wire import Kind


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeDaemon]:
    """A daemon that the environment names, and a process that has said nothing yet, in an empty directory."""
    with FakeDaemon() as made:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            monkeypatch.delenv(name)
        for name, value in environment(made, {}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("TMPDIR", str(tmp_path))  # what other tests' workers left is no business of these
        monkeypatch.setattr(_current, "_run", None)
        monkeypatch.setattr(_current, "_notices", Notices())
        monkeypatch.setattr(sidestep, "log", _current.log)
        monkeypatch.chdir(tmp_path)
        yield made
        sidestep.finish(timeout=0.0)


def said(daemon: FakeDaemon, kind: Kind) -> list[Any]:
    run = sidestep.run
    assert run is not None
    assert run.flush()
    return [record.data for record in daemon.records if record.kind is kind]


def joined(run: sidestep.Run) -> None:
    """Until the daemon has welcomed this process."""
    run.log({"x": 1})
    assert run.flush()


def times(caplog: pytest.LogCaptureFixture, text: str) -> int:
    return sum(text in line for line in caplog.messages)


class TestNames:
    def test_that_are_set_reach_the_run_and_are_read_back(self, daemon: FakeDaemon):
        run = sidestep.init(name="first", tags=["a"])

        run.name = "second"
        run.tags += ("best",)
        run.notes = "longer"

        assert [{"name": "second"}, {"tags": ["a", "best"]}, {"notes": "longer"}] == said(daemon, Kind.NAMED)
        assert ("second", ("a", "best"), "longer") == (run.name, run.tags, run.notes)

    def test_are_those_that_the_daemon_tells_before_those_of_init(self, daemon: FakeDaemon):
        daemon.run = {**daemon.run, "name": "told", "tags": ["its"], "group": "g", "sweep_id": "s", "notes": "n"}
        run = sidestep.init(name="mine", tags=["mine"])
        joined(run)

        assert ("told", ("its",), "g", "s", "n") == (run.name, run.tags, run.group, run.sweep_id, run.notes)

    def test_a_tag_that_wandb_would_refuse_costs_that_tag(
        self, daemon: FakeDaemon, caplog: pytest.LogCaptureFixture
    ):
        run = sidestep.init()

        run.tags = ["x" * 65, "good", ""]

        assert [{"tags": ["good"]}] == said(daemon, Kind.NAMED)
        assert 1 == times(caplog, "a tag has 1 to 64 characters")

    def test_that_can_not_change_are_said(self, daemon: FakeDaemon, caplog: pytest.LogCaptureFixture):
        run = sidestep.init(group="g", job_type="train")

        run.group, run.job_type = "other", "other"

        assert ("g", "train") == (run.group, run.job_type)
        assert 2 == times(caplog, "is what it was when the run was opened")

    def test_whatever_is_given_nothing_raises(self, daemon: FakeDaemon):
        class Odd:
            def __str__(self) -> str:
                raise RuntimeError

        run: Any = sidestep.init()

        run.name, run.notes, run.tags = Odd(), None, 7
        run.name = "x" * 1000

        assert [{"name": "Odd"}, {"notes": ""}, {"tags": []}, {"name": "x" * 128}] == said(daemon, Kind.NAMED)


class TestWhereItIs:
    def test_addresses_follow_from_the_runs(self, daemon: FakeDaemon):
        url = "https://wandb.ai/team/digits/runs/fake"
        daemon.run = {**daemon.run, "url": url, "entity": "team", "project": "digits", "sweep_id": "s1"}
        run = sidestep.init()

        assert url == run.url == run.get_url()
        assert "https://wandb.ai/team/digits" == run.project_url == run.get_project_url()
        assert "https://wandb.ai/team/digits/sweeps/s1" == run.sweep_url == run.get_sweep_url()
        assert "team/digits/fake" == run.path
        assert f'<iframe src="{url}?jupyter=true"' in run.to_html()

    def test_how_it_was_opened_is_told(self, daemon: FakeDaemon):
        daemon.run = {**daemon.run, "mode": "offline", "resumed": True, "starting_step": 7, "start_time": 5.5}
        run = sidestep.init()
        joined(run)

        assert (True, 7, 5.5, True, False) == (
            run.resumed, run.starting_step, run.start_time, run.offline, run.disabled,
        )  # fmt: skip

    def test_what_a_worker_has_no_part_in_says_what_to_do(self, daemon: FakeDaemon):
        run: Any = sidestep.init()

        with pytest.raises(sidestep.NeedsWandb, match=r"run.link_artifact: link it when it is there"):
            run.link_artifact(None, "model-registry")
        assert not hasattr(run, "nothing")
        run.mine = 1
        assert 1 == run.mine

    def test_settings_are_what_init_was_given(self, daemon: FakeDaemon):
        settings = sidestep.init(project="p", name="n", settings={"x_label": "a"}).settings

        assert ("p", "n", "fake", "a", None) == (
            settings.project, settings.run_name, settings.run_id, settings.x_label, settings.run_group,
        )  # fmt: skip

    def test_a_disabled_run_has_a_name_for_files_and_a_place_for_them(self, daemon: FakeDaemon):
        run = sidestep.init(mode="disabled", name="n", tags=["a"])

        run.name, run.tags = "other", (*run.tags, "b")
        run.alert("title", "text")
        run.mark_preempting()

        assert run.id
        assert Path(run.dir or "").is_dir()
        assert ("other", ("a", "b"), None, True) == (run.name, run.tags, run.url, run.disabled)
        assert 0 == run.stats().offered


class TestAlert:
    def test_reaches_the_run_once_within_its_wait(self, daemon: FakeDaemon):
        run = sidestep.init()

        run.alert("loss", "is high", level=sidestep.AlertLevel.WARN)
        run.alert("loss", "is high still", level="ERROR", wait_duration=timedelta(minutes=5))
        run.alert("other", "text", wait_duration=1)
        sidestep.alert("third", "text", "ERROR")

        assert [
            {"title": "loss", "text": "is high", "level": "WARN"},
            {"title": "other", "text": "text", "level": "INFO"},
            {"title": "third", "text": "text", "level": "ERROR"},
        ] == said(daemon, Kind.ALERT)

    def test_that_is_none_is_counted_and_said(self, daemon: FakeDaemon, caplog: pytest.LogCaptureFixture):
        run: Any = sidestep.init()

        run.alert("title", "text", level="LOUD")
        run.alert("title", "text", wait_duration="soon")

        assert [] == said(daemon, Kind.ALERT)
        assert {"unsupported": 2} == dict(run.stats().dropped)
        assert 1 == times(caplog, "an alert's level is INFO, WARN or ERROR")

    def test_preempting_is_told(self, daemon: FakeDaemon):
        sidestep.init()
        sidestep.mark_preempting()

        assert [{"preempted": True}] == said(daemon, Kind.NAMED)


class TestConfig:
    @pytest.mark.parametrize("kind", ["dict", "namespace", "dataclass", "yaml", "json"])
    def test_takes_what_people_use(self, daemon: FakeDaemon, kind: str, tmp_path: Path):
        options = dataclasses.make_dataclass("Options", [("lr", float, 0.1), ("net", dict, None)])
        (tmp_path / "c.yaml").write_text("wandb_version: 1\nlr: {value: 0.1}\nnet: {value: {depth: 2}}\n")
        (tmp_path / "c.json").write_text('{"lr": 0.1, "net": {"depth": 2}}')
        given = {
            "dict": {"lr": 0.1, "net": {"depth": 2}},
            "namespace": argparse.Namespace(lr=0.1, net={"depth": 2}),
            "dataclass": options(net={"depth": 2}),
            "yaml": "c.yaml",
            "json": "c.json",
        }[kind]

        run = sidestep.init(config=given)

        assert {"lr": 0.1, "net": {"depth": 2}} == dict(run.config) == run.config.as_dict()
        assert (0.1, 2, 0.1, "d") == (
            run.config.lr, run.config["net"]["depth"], run.config.get("lr"), run.config.get("no", "d"),
        )  # fmt: skip

    def test_keys_are_left_out_or_taken_alone(self, daemon: FakeDaemon):
        run = sidestep.init(config={"a": 1, "b": 2}, config_exclude_keys=["a"])
        sidestep.init(config={"c": 3, "d": 4}, config_include_keys=["d"])

        assert {"b": 2, "d": 4} == dict(run.config)

    def test_begins_with_the_file_of_defaults(self, daemon: FakeDaemon, tmp_path: Path):
        (tmp_path / configs.DEFAULTS).write_text("lr:\n  value: 0.5\nbatch:\n  value: 8\n")

        run = sidestep.init(config={"lr": 0.1})

        assert {"lr": 0.1, "batch": 8} == dict(run.config)

    def test_a_file_that_can_not_be_read_is_said(self, daemon: FakeDaemon, caplog: pytest.LogCaptureFixture):
        run = sidestep.init(config="nowhere.yaml")

        assert {} == dict(run.config)
        assert 1 == times(caplog, "'nowhere.yaml' can not be read")

    def test_what_is_set_inside_a_dict_of_the_summary_is_set_in_the_run(self, daemon: FakeDaemon):
        run = sidestep.init()

        run.summary["best"] = {"acc": {"val": 0.5}}
        run.summary["best"]["acc"]["val"] = 0.75
        run.summary["best"].update(step=3)

        assert {"acc": {"val": 0.75}, "step": 3} == run.summary["best"]
        assert {"best": {"acc": {"val": 0.75}, "step": 3}} == said(daemon, Kind.SUMMARY)[-1]


class TestSweep:
    @pytest.mark.parametrize("by", ["environment", "file"])
    def test_its_choices_win_over_the_scripts(
        self, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, by: str,
        caplog: pytest.LogCaptureFixture,
    ):  # fmt: skip
        chosen = {"lr": 0.5, "net": {"depth": 4}}
        monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
        monkeypatch.setenv("WANDB_PROJECT", "the sweep's")
        if by == "environment":
            monkeypatch.setenv(configs.SWEEP_VARIABLE, json.dumps(chosen))
        else:
            path = tmp_path / "config-x.yaml"
            path.write_text("wandb_version: 1\nlr: {value: 0.5}\nnet:\n  value:\n    depth: 4\n")
            monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(path))

        run = sidestep.init(
            project="mine", settings={"project": "mine", "run_id": "mine"},
            config={"lr": 0.1, "batch": 8, "net": {"depth": 1, "width": 2}},
        )  # fmt: skip
        run.config.update({"lr": 0.9}, allow_val_change=True)
        run.config.lr = 0.7

        whole = {"lr": 0.5, "batch": 8, "net": {"depth": 4, "width": 2}}
        assert whole == dict(run.config)
        records = said(daemon, Kind.CONFIG)
        assert whole == {name: value for data in records for name, value in data.items()}
        (seen,) = daemon.sessions.values()
        assert {"project": "the sweep's", "sweep_id": "abc"} == seen.hello.settings
        assert 1 == times(caplog, "'lr' is the sweep's")
        assert 1 == times(caplog, "init(project, id): the run is one of a sweep")

    def test_values_that_can_not_be_read_are_said_and_the_run_goes_on(
        self, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ):
        monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
        monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", "gone.yaml")

        assert {"lr": 0.1} == dict(sidestep.init(config={"lr": 0.1}).config)
        assert 1 == times(caplog, "the values of the sweep are not known: 'gone.yaml'")


class TestKeywords:
    def test_settings_that_name_the_run_count_as_keywords(self, daemon: FakeDaemon):
        settings = sidestep.Settings(run_name="n", run_tags=["t"], run_group="g", project="weaker")
        run = sidestep.init(project="p", settings=settings)
        joined(run)

        (seen,) = daemon.sessions.values()
        assert {"name": "n", "tags": ["t"], "group": "g", "project": "p"}.items() <= seen.hello.settings.items()

    @pytest.mark.parametrize(
        ("keyword", "value", "sentence"),
        [
            ("fork_from", "abc?_step=3", "a run is not forked here"),
            ("resume_from", "abc?_step=3", "a run is not rewound here"),
            ("monitor_gym", True, "log them as sidestep.Video"),
            ("mode", "shared", "every process shares the one run here"),
            ("settings", {"x_service_wait": 3}, "x_service_wait: without effect here"),
        ],
    )
    def test_what_is_not_honoured_is_said_with_what_happens_instead(
        self, daemon: FakeDaemon, caplog: pytest.LogCaptureFixture, keyword: str, value: Any, sentence: str
    ):
        sidestep.init(**{keyword: value})

        assert 1 == times(caplog, sentence)

    def test_what_nobody_misses_is_not_said(self, daemon: FakeDaemon, caplog: pytest.LogCaptureFixture):
        sidestep.init(
            force=True, anonymous="allow", allow_val_change=True, reinit=True, resume="allow",
            settings=sidestep.Settings(start_method="thread", _disable_stats=True, init_timeout=300),
        )  # fmt: skip

        assert [] == caplog.messages


class TestFormalities:
    def test_login_says_where_the_key_belongs_and_keeps_none(
        self, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ):
        assert sidestep.login(key="0" * 40) is True
        assert sidestep.login(relogin=True, host="https://example.org", timeout=3) is True

        assert "WANDB_API_KEY" not in os.environ
        assert 1 == times(caplog, "the key is the daemon's alone: WANDB_API_KEY")

    def test_a_key_goes_to_the_daemon_that_this_process_will_start(
        self, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.delenv("SIDESTEP_ADDRESS")
        monkeypatch.setenv("WANDB_API_KEY", "")

        assert sidestep.login(key="1" * 40)

        assert "1" * 40 == os.environ["WANDB_API_KEY"] == sidestep.api.api_key

    def test_teardown_and_join_finish_the_run(self, daemon: FakeDaemon):
        for end in (sidestep.teardown, sidestep.join):
            sidestep.setup()
            sidestep.require("core")
            sidestep.init()
            end()
            assert sidestep.run is None

    def test_lines_go_to_stderr_once_if_asked(self, capsys: pytest.CaptureFixture[str]):
        sidestep.termlog("one\ntwo")
        sidestep.termwarn("careful", repeat=False)
        sidestep.termwarn("careful", repeat=False)
        sidestep.termerror("bad", newline=False)

        lines = "sidestep: one\nsidestep: two\nsidestep: WARNING careful\nsidestep: ERROR bad"
        assert ("", lines) == capsys.readouterr()

    def test_ids_are_as_wandb_makes_them(self):
        made = {sidestep.util.generate_id() for _ in range(100)}

        assert 100 == len(made)
        assert all(len(one) == 8 and one.isalnum() and one.islower() | one.isdigit() for one in made)
        assert 16 == len(sidestep.util.generate_id(16))

    def test_errors_of_wandb_can_be_caught(self):
        import sidestep as wandb

        assert issubclass(wandb.errors.CommError, wandb.Error)
        assert issubclass(wandb.UsageError, wandb.errors.Error)
        assert issubclass(wandb.sdk.lib.config_util.ConfigError, wandb.Error)
        assert wandb.sdk.wandb_run.Run is wandb.Run
        assert wandb.sdk.wandb_settings.Settings is wandb.Settings
        assert issubclass(wandb.sdk.lib.RunDisabled, wandb.Run)


class TestWhatIsWandbs:
    def test_is_wandbs_where_it_is_installed(self, monkeypatch: pytest.MonkeyPatch):
        class Fake:
            Api = "the real one"
            sdk = type("sdk", (), {"deep": 7})

        monkeypatch.setitem(sys.modules, "wandb", Fake)

        assert "the real one" == sidestep.Api
        assert 7 == elsewhere.of_wandb("sdk.deep")
        with pytest.raises(AttributeError):
            elsewhere.of_wandb("nothing")

    def test_says_what_to_do_where_it_is_not(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "wandb", None)

        from sidestep import Api, sweep

        with pytest.raises(sidestep.NeedsWandb, match=r"sidestep.Api is wandb's own: install wandb .*pip install"):
            Api()
        with pytest.raises(sidestep.NeedsWandb, match=r"create the sweep outside \(`wandb sweep FILE`\)"):
            sweep({})
        with pytest.raises(sidestep.NeedsWandb):
            sidestep.util.to_json()

    def test_an_artifact_of_the_server_is_asked_of_wandb_by_its_whole_name(
        self, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
    ):
        asked = []

        class Fake:
            class Api:
                def artifact(self, name: str, type: str | None = None) -> str:  # noqa: A002
                    asked.append((name, type))
                    return "it"

        monkeypatch.setitem(sys.modules, "wandb", Fake)
        daemon.run = {**daemon.run, "entity": "team", "project": "digits"}
        run = sidestep.init()
        joined(run)

        assert "it" == run.use_artifact("data:latest", type="dataset") == sidestep.use_artifact("a/b/c:v0")
        assert [("team/digits/data:latest", "dataset"), ("a/b/c:v0", None)] == asked
