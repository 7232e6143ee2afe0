"""A real daemon that hears several nodes: which of them a sample is of, and clocks that differ."""

from __future__ import annotations

import time

import pytest

from sidestep.wire import SAMPLER, Kind, Record, encode_record
from tests.support.daemons import RawWorker, Serve, ServedRun

pytestmark = pytest.mark.chaos

AHEAD_S = 1000.0
"""By how much the clock of every node but the first is wrong."""
STEPS = 6


def sampler(served: ServedRun, node: str) -> RawWorker:
    worker = served.worker(node=node, role=SAMPLER, launch=SAMPLER)
    worker.hello()
    return worker


def read(at: RawWorker, when: float, **values: float) -> None:
    """A sampler tells what it read."""
    data = {"values": {f"system/{name.replace('__', '/')}": value for name, value in values.items()}}
    at.log(records=[encode_record(Record(kind=Kind.SAMPLES, time=when, step=None, data=data))])


def log(at: RawWorker, when: float, step: int) -> None:
    at.log(records=[encode_record(Record(kind=Kind.LOG, time=when, step=step, data={"loss": 1.0}))])


def train(served: ServedRun, nodes: int) -> None:
    """A rank on each node, all in step; before each step but the first every node's GPU is read."""
    ranks = [served.worker(rank, world=nodes, node=f"n{rank}") for rank in range(nodes)]
    for worker in ranks:
        worker.hello()
    samplers = [sampler(served, f"n{rank}") for rank in range(nodes)]
    ahead = [AHEAD_S if rank else 0.0 for rank in range(nodes)]
    for step in range(STEPS):
        for number, at in enumerate(samplers if step else ()):
            read(at, time.time() + ahead[number], gpu0__utilization=10.0 * number, gpu0__power_w=100.0)
        for rank, worker in enumerate(ranks):
            log(worker, time.time() + ahead[rank], step)
    for worker in (*ranks, *samplers):
        worker.bye()
    assert served.finish() == 0


def assert_nothing_else(served: ServedRun) -> None:
    """Samples made no row and are delivered, and no clock made anybody late or a straggler."""
    assert list(range(STEPS)) == served.steps()
    ledger = served.ledger()
    assert ledger.balances
    assert (ledger.offered, 0, 0) == (ledger.delivered, ledger.pending, ledger.unknown)
    assert [] == served.alerts()


def newest(served: ServedRun, name: str) -> float | None:
    """What the last row that has it holds."""
    return next((row.values[name] for row in reversed(served.rows()) if name in row.values), None)


class TestTwoNodes:
    def test_are_in_the_names_of_rows_and_the_labels_of_the_stream(self, serve: Serve):
        served = serve(sink="wandb")

        train(served, nodes=2)

        assert (0.0, 10.0) == tuple(newest(served, f"system/node{n}/gpu0/utilization") for n in range(2))
        assert not [name for row in served.rows() for name in row.values if name.startswith("system/gpu0")]
        stream = served.stream()
        assert ["n0", "n1"] * (STEPS - 1) == [it.node for it in stream]
        assert {0.0} == {it.values["gpu.0.gpu"] for it in stream if it.node == "n0"}
        assert min(it.time for it in stream if it.node == "n1") > max(it.time for it in stream if it.node == "n0")
        skews = [row.values["sidestep/skew_s"] for row in served.rows()]
        assert len(skews) == STEPS
        assert max(map(abs, skews)) < AHEAD_S / 2, "what clocks are wrong by is no skew of ranks"
        assert {2} == {row.values["sidestep/ranks_reported"] for row in served.rows()}
        assert served.failures_of_samplers() is None, "they are switched off"
        assert_nothing_else(served)


class TestManyNodes:
    def test_are_told_of_together_in_rows_and_each_in_the_stream(self, serve: Serve):
        served = serve()

        train(served, nodes=6)

        assert (25.0, 0.0, 600.0) == tuple(
            newest(served, f"system/gpu/{name}") for name in ("utilization.mean", "utilization.min", "power_w.sum")
        )
        assert not [name for row in served.rows() for name in row.values if "/node" in name or "gpu0" in name]
        assert {f"n{n}" for n in range(6)} == {it.node for it in served.stream()}
        assert_nothing_else(served)
