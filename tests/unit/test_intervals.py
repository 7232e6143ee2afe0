"""How often workers are asked to speak."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidestepd.config import Config, SinkOptions
from sidestepd.intake.facts import intervals_of
from sidestepd.processes import write_json
from sidestepd.rundir import UPSTREAM

DIRECT = Config()
RELAY = Config(sink=SinkOptions(kind="upstream"))


@pytest.mark.parametrize(
    ("config", "world", "seconds"),
    [
        (DIRECT, 8, 0.05),
        (DIRECT, 1000, 0.25),
        (DIRECT, 100_000, 2.0),
        (RELAY, 8, 0.2),
        (RELAY, 1000, 0.5),
        (RELAY, 100_000, 2.0),
    ],
)
def test_many_ranks_speak_less_often_and_those_of_relays_half_as_often(
    config: Config, world: int, seconds: float, tmp_path: Path
):
    assert seconds == intervals_of(config, tmp_path, world)["flush_interval_s"]


def test_nobody_speaks_more_often_to_a_relay_than_the_daemon_above_wants_it(tmp_path: Path):
    write_json(tmp_path / UPSTREAM, {"flush_interval_s": 1.5, "sample_interval_s": 30.0})

    assert {"flush_interval_s": 1.5, "sample_interval_s": 30.0} == intervals_of(RELAY, tmp_path, 8)
