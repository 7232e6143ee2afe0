"""What a run is called, settled from all who have a say."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidestepd.config import Config
from sidestepd.facts import settle_facts
from sidestepd.processes import write_json
from sidestepd.rundir import earlier_of


class TestFacts:
    @pytest.mark.parametrize(("name", "value"), [("mode", "online"), ("resume", "never"), ("project", "theirs")])
    def test_a_worker_says_more_than_its_daemons_options(self, name: str, value: str):
        run = {"mode": "offline", "resume": "allow", "project": "ours"}

        assert {**run, name: value} == settle_facts(run, Config.load(environ={}), {name: value})

    @pytest.mark.parametrize(
        ("name", "value"), [("mode", "shared"), ("resume", True), ("resume", "perhaps"), ("project", 7)]
    )
    def test_what_is_none_of_its_values_is_not_heard(self, name: str, value: object):
        run = {"mode": "offline", "resume": "allow", "project": "ours"}

        assert run == settle_facts(run, Config.load(environ={}), {name: value})


class TestEarlier:
    def test_are_the_directories_of_the_id_that_began_before(self, tmp_path: Path):
        for number, id_ in enumerate(["a", "b", "a", "a", "a"]):
            run_dir = tmp_path / f"2026010{number}-120000-{id_}"
            run_dir.mkdir()
            write_json(run_dir / "run.json", {"id": id_})
        (tmp_path / "20260100-110000-a").mkdir()  # not laid out, or half deleted

        found = earlier_of(tmp_path / "20260103-120000-a", "a")

        assert ["20260100-120000-a", "20260102-120000-a"] == [path.name for path in found]
