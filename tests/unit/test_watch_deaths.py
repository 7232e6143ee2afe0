"""The watch across deaths of delivery: what was told is not told again, and what was not told is."""

from __future__ import annotations

import json
from collections.abc import Iterator

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestepd.watch import Watch
from tests.support.builders import log, session_id
from tests.support.listening import OPTIONS, Listening


@pytest.fixture
def ranks() -> Listening:
    return Listening()


def reborn(ranks: Listening, *, written: int, state: bytes, cursor: int) -> Listening:
    """The next life, from a fold made at entry `cursor`, with the first `written` alerts on disk."""
    life = Listening(ranks.options, ranks=0)
    life.tape, life.told = ranks.tape, ranks.told[:written]
    for entry in ranks.tape.entries[:cursor]:
        list(life.resolver.read(entry))
    life.watch.restore(msgpack.unpackb(state, strict_map_key=False))
    life.watch.take_up([alert for alert, _ in life.told], max((through for _, through in life.told), default=0))
    life.read = cursor
    return life


def story(ranks: Listening) -> Iterator[None]:
    """A run in which much goes wrong; it may be interrupted wherever this yields."""
    ranks.train(0, 1, 2, steps=range(15))
    yield
    ranks.train(0, 2, steps=range(15, 30))
    yield
    ranks.tape.say(0, log(30, {"loss": float("nan")}))
    ranks.train(0, 1, 2, steps=range(31, 40))
    yield
    ranks.tape.vital(2, "quiet", since=ranks.tape.now)
    ranks.wait(12.0)
    yield
    ranks.tape.vital(2, "heard", since=ranks.tape.now)
    ranks.wait(1.0)
    ranks.train(0, 1, 2, steps=range(40, 50))
    yield
    ranks.tape.vital(1, "gone", since=ranks.tape.now)
    ranks.listen(ranks.tape.now + 1.0)
    yield


STORY = [
    "rank 1 is silent", "loss is nan", "rank 1 is heard again", "rank 2 is silent", "rank 2 is heard again",
    "rank 1 ended without a word",
]  # fmt: skip


class TestAcrossDeaths:
    def test_the_story_is_told_in_one_life(self, ranks):
        for _ in story(ranks):
            pass

        assert STORY == ranks.titles()

    @given(deaths=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 10**6)), max_size=4))
    def test_the_same_alerts_are_told_each_once(self, deaths):
        """Delivery dies, goes on from an older state, and reads again what it had read and told of."""
        ranks = Listening()
        folds = [(0, msgpack.packb(ranks.watch.state()))]
        for number, _ in enumerate(story(ranks)):
            folds.append((ranks.read, msgpack.packb(ranks.watch.state())))
            for place, back in deaths:
                if place == number:
                    cursor, state = folds[back % len(folds)]
                    life = reborn(ranks, written=len(ranks.told), state=state, cursor=cursor)
                    ranks.watch, ranks.resolver, ranks.read, ranks.now = life.watch, life.resolver, life.read, 0.0
                    ranks.listen(ranks.tape.now)

        assert STORY == ranks.titles()

    def test_an_alert_that_was_not_written_down_is_told_in_the_next_life(self, ranks):
        state = msgpack.packb(ranks.watch.state())
        ranks.train(0, 1, 2, steps=range(20)).train(0, 2, steps=range(20, 40))
        assert 1 == len(ranks.told)

        life = reborn(ranks, written=0, state=state, cursor=0).listen(ranks.now)

        assert ["rank 1 is silent"] == life.titles()

    def test_the_state_is_plain(self, ranks):
        ranks.train(0, 1, 2, steps=range(20)).train(0, 2, steps=range(20, 40))

        state = ranks.watch.state()
        other = Watch(OPTIONS)
        other.restore(msgpack.unpackb(msgpack.packb(state), strict_map_key=False))

        assert state == other.state()
        assert session_id(1) in state["workers"]
        assert json.dumps(state["launches"])
