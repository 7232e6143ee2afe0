"""Ranks: who a process is, from its environment alone."""

from __future__ import annotations

import os

import pytest

from sidestep.ranks import Identity, identify, start_of

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "GROUP_RANK": "1",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "2",
}


def identity(environ: dict[str, str], launch: str | None = None, said: list[str] | None = None) -> Identity:
    return identify(
        environ,
        pid=20,
        parent=10,
        node="here",
        started=lambda pid: f"started{pid}",
        launch=launch,
        warn=([] if said is None else said).append,
    )


class TestTorchrun:
    def test_its_variables_are_read(self):
        expected = Identity(rank=3, world=4, local_rank=1, node="here", pid=20, launch="10-started10", attempt=2)

        assert expected == identity(TORCHRUN)

    def test_an_id_of_its_own_names_the_launch(self):
        assert "job-7" == identity({**TORCHRUN, "TORCHELASTIC_RUN_ID": "job-7"}).launch

    def test_ranks_of_one_agent_share_the_launch_although_its_id_is_none(self):
        first = identity({**TORCHRUN, "RANK": "0"})
        second = identity({**TORCHRUN, "RANK": "1"})

        assert first.launch == second.launch


class TestAlone:
    def test_a_process_without_a_rank_is_a_launch_of_its_own(self):
        expected = Identity(rank=0, world=1, local_rank=0, node="here", pid=20, launch="20-started20", attempt=0)

        assert expected == identity({})

    def test_a_launch_can_be_named(self):
        assert "mine" == identity(TORCHRUN, launch="mine").launch


class TestBadValues:
    @pytest.mark.parametrize("raw", ["abc", "-1", "1.5", "9" * 30])
    def test_are_said_and_passed_over(self, raw: str):
        said: list[str] = []

        who = identity({**TORCHRUN, "RANK": raw}, said=said)

        assert who.rank == 0
        assert len(said) == 1
        assert f"RANK={raw!r}" in said[0]

    def test_a_world_smaller_than_the_rank_is_made_large_enough(self):
        assert 4 == identity({**TORCHRUN, "WORLD_SIZE": "1"}).world

    def test_names_fit_the_wire(self):
        assert 512 == len(identity({**TORCHRUN, "TORCHELASTIC_RUN_ID": "x" * 1000}).launch)


class TestStartOfAProcess:
    def test_is_a_number_that_stays(self):
        assert start_of(os.getpid()).isdecimal()
        assert start_of(os.getpid()) == start_of(os.getpid())

    def test_of_one_that_is_not_there_is_zero(self):
        assert "0" == start_of(2**22 + 1)
