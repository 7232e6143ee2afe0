"""Asking a W&B server what it holds: what it answers, and what is said when it does not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidestepd.errors import Retry
from sidestepd.sinks.wandb_server import Asker, Held, Server
from tests.support.waiting import eventually
from tests.support.wandb_server import KEY, StandIn


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with StandIn(tmp_path / "server") as server:
        yield server


class TestServer:
    def test_a_run_that_is_not_there_is_none(self, stand_in: StandIn):
        assert Server(stand_in.url).held("made", "p", None) is None

    def test_a_run_is_held_up_to_its_last_row(self, stand_in: StandIn):
        stand_in.make("made", rows=[{"_step": 0}, {"_step": 7, "_timestamp": 1.0}])

        assert Held(rows=2, last_step=7) == Server(stand_in.url).held("made", "p", "tester")

    def test_a_summary_without_a_row_is_noticed(self, stand_in: StandIn):
        stand_in.make("made", rows=[])
        stand_in.lose_rows("made", summary={"_step": 3})

        assert Held(said_step=3) == Server(stand_in.url).held("made", "p", "tester")

    @pytest.mark.parametrize(
        ("status", "why", "lasting"),
        [
            (401, "refuses the API key (401)", True),
            (403, "refuses the API key (403)", True),
            (404, "there is no W&B at", True),
            (429, "asks for patience", False),
            (500, "fails with 500", False),
            (503, "fails with 503", False),
        ],
    )
    def test_a_refusal_says_why_and_whether_it_heals(
        self, stand_in: StandIn, status: int, why: str, lasting: bool
    ):
        stand_in.fault("graphql/*", "status", status=status)

        with pytest.raises(Retry) as caught:
            Server(stand_in.url).held("made", "p", None)

        assert why in caught.value.trouble.what
        assert lasting == caught.value.trouble.lasting

    def test_it_waits_as_long_as_it_is_asked_to(self, stand_in: StandIn):
        stand_in.fault("graphql/*", "status", status=429)

        with pytest.raises(Retry) as caught:
            Server(stand_in.url).held("made", "p", None)

        assert caught.value.after_s == 1.0

    def test_a_connection_that_is_cut_is_tried_again(self, stand_in: StandIn):
        stand_in.fault("graphql/*", "cut")

        with pytest.raises(Retry, match="can not be reached") as caught:
            Server(stand_in.url).held("made", "p", None)

        assert not caught.value.trouble.lasting

    def test_the_key_is_in_no_message(self, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch):
        key = "wrong" + "0" * 35
        monkeypatch.setenv("WANDB_API_KEY", key)

        with pytest.raises(Retry) as caught:
            Server(stand_in.url).held("made", "p", None)

        assert key not in repr(caught.value) + str(caught.value.__cause__) + str(caught.value.__context__)

    def test_a_key_of_no_shape_is_told(self, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("WANDB_API_KEY", "short")

        with pytest.raises(Retry, match="the API key can not be used") as caught:
            Server(stand_in.url).held("made", "p", None)

        assert caught.value.trouble.lasting


class TestAsker:
    def asker(self, answers: list[Held | Retry]) -> tuple[Asker, threading.Semaphore]:
        """One that gets these answers, the last for ever; the semaphore counts its questions."""
        asked = threading.Semaphore(0)

        def ask() -> Held:
            asked.release()
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            if isinstance(answer, Retry):
                raise answer
            return answer

        return Asker(ask, every_s=0.01, last_step=-1), asked

    def test_asks_nothing_unless_somebody_wants_to_know(self):
        asker, asked = self.asker([Held(last_step=3)])

        assert not asked.acquire(timeout=0.2)

        asker.want()
        eventually(lambda: asker.last_step == 3)
        asker.stop()

    def test_goes_on_after_trouble_and_says_it_meanwhile(self):
        asker, _ = self.asker([Retry("away", after_s=0.01), Held(last_step=5)])
        seen = []

        asker.want()
        eventually(lambda: seen.append(asker.trouble) or asker.last_step == 5)

        assert asker.trouble is None
        asker.stop()

    def test_does_not_go_back(self):
        """A server behind several machines may answer with less than before."""
        asker, asked = self.asker([Held(last_step=5), Held(last_step=2)])

        asker.want()
        for _ in range(3):
            assert asked.acquire(timeout=30)

        assert asker.last_step == 5
        asker.stop()

    def test_what_can_not_be_asked_does_not_count_as_standing_still(self):
        asker, asked = self.asker([Retry("away", after_s=0.01)])
        before = asker.moved_at

        asker.want()
        for _ in range(3):
            assert asked.acquire(timeout=30)

        assert asker.moved_at > before
        asker.stop()
