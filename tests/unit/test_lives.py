"""How often torchrun started a place on its node: by who started whom, whatever it says itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sidestep import lives

ME = os.getpid()


def life(folder: Path | None, *, mine: str, leader: str = "1", tree: dict[int, int] | None = None) -> int:
    """A life of this process's that began at `mine`, of a torchrun that began at `leader`."""
    parents = tree or {ME: 10, 10: 1}
    started = {ME: mine, 10: leader}
    return lives.count(
        "0", folder=folder, started=lambda pid: started.get(pid, "0"), parent_of=lambda pid: parents.get(pid, 0)
    )


def test_each_process_of_one_torchrun_is_a_life_more(tmp_path: Path):
    assert [1, 1, 2, 3] == [life(tmp_path, mine=mine) for mine in ("5", "5", "6", "7")]


def test_another_torchrun_begins_anew_and_nothing_is_left_of_the_one_before(tmp_path: Path):
    life(tmp_path, mine="5")

    assert 1 == life(tmp_path, mine="6", leader="2")
    assert [f"lives-10-2-{0}"] == [path.name for path in tmp_path.iterdir()]


def test_a_child_belongs_to_the_life_of_its_parent(tmp_path: Path):
    (tmp_path / "lives-10-1-0").write_text("8-1\n9-1\n")

    assert 2 == life(tmp_path, mine="5", tree={ME: 9, 9: 10, 10: 1})


def test_where_it_can_not_be_told_nobody_is_harmed(tmp_path: Path):
    (tmp_path / "no-folder").touch()

    assert [0, 0] == [life(None, mine="5"), life(tmp_path / "no-folder", mine="5")]


@pytest.mark.parametrize("name", ["lives-x", "lives-a-b-c", "lives-1-2-3-4"])
def test_a_file_that_is_none_of_ours_costs_no_life_and_is_left_alone(tmp_path: Path, name: str):
    (tmp_path / name).touch()

    assert [1, 2] == [life(tmp_path, mine=mine) for mine in ("5", "6")]
    assert (tmp_path / name).exists()
