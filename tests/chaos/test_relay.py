"""Ranks log through relays while relays, the daemon above and the links between them are killed and cut."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from sidestepd import status
from tests.support import checkpoints
from tests.support.chaos import steps_of_ranks, steps_taken
from tests.support.daemons import DEADLINE_S, killed
from tests.support.proxy import PASS, REFUSE, STALL
from tests.support.relays import Topology, command
from tests.support.waiting import eventually

pytestmark = [pytest.mark.chaos, pytest.mark.nightly]

CUT_S = 15.0


def assert_whole(nodes: Topology, taken: Mapping[int, int], *, late: int = 0) -> None:
    """Every step of every rank once, no further row late, and both ends of the ledger agree."""
    rows = nodes.head.rows()
    assert {rank: list(range(steps)) for rank, steps in taken.items()} == steps_of_ranks(rows), nodes.log()
    steps = [row.step for row in rows]
    assert sorted(set(steps)) == steps
    head, *relays = nodes.ledgers()
    assert all(ledger.balances for ledger in (head, *relays)), (head, relays)
    assert head.offered == head.delivered == sum(ledger.delivered for ledger in relays)
    assert (0, 0) == (head.pending, sum(ledger.pending for ledger in relays))
    assert ([], []) == (
        [n for n in head.dropped.values() if n],
        [n for it in relays for n in it.dropped.values() if n],
    )
    assert late == status.report(nodes.head.run_dir).late_rows


class TestKillNine:
    def test_of_everybody_in_turn(self, tmp_path: Path):
        enough = tmp_path / "enough"
        with Topology(tmp_path, order__patience_s=3.0) as nodes:
            with nodes.kept_alive():
                nodes.train(command(steps=10, until=enough))
                late = nodes.wait_for_all(4)
                for _ in range(2):
                    nodes.wait_for_rows()
                    nodes.kill_forwarder(0)
                    nodes.wait_for_rows()
                    killed(psutil.Process(nodes.relays[1].process.pid))
                    nodes.wait_for_rows()
                    killed(nodes.head.delivery())
                    nodes.wait_for_rows()
                    killed(psutil.Process(nodes.head.process.pid))
                nodes.wait_for_rows()
                enough.touch()
                assert [0] * 4 == nodes.wait(), nodes.log()
            nodes.finish()

            assert (3, 3) == (nodes.relays[1].starts, nodes.head.starts)
            assert_whole(nodes, steps_taken(enough), late=late)

    def test_of_a_relay_whose_daemon_above_is_away(self, tmp_path: Path):
        enough = tmp_path / "enough"
        with Topology(tmp_path, order__patience_s=3.0) as nodes:
            with nodes.kept_alive():
                nodes.train(command(steps=10, until=enough))
                late = nodes.wait_for_all(4)
                nodes.proxies[0].set(REFUSE)
                eventually(lambda: nodes.relays[0].ledger().pending > 200, DEADLINE_S, nodes.log)
                killed(psutil.Process(nodes.relays[0].process.pid))
                enough.touch()
                assert [0] * 4 == nodes.wait(), nodes.log()
                nodes.proxies[0].set(PASS)
            nodes.finish()

            assert (2, True) == (nodes.relays[0].starts, nodes.proxies[0].refused > 0)
            assert_whole(nodes, steps_taken(enough), late=late)


class TestCheckpoints:
    MEGABYTES = 5

    def test_come_through_a_relay_whoever_is_killed(self, tmp_path: Path):
        """Each version once, in its order, with its own bytes, and so the files of the run."""
        enough, folder = tmp_path / "enough", tmp_path / "made"
        folder.mkdir()
        training = checkpoints.command(steps=2, folder=folder, megabytes=self.MEGABYTES, until=enough)
        with Topology(tmp_path, nodes=1) as nodes:
            with nodes.kept_alive():
                nodes.train(training, ranks_per_node=1)
                for kill in (
                    lambda: nodes.kill_forwarder(0),
                    lambda: killed(psutil.Process(nodes.relays[0].process.pid)),
                    lambda: killed(nodes.head.delivery()),
                    lambda: killed(psutil.Process(nodes.head.process.pid)),
                ):
                    self.wait_for_a_version(nodes)
                    kill()
                self.wait_for_a_version(nodes)
                enough.touch()
                assert [0] == nodes.wait(), nodes.log()
            nodes.finish()

            assert (2, 2) == (nodes.relays[0].starts, nodes.head.starts)
            steps = checkpoints.steps_taken(enough)
            assert checkpoints.expected(steps, self.MEGABYTES) == checkpoints.versions(nodes.head.run_dir)
            assert {(f"note-{it}.txt", f"note {it}") for it in range(steps)} == checkpoints.notes(
                nodes.head.run_dir
            )
            self.assert_accounted_for(nodes, steps)

    @staticmethod
    def wait_for_a_version(nodes: Topology) -> None:
        def delivered() -> int:
            return int(nodes.head.told().get("artifacts", {}).get("delivered", 0))

        before = delivered()
        eventually(lambda: delivered() > before, DEADLINE_S, nodes.log)

    @staticmethod
    def assert_accounted_for(nodes: Topology, steps: int) -> None:
        told = status.report(nodes.head.run_dir).artifacts
        assert {"delivered": 2 * steps, "unchanged": 0, "waiting": 0, "left_out": {}} == told
        head, relay = nodes.ledgers()
        assert head.balances
        assert relay.balances
        assert head.offered == head.delivered == relay.delivered
        for served in (nodes.head, *nodes.relays):
            assert [] == list((served.run_dir / "blobs").iterdir())


class TestPlaces:
    @pytest.mark.parametrize("place", ["upstream.settle", "upstream.settled", "intake.commit", "intake.committed"])
    def test_at_which_a_relay_may_die(self, tmp_path: Path, place: str):
        with Topology(tmp_path, order__patience_s=3.0) as nodes:
            relay = nodes.relays[0]
            relay.stop()
            with relay.kept_alive(crash_at=f"{place}:{9 if place.startswith('intake') else 2}") as codes:
                nodes.train(command(steps=150))
                assert [0] * 4 == nodes.wait(), nodes.log()
                eventually(lambda: relay.ledger().pending == 0, DEADLINE_S, nodes.log)
            killed(psutil.Process(relay.process.pid))
            relay.start()
            nodes.finish()

            restarts = relay.log().count("delivery ended with -9") + len(codes)
            assert restarts > 0
            late = status.report(nodes.head.run_dir).late_rows  # who dies again and again may be
            assert_whole(nodes, dict.fromkeys(range(4), 150), late=late)


class TestACutLink:
    @pytest.mark.parametrize("how", [STALL, REFUSE])
    def test_makes_rows_wait_and_none_late(self, tmp_path: Path, how: str):
        enough = tmp_path / "enough"
        with Topology(tmp_path, order__patience_s=3.0) as nodes:
            nodes.train(command(steps=10, until=enough))
            late = nodes.wait_for_all(4)
            nodes.proxies[1].set(how)
            cut = time.monotonic()
            eventually(lambda: nodes.head.status()["relays"][1]["state"] == "away", DEADLINE_S, nodes.log)
            time.sleep(max(0.0, cut + CUT_S - time.monotonic()))  # a cut has a length
            backlog = nodes.relays[1].ledger().pending
            nodes.proxies[1].set(PASS)
            healed = time.monotonic()
            eventually(lambda: nodes.relays[1].ledger().pending < 100, DEADLINE_S, nodes.log)
            print(f"{how}: {backlog} records waited, there after {time.monotonic() - healed:.1f} s")
            enough.touch()
            assert [0] * 4 == nodes.wait(), nodes.log()
            nodes.finish()

            assert backlog > 200
            assert nodes.proxies[1].refused > 0 if how is REFUSE else nodes.proxies[1].held_bytes > 0
            assert_whole(nodes, steps_taken(enough), late=late)


class TestARelayOfARelay:
    def test_is_a_relay(self, tmp_path: Path):
        with Topology(tmp_path, order__patience_s=3.0, nodes=1) as nodes:
            upper = nodes.relays[0]
            with Topology(tmp_path / "lower", nodes=1, relay={"upstream__address": upper.address}) as below:
                below.train(command(steps=100), ranks_per_node=2)
                assert [0, 0] == below.wait(), below.log()
                assert 0 == below.relays[0].finish()
                assert 0 == upper.finish()
                assert 0 == nodes.head.finish()

        assert {rank: list(range(100)) for rank in range(2)} == steps_of_ranks(nodes.head.rows())
        assert nodes.head.ledger().balances
        assert ["bye", "bye"] == [
            it.state for it in status.report(nodes.head.run_dir).sessions if it.role == "relay"
        ]


class TestARankBehindARelay:
    def test_that_dies_without_a_word_is_told_above(self, tmp_path: Path):
        never = tmp_path / "never"
        with Topology(tmp_path, order__patience_s=1.0, intake__heartbeat_s=1.0, relay=QUICK_HEARTS) as nodes:
            nodes.train([*command(steps=10, until=never), "--pids", str(tmp_path)])
            nodes.wait_for_rows()
            killed(psutil.Process(int((tmp_path / "3").read_text())))
            eventually(lambda: "rank 3 ended without a word" in nodes.head.alerts(), DEADLINE_S, nodes.log)
            never.touch()
            assert [0, 0, 0] == nodes.wait()[:3], nodes.log()
            nodes.finish()

            lost = [it for it in status.report(nodes.head.run_dir).sessions if it.state == "lost"]
            assert [3] == [it.rank for it in lost]
            assert all(ledger.balances for ledger in nodes.ledgers())


class TestARelayThatIsStopped:
    def test_with_a_backlog_hands_it_on_when_it_is_taken_up(self, tmp_path: Path):
        with Topology(tmp_path, order__patience_s=1.0, nodes=1) as nodes:
            relay, proxy = nodes.relays[0], nodes.proxies[0]
            proxy.set(REFUSE)
            nodes.train(command(steps=50), ranks_per_node=2)
            assert [0, 0] == nodes.wait(), nodes.log()
            relay.stop()
            assert relay.ledger().pending >= 100
            eventually(lambda: proxy.refused > 0, DEADLINE_S, nodes.log)

            refused = sidestep("sync", str(relay.run_dir))
            assert (2, True) == (refused.returncode, "is a relay" in refused.stderr), refused.stderr
            proxy.set(PASS)
            drained = sidestep("drain", str(relay.run_dir))
            assert 0 == drained.returncode, drained.stderr
            assert 0 == nodes.head.finish()

            assert not relay.run_dir.exists(), "the daemon above has all of it"
            assert {rank: list(range(50)) for rank in range(2)} == steps_of_ranks(nodes.head.rows())
            ledger = status.report(nodes.head.run_dir).ledger
            assert (True, 0) == (ledger.balances, ledger.pending)


class TestARelayWhoseDiskIsLost:
    @pytest.mark.parametrize("lost", ["spool.db", "delivery.db"])
    def test_tells_above_what_is_missing(self, tmp_path: Path, lost: str):
        """Of its spool: what nobody else has. Of what it knows of its way up: nothing, as it asks above."""
        with Topology(tmp_path, order__patience_s=1.0, nodes=1) as nodes:
            relay, proxy = nodes.relays[0], nodes.proxies[0]
            worker = relay.worker(node="node0")
            worker.hello()
            worker.log(*range(5))
            eventually(lambda: nodes.rows_of_head() == 5, DEADLINE_S, nodes.log)
            proxy.set(REFUSE)
            worker.log(*range(5, 15))
            relay.kill()
            for path in relay.home.glob(f"{lost}*"):
                path.unlink()
            relay.start()
            worker.hello()
            worker.log(*range(15, 20))
            worker.bye(exit_code=0)
            eventually(lambda: proxy.refused > 0, DEADLINE_S, nodes.log)
            proxy.set(PASS)
            nodes.finish()

            gone = range(5, 15) if lost == "spool.db" else ()
            assert [step for step in range(20) if step not in gone] == nodes.head.steps()
            head, below = nodes.ledgers()
            assert (20, len(gone)) == (head.offered, head.dropped.get("spool_lost", 0)), (head, below)
            assert (True, True, 0, 0) == (head.balances, below.balances, head.pending, below.pending), (
                head,
                below,
            )


QUICK_HEARTS = {"intake__heartbeat_s": 1.0}


def sidestep(*words: str) -> subprocess.CompletedProcess[str]:
    """The command, to its end."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("SIDESTEP_", "WANDB_"))}
    return subprocess.run(
        [sys.executable, "-m", "sidestep", *words], env=own, capture_output=True, text=True, timeout=120
    )
