"""Options of a worker: read from the environment, and a bad one names itself."""

from __future__ import annotations

import pytest

from sidestep import Settings
from sidestep.errors import SettingsError
from sidestep.settings import WorkerSettings


class TestFromTheEnvironment:
    def test_nothing_said_means_the_defaults(self):
        assert WorkerSettings() == WorkerSettings.from_env({})

    def test_everything_can_be_said(self):
        environ = {
            "SIDESTEP_ADDRESS": "ipc:///tmp/x.sock",
            "SIDESTEP_RUN_ID": "abc",
            "SIDESTEP_RUN_DIR": "/runs/abc",
            "SIDESTEP_MODE": "disabled",
            "SIDESTEP_STRICT": "yes",
            "SIDESTEP_OUTBOX_BYTES": "1048576",
            "SIDESTEP_WHEN_FULL": "drop",
            "SIDESTEP_SPILL_BYTES": "2097152",
            "SIDESTEP_FLUSH_INTERVAL_S": "0.5",
            "SIDESTEP_LAUNCH_ID": "job",
        }

        settings = WorkerSettings.from_env(environ)

        expected = WorkerSettings(
            address="ipc:///tmp/x.sock",
            run_id="abc",
            run_dir="/runs/abc",
            mode="disabled",
            strict=True,
            outbox_bytes=1048576,
            when_full="drop",
            spill_bytes=2097152,
            flush_interval_s=0.5,
            launch_id="job",
        )
        assert expected == settings

    def test_wandb_disabled_is_disabled_here(self):
        assert "disabled" == WorkerSettings.from_env({"WANDB_MODE": "disabled"}).mode

    def test_an_argument_is_stronger(self):
        assert WorkerSettings.from_env({"SIDESTEP_STRICT": "1"}, strict=False).strict is False


class TestBadValues:
    @pytest.mark.parametrize(
        ("variable", "raw", "message"),
        [
            ("SIDESTEP_WHEN_FULL", "block", "when_full = block (from SIDESTEP_WHEN_FULL): must be spill or drop"),
            ("SIDESTEP_SPILL_BYTES", "0", "spill_bytes = 0 (from SIDESTEP_SPILL_BYTES): must be positive"),
            ("SIDESTEP_OUTBOX_BYTES", "-1", "outbox_bytes = -1 (from SIDESTEP_OUTBOX_BYTES): must be positive"),
            (
                "SIDESTEP_OUTBOX_BYTES",
                "1000",
                "outbox_bytes = 1000 (from SIDESTEP_OUTBOX_BYTES): must hold at least one record of 262144 bytes",
            ),
            (
                "SIDESTEP_OUTBOX_BYTES",
                "64M",
                "outbox_bytes = 64M (from SIDESTEP_OUTBOX_BYTES): must be a whole number of bytes",
            ),
            (
                "SIDESTEP_FLUSH_INTERVAL_S",
                "nan",
                "flush_interval_s = nan (from SIDESTEP_FLUSH_INTERVAL_S): must be positive, and a minute at most",
            ),
            ("SIDESTEP_STRICT", "perhaps", "strict = perhaps (from SIDESTEP_STRICT): must be true or false"),
        ],
    )
    def test_names_itself_its_source_and_what_it_should_be(self, variable: str, raw: str, message: str):
        said: list[str] = []

        settings = WorkerSettings.from_env({variable: raw}, warn=said.append)

        assert WorkerSettings() == settings
        assert [True] == [line.startswith(message) for line in said]

    def test_is_an_error_where_that_was_asked_for(self):
        with pytest.raises(SettingsError, match="must be positive"):
            WorkerSettings.from_env({"SIDESTEP_OUTBOX_BYTES": "0"}, strict=True)


class TestWandbsSettings:
    def test_are_a_bag_of_keywords(self):
        settings = Settings(start_method="thread", quiet=True)

        assert {"start_method": "thread", "quiet": True} == dict(settings)
        assert settings.quiet is True
        assert not hasattr(settings, "other")
