"""A daemon and two relays, as real processes; ranks behind them are in one run as if they spoke there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import pytest

from sidestep.wire import (
    BLOBS,
    SAMPLER,
    Ack,
    Bye,
    Hello,
    Kind,
    Message,
    Record,
    Refuse,
    Status,
    Welcome,
    Wrapper,
    decode,
    encode,
    encode_record,
    is_envelope,
    unwrap,
)
from sidestepd import status
from sidestepd.saying import table
from tests.support.daemons import DEADLINE_S, RawWorker, ServedRun, logged
from tests.support.proxy import PASS, REFUSE
from tests.support.relays import Topology
from tests.support.waiting import eventually

STEPS = 8
PICTURE = b"\x89PNG" * 1000


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Topology]:
    """A training of four ranks on two nodes, one of which is cut off for a while, killed, and ends alone."""
    with Topology(tmp_path_factory.mktemp("relays"), order__patience_s=1.0) as nodes:
        ranks = [
            relay.worker(2 * node + local, world=4, node=f"node{node}", launch="job")
            for node, relay in enumerate(nodes.relays)
            for local in range(2)
        ]
        for worker in ranks:
            worker.hello()
        sampler = nodes.relays[1].worker(role=SAMPLER, launch=SAMPLER, node="node1", run="tested")
        sampler.hello()
        lane = nodes.relays[0].worker(role=BLOBS, beside=ranks[0].session.hex(), node="node0", launch="job")
        lane.hello()
        eventually(lambda: nodes.head.status()["sessions"] == 4, DEADLINE_S, nodes.log)
        say_all(ranks, range(STEPS // 2))
        nodes.proxies[1].set(REFUSE)
        eventually(
            lambda: any(it["state"] == "away" for it in nodes.head.status()["relays"]), DEADLINE_S, nodes.log
        )
        sampler.log(records=[sample({"system/gpu0/utilization": 50.0})])
        say_all(ranks, range(STEPS // 2, STEPS))
        show_a_picture(lane, ranks[0])
        nodes.relays[1].kill()
        nodes.relays[1].start()
        nodes.proxies[1].set(PASS)
        for worker in (*ranks, sampler, lane):
            worker.hello()
            worker.bye(exit_code=0)
        nodes.finish()
        yield nodes


def say_all(ranks: list[RawWorker], steps: range) -> None:
    for step in steps:
        for worker in ranks:
            worker.log(step)


def sample(values: dict[str, float]) -> bytes:
    return encode_record(Record(kind=Kind.SAMPLES, time=1.0, step=None, data={"values": values}))


def show_a_picture(lane: RawWorker, beside: RawWorker) -> None:
    """Bytes in the lane, and a row that holds them."""
    ref = {"id": 0, "size": len(PICTURE), "crc": crc32(PICTURE)}
    piece = {"id": 0, "at": 0, "bytes": PICTURE}
    end = {"id": 0, "size": ref["size"], "crc": ref["crc"]}
    lane.log(
        records=[encode_record(Record(kind=Kind.BLOB, time=1.0, step=None, data=data)) for data in (piece, end)]
    )
    media = {"_sidestep": "html", "facts": {"html": {"_blob": {"of": lane.session, **ref}}}}
    beside.log(records=[logged(STEPS - 1, shown=media)])


class TestRanksBehindRelays:
    def test_are_in_one_run_with_every_row_once_and_whole(self, ended: Topology):
        rows = ended.head.rows()

        assert list(range(STEPS)) == [row.step for row in rows], ended.log()
        assert {4} == {row.values["sidestep/ranks_reported"] for row in rows}
        assert 0 == status.report(ended.head.run_dir).late_rows, "a cut link makes rows wait"
        assert max(row.values["sidestep/skew_s"] for row in rows) < 1.0, "what waited says nothing of clocks"

    def test_are_accounted_for_from_both_ends(self, ended: Topology):
        head, *relays = ended.ledgers()

        assert all(ledger.balances for ledger in (head, *relays))
        assert head.offered == head.delivered == sum(ledger.delivered for ledger in relays)
        assert (0, 0) == (head.pending, sum(ledger.pending for ledger in relays))

    def test_were_cut_off_and_killed_meanwhile(self, ended: Topology):
        assert ended.proxies[1].refused > 0
        assert 2 == ended.relays[1].starts

    def test_show_their_media_there(self, ended: Topology):
        shown = next(row.values["shown"] for row in ended.head.rows() if "shown" in row.values)

        kept = ended.head.run_dir / str(shown["html"]["file"])
        assert PICTURE == kept.read_bytes()
        assert [] == list((ended.relays[0].run_dir / "blobs").iterdir())

    def test_have_their_nodes_samples_in_the_stream(self, ended: Topology):
        assert ["node1"] == [it.node for it in ended.head.stream()]

    def test_have_a_relay_that_says_how_it_stands(self, ended: Topology):
        found = status.report(ended.relays[0].run_dir)

        assert ended.proxies[0].address in table(found)
        assert "0 records still to go there" in table(found)
        assert ["bye", "bye"] == [
            it.state for it in status.report(ended.head.run_dir).sessions if it.role == "relay"
        ]


class TestAnEnvelope:
    """As a relay sends it, with frames of several sessions in it, whatever else there is among them."""

    def test_is_answered_for_each_session_and_read_in_its_order(self, tmp_path: Path):
        with ServedRun(tmp_path, order__patience_s=0.2) as run:
            run.start()
            relay = run.worker()
            alice, bob, stranger = (run.worker(rank, world=2, node="n") for rank in range(3))
            frames = [alice.frame(0, 1), bob.frame(0), alice.frame(2, first=2), alice.frame(0, 1)]
            gap, after = bob.frame(5, first=5), alice.frame(3, first=3)
            relay.send(wrapped(*(Hello(session=it.session, rank=n, world=2) for n, it in enumerate((alice, bob)))))
            assert 2 == sum(isinstance(it, Welcome) for it in heard(relay, 2))

            relay.send(wrapped(*frames, stranger.frame(9), gap, Status(session=bob.session), after))
            answers = heard(relay, 4)

            refused = next(it for it in answers if isinstance(it, Refuse))
            acks = {(it.session, it.first, it.gap) for it in answers if isinstance(it, Ack)}
            assert (stranger.session, "hello") == (refused.session, refused.code)
            assert {(alice.session, 4, False), (bob.session, 1, True), (bob.session, 1, False)} == acks
            said = run.status()
            assert (1, 1) == (said["duplicates"], said["gaps"])
            relay.send(wrapped(*(Bye(session=it.session, first=n) for it, n in ((alice, 4), (bob, 1)))))
            assert [Bye, Bye] == [type(it) for it in heard(relay, 2)]
            assert 0 == run.finish()

        ledger = status.report(run.run_dir).ledger
        assert [0, 1, 2, 3] == [row.step for row in run.rows()]
        assert (5, True) == (ledger.delivered, ledger.balances)


def wrapped(*messages: Message) -> list[bytes]:
    wrapper = Wrapper()
    for message in messages:
        wrapper.add(encode(message))
    return wrapper.close()


def heard(worker: RawWorker, count: int) -> list[Message]:
    """At least so many answers, out of the envelopes that they come in."""
    found: list[Message] = []
    while len(found) < count:
        parts = worker.receive()
        assert is_envelope(parts), "who wraps is answered likewise"
        found += map(decode, unwrap(parts))
    return found


class TestGathering:
    def test_has_what_workers_say_go_up_in_few_messages(self, tmp_path: Path):
        with ServedRun(tmp_path / "head") as head:
            head.start()
            above = {"upstream__address": head.address, "upstream__gather_s": 2.0}
            with ServedRun(tmp_path / "node", sink="upstream", **above) as node:
                node.start()
                worker = node.worker()
                worker.hello()
                eventually(lambda: head.status()["sessions"] == 1, DEADLINE_S, node.log)
                before = wrapped_so_far(head)
                for step in range(20):
                    worker.log(step)
                worker.bye(exit_code=0)

                eventually(lambda: head.status()["live"] == 0, DEADLINE_S, node.log)

                assert wrapped_so_far(head) - before >= 15
                assert 0 == node.finish()
            assert 0 == head.finish()
        assert list(range(20)) == [row.step for row in head.rows()]


def wrapped_so_far(run: ServedRun) -> int:
    """Messages that did not come by themselves."""
    said = run.status()
    return int(said["messages"] - said["transfers"])
