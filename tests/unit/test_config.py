"""Options: which source wins, what a bad one is told, and that the documented file is the code's."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from sidestep.errors import SettingsError
from sidestepd.config import KEYS, SECTIONS, Config, Given, variables

OPTION_FILE = Path(__file__).parents[2] / "deploy" / "sidestepd.toml"

HEAD = """\
# Every option of the daemon, with its default. Uncomment what you change, and name the file
# by --config or SIDESTEP_CONFIG. The environment (SIDESTEP_<SECTION>_<OPTION>) is stronger
# than this file, the command line is stronger than both.
"""
REDUCE_EXAMPLES = """\
#"train/samples" = "sum"
#"*/step_time" = ["mean", "max", "argmax_rank"]
"""


def toml_file(folder: Path, text: str) -> Path:
    path = folder / "options.toml"
    path.write_text(text)
    return path


def option_file() -> str:
    """What deploy/sidestepd.toml shall say."""
    sections = [HEAD]
    for section, model in SECTIONS.items():
        lines = [f"[{section}]", f"# {(model.__doc__ or '').splitlines()[0]}"]
        for name, default in model().model_dump(mode="json").items():
            lines += [
                "",
                f"# {model.model_fields[name].description}",
                f"#{name} = {json.dumps(default or default_of(default))}",
            ]
        sections.append("\n".join(lines) + "\n")
    reduce = f"[reduce]\n# {Config.model_fields['reduce'].description}\n\n{REDUCE_EXAMPLES}"
    return "\n".join([*sections[:-1], reduce, sections[-1]])


def default_of(default: object) -> object:
    """TOML has no null: an empty value is one that was not given."""
    return "" if default is None else default


class TestSources:
    def test_without_any_source_everything_has_its_default(self):
        config = Config.load(environ={})

        assert Config() == config

    def test_the_environment_is_stronger_than_the_file(self, tmp_path):
        path = toml_file(tmp_path, "[order]\npatience_s = 1.5\ncapacity_rows = 7")

        config = Config.load(path, environ={"SIDESTEP_ORDER_PATIENCE_S": "2.5"})

        assert (2.5, 7) == (config.order.patience_s, config.order.capacity_rows)

    def test_the_command_line_is_stronger_than_the_environment(self):
        environ = {"SIDESTEP_ORDER_PATIENCE_S": "2.5"}

        config = Config.load(environ=environ, overrides={"order.patience_s": Given("3.5", "--patience")})

        assert 3.5 == config.order.patience_s

    def test_the_file_may_be_named_by_the_environment(self, tmp_path):
        path = toml_file(tmp_path, '[run]\nname = "from the file"')

        config = Config.load(environ={"SIDESTEP_CONFIG": str(path)})

        assert "from the file" == config.run.name

    def test_our_variable_is_stronger_than_that_of_wandb(self):
        environ = {"SIDESTEP_RUN_PROJECT": "ours", "WANDB_PROJECT": "theirs"}

        config = Config.load(environ=environ)

        assert "ours" == config.run.project

    @pytest.mark.parametrize(
        ("variable", "field"),
        [
            ("WANDB_PROJECT", "project"),
            ("WANDB_ENTITY", "entity"),
            ("WANDB_NAME", "name"),
            ("WANDB_RUN_ID", "id"),
            ("WANDB_RUN_GROUP", "group"),
            ("WANDB_JOB_TYPE", "job_type"),
            ("WANDB_NOTES", "notes"),
            ("SIDESTEP_RUN_ID", "id"),
        ],
    )
    def test_variables_that_wandb_users_have_set_are_understood(self, variable, field):
        config = Config.load(environ={variable: "value"})

        assert "value" == getattr(config.run, field)

    def test_the_variable_that_leads_workers_to_their_run_is_no_option(self):
        config = Config.load(environ={"SIDESTEP_RUN_DIR": "/runs/this-one"})

        assert Path() == config.run.dir

    def test_names_to_watch_in_a_variable_are_separated_by_commas(self, tmp_path):
        some = Config.load(environ={"SIDESTEP_WATCH_NOT_FINITE": "*loss*, grad/*"})
        none = Config.load(toml_file(tmp_path, "[watch]\nnot_finite = []"), environ={})

        assert (("*loss*", "grad/*"), ()) == (some.watch.not_finite, none.watch.not_finite)

    def test_tags_in_a_variable_are_separated_by_commas(self):
        config = Config.load(environ={"WANDB_TAGS": "one, two,"})

        assert ("one", "two") == config.run.tags

    def test_an_empty_variable_is_one_that_was_not_given(self):
        config = Config.load(environ={"WANDB_PROJECT": "", "SIDESTEP_ORDER_PATIENCE_S": ""})

        assert Config() == config

    def test_each_value_knows_where_it_was_given(self, tmp_path):
        path = toml_file(tmp_path, "[order]\nlease_s = 1")

        config = Config.load(path, environ={"WANDB_NAME": "n"}, overrides={"run.id": Given("i", "--id")})

        keys = ("order.lease_s", "run.name", "run.id", "run.project")
        assert [str(path), "WANDB_NAME", "--id", "default"] == [config.source(key) for key in keys]

    def test_no_two_options_share_a_variable(self):
        names = [name for key in KEYS for name in variables(key)]

        assert len(names) == len(set(names))


class TestComplaints:
    @pytest.mark.parametrize(
        ("environ", "complaint"),
        [
            (
                {"SIDESTEP_ORDER_PATIENCE_S": "-1"},
                "order.patience_s = -1 (from SIDESTEP_ORDER_PATIENCE_S): must be greater than 0",
            ),
            (
                {"SIDESTEP_SINK_KIND": "csv"},
                "sink.kind = csv (from SIDESTEP_SINK_KIND): must be 'wandb', 'jsonl' or 'upstream'",
            ),
            (
                {"SIDESTEP_UPSTREAM_ADDRESS": "login:7711"},
                "upstream.address = login:7711 (from SIDESTEP_UPSTREAM_ADDRESS): say tcp://HOST:PORT or "
                "ipc:///PATH",
            ),
            (
                {"SIDESTEP_UPSTREAM_ADDRESS": "tcp://k\xf6nig:7711"},
                "upstream.address = tcp://k\xf6nig:7711 (from SIDESTEP_UPSTREAM_ADDRESS): say "
                "tcp://HOST:PORT, by a host's name in ASCII or its address, and a port",
            ),
            (
                {"WANDB_MODE": "shared"},
                "run.mode = shared (from WANDB_MODE): must be 'offline', 'online' or 'disabled'",
            ),
            (
                {"WANDB_RESUME": "maybe"},
                "run.resume = maybe (from WANDB_RESUME): must be 'allow', 'must' or 'never'",
            ),
            (
                {"WANDB_BASE_URL": "api.wandb.ai"},
                "sink.server = api.wandb.ai (from WANDB_BASE_URL): String should match pattern '^https?://'",
            ),
            (
                {"WANDB_RUN_ID": "../up"},
                "run.id = ../up (from WANDB_RUN_ID): must be letters, digits and any of _ . = + @ -, and start "
                "with a letter, digit or _",
            ),
            (
                {"SIDESTEP_ORDER_PATIENCE": "1"},
                "SIDESTEP_ORDER_PATIENCE is no option; did you mean SIDESTEP_ORDER_PATIENCE_S?",
            ),
        ],
    )
    def test_a_bad_variable_is_named_with_its_value_and_what_is_wrong(self, environ, complaint):
        with pytest.raises(SettingsError) as caught:
            Config.load(environ=environ)

        assert complaint == str(caught.value)

    def test_infinity_is_no_time(self):
        with pytest.raises(SettingsError, match=r"order\.patience_s = inf"):
            Config.load(environ={"SIDESTEP_ORDER_PATIENCE_S": "inf"})

    def test_all_bad_values_are_named_at_once(self):
        with pytest.raises(SettingsError) as caught:
            Config.load(environ={"SIDESTEP_ORDER_PATIENCE_S": "0", "SIDESTEP_ORDER_LEASE_S": "x"})

        assert 2 == len(str(caught.value).splitlines())

    def test_an_unknown_key_of_the_file_names_the_file_and_the_nearest_key(self, tmp_path):
        path = toml_file(tmp_path, "[order]\npatience = 1")

        with pytest.raises(SettingsError) as caught:
            Config.load(path, environ={})

        assert f"{path}: order.patience is no option; did you mean order.patience_s?" == str(caught.value)

    def test_a_value_of_the_file_is_not_taken_for_another_type(self, tmp_path):
        path = toml_file(tmp_path, "[unsafe]\nrow_log = []")

        with pytest.raises(
            SettingsError, match=rf"unsafe\.row_log = \[\] \(from {path}\): must be a valid boolean"
        ):
            Config.load(path, environ={})

    def test_a_file_that_is_not_there_is_said_so(self, tmp_path):
        with pytest.raises(SettingsError, match=r"can not read .*nowhere\.toml: No such file"):
            Config.load(tmp_path / "nowhere.toml", environ={})

    def test_a_file_that_is_no_toml_is_said_so(self, tmp_path):
        with pytest.raises(SettingsError, match=r"is no TOML: .*line 1"):
            Config.load(toml_file(tmp_path, "order patience"), environ={})

    def test_a_reduction_that_nobody_knows_is_named(self, tmp_path):
        path = toml_file(tmp_path, '[reduce]\n"train/*" = "middle"')

        with pytest.raises(SettingsError, match=r"reduce\.train/\* = middle \(from .*options\.toml\): .* unknown"):
            Config.load(path, environ={})

    def test_a_reduction_of_the_command_line_too(self):
        with pytest.raises(SettingsError, match=r"reduce\.a\.b = middle \(from --reduce\)"):
            Config.load(environ={}, overrides={"reduce.a.b": Given("middle", "--reduce")})

    def test_reductions_that_are_no_table_are_said_so(self, tmp_path):
        with pytest.raises(SettingsError, match=r"reduce = mean \(from "):
            Config.load(toml_file(tmp_path, 'reduce = "mean"'), environ={})

    def test_an_override_that_nobody_knows_is_named(self):
        with pytest.raises(SettingsError, match=r"order\.patients_s is no option; did you mean order\.patience_s"):
            Config.load(environ={}, overrides={"order.patients_s": 1})


class TestSamplers:
    def test_are_switched_by_a_word_and_watch_paths_that_commas_separate(self):
        environ = {"SIDESTEP_SAMPLERS_ENABLED": "off", "SIDESTEP_SAMPLERS_PATHS": "/scratch, /data"}
        samplers = Config.load(environ=environ).samplers
        assert (False, ("/scratch", "/data"), 0.0) == (samplers.enabled, samplers.paths, samplers.torch_interval_s)

    def test_sample_no_faster_than_twice_a_second(self):
        with pytest.raises(SettingsError, match=r"samplers.interval_s = 0.1 .from SIDESTEP_SAMPLERS_INTERVAL_S"):
            Config.load(environ={"SIDESTEP_SAMPLERS_INTERVAL_S": "0.1"})


class TestReductions:
    def test_of_the_command_line_and_the_file_are_joined_and_know_where_they_come_from(self, tmp_path):
        path = toml_file(tmp_path, '[reduce]\n"x" = "sum"\n"y.z" = ["mean", "max"]')

        config = Config.load(path, environ={}, overrides={"reduce.x": Given("min,max", "--reduce")})

        assert {"x": ["min", "max"], "y.z": ["mean", "max"]} == config.reduce
        assert ("--reduce", str(path)) == (config.source("reduce.x"), config.source("reduce.y.z"))


class TestRunDirectoryCopy:
    def test_what_was_resolved_is_read_back_unchanged(self, tmp_path):
        path = toml_file(tmp_path, '[run]\ntags = ["a"]\n[reduce]\n"x" = ["mean", "max"]')

        config = Config.load(path, environ={"WANDB_DIR": "/data"})

        assert config == Config.from_json(config.to_json())


class TestSweep:
    def test_a_run_of_one_is_online_unless_something_says_otherwise(self):
        alone = Config.load(environ={"WANDB_SWEEP_ID": "s1"})
        told = Config.load(environ={"WANDB_SWEEP_ID": "s1", "WANDB_MODE": "offline"})

        assert ("s1", "online", "WANDB_SWEEP_ID") == (alone.run.sweep_id, alone.run.mode, alone.source("run.mode"))
        assert "offline" == told.run.mode


class TestOptionFile:
    def test_it_lists_every_option_with_its_sentence_and_default(self):
        assert option_file() == OPTION_FILE.read_text()

    def test_uncommented_it_changes_nothing(self, tmp_path):
        lines = [line[1:] if line[:1] == "#" and line[1:2] != " " else line for line in option_file().splitlines()]
        path = toml_file(tmp_path, "\n".join(lines))

        config = Config.load(path, environ={})

        assert tomllib.loads(path.read_text())["reduce"] == config.reduce
        assert Config() == config.model_copy(update={"sources": {}, "reduce": {}})
