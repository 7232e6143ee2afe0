"""The samplers of a real daemon: a process beside intake and delivery, over GPUs that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from sidestep.wire import Kind, Record, encode_record
from sidestepd import status
from sidestepd.samplers.names import METRICS, look_up
from tests.support.daemons import DEADLINE_S, RawWorker, Serve, ServedRun, killed
from tests.support.gpus import COMPILER, NO_COMPILER, StubGpus
from tests.support.waiting import eventually

pytestmark = pytest.mark.skipif(COMPILER is None, reason=NO_COMPILER)

UNKNOWN, NOT_SUPPORTED, LOST, MISMATCH, NOT_LOADED = 999, 3, 15, 18, 9
NODE = os.uname().nodename


@pytest.fixture
def gpus(tmp_path: Path) -> StubGpus:
    return StubGpus(tmp_path)


def sampling(serve: Serve, gpus: StubGpus, **options: Any) -> ServedRun:
    """A run whose GPUs are sampled as fast as can be; nothing else is, unless it is asked for."""
    quick = {"samplers__enabled": True, "samplers__interval_s": 0.5, "samplers__slow_interval_s": 0.5}
    only_gpus = {"samplers__host": False, "samplers__own": False}
    return serve(environment=gpus.environment, **{**quick, **only_gpus, **options})


@contextmanager
def training(served: ServedRun, pause_s: float = 0.02) -> Iterator[list[int]]:
    """A worker that logs a step now and then until the block ends; the steps are in the list."""
    worker, steps, over = served.worker(node=NODE), list[int](), threading.Event()
    worker.hello()

    def train() -> None:
        while not over.wait(pause_s):
            worker.log(len(steps))
            steps.append(len(steps))

    thread = threading.Thread(target=train)
    thread.start()
    try:
        yield steps
    finally:
        over.set()
        thread.join()
    worker.bye()


def wait_for(served: ServedRun, what: Callable[[], object], why: str = "") -> None:
    eventually(what, DEADLINE_S, lambda: f"{why}:\n{served.log()}")


def streamed(served: ServedRun, name: str, *, after: float = 0.0) -> list[float]:
    """The values of a name in the stream, of samples that were taken after a time."""
    return [it.values[name] for it in served.stream() if it.time > after and name in it.values]


def told(served: ServedRun, title: str) -> bool:
    return title in served.alerts()


def assert_samples_are_extra(served: ServedRun, steps: list[int]) -> None:
    """Rows are what was logged, no more; and the ledger knows of every record, the samples too."""
    assert steps == served.steps()
    ledger = served.ledger()
    assert ledger.balances
    assert (0, 0) == (ledger.pending, ledger.unknown)
    assert ledger.offered == ledger.delivered > len(steps)


class TestGpus:
    @pytest.mark.parametrize("count", [0, 1, 2, 8])
    def test_are_in_the_stream_and_the_newest_in_rows(self, serve: Serve, gpus: StubGpus, count: int) -> None:
        gpus.set(count=count)
        for number in range(count):
            gpus.gpu(number, util=10 * number + 5)
        served = sampling(serve, gpus, sink="wandb")

        with training(served) as steps:
            wait_for(served, lambda: len(streamed(served, "gpu_count")) >= 4)
            wait_for(served, lambda: not count or len(read_from_rows(served, "system/gpu0/utilization")) >= 2)
        assert served.finish() == 0

        last = served.stream()[-2].values
        assert {f"gpu.{i}.gpu": 10 * i + 5 for i in range(count)} == only(last, ".gpu")
        assert {f"gpu.{i}.powerWatts": 300 for i in range(count)} == only(last, ".powerWatts")
        for number in range(count):
            values = read_from_rows(served, f"system/gpu{number}/utilization")
            assert values
            assert set(values) == {10 * number + 5}
        assert_samples_are_extra(served, steps)

    def test_go_into_each_row_once_and_only_by_the_short_list(self, serve: Serve, gpus: StubGpus) -> None:
        gpus.set(count=2)
        served = sampling(serve, gpus)

        with training(served, pause_s=0.01):
            wait_for(served, lambda: len(read_from_rows(served, "system/gpu0/utilization")) >= 3)
        assert served.finish() == 0

        rows = [row.values for row in served.rows()]
        readings = len(streamed(served, "system/gpu0/utilization"))
        assert len(read_from_rows(served, "system/gpu0/utilization")) <= readings < len(rows)
        in_rows = {name for row in rows for name in row if name.startswith("system/")}
        short = {metric.name for metric in METRICS if metric.history or metric.cadence == "row"}
        assert {known.metric.name for name in in_rows if (known := look_up(name))} <= short
        assert "system/energy_j" in in_rows
        assert "system/energy_per_step_j" in in_rows

    def test_every_fault_is_a_gap_and_heals(self, serve: Serve, gpus: StubGpus) -> None:
        """One run, whose `.wandb` file tells of all of them in the end."""
        gpus.set(count=3).error(2, NOT_SUPPORTED, "nvmlDeviceGetPowerUsage").field(2, 82, UNKNOWN)
        served = sampling(serve, gpus, sink="wandb")

        def sampled(number: int, after: float) -> bool:
            return bool(streamed(served, f"gpu.{number}.gpu", after=after))

        with training(served) as steps:
            wait_for(served, lambda: sampled(2, 0.0), "no GPUs")

            gpus.error(1, LOST)
            wait_for(served, lambda: told(served, "GPU 1 is lost"), "no loss")
            lost_at = time.time()
            wait_for(served, lambda: sampled(0, lost_at) and sampled(2, lost_at), "others stopped")
            assert not sampled(1, lost_at)
            gpus.error(1, 0)
            wait_for(served, lambda: sampled(1, lost_at) and told(served, "GPU 1 is back"), "no return")

            gpus.xid(0, 79).xid(2, 31)
            wait_for(
                served, lambda: told(served, "XID 79 on GPU 0") and told(served, "XID 31 on GPU 2"), "no XIDs"
            )

            for number in range(3):
                gpus.error(number, UNKNOWN)  # as in a container that lost its devices
            wait_for(served, lambda: told(served, "NVML does not answer"), "no gap")
            gpus.set(init=MISMATCH)  # the driver is replaced
            for number in range(3):
                gpus.error(number, 0)
            gap_at = time.time()
            wait_for(served, lambda: served.alerts().count("NVML does not answer") == 2, "no mismatch")
            gpus.set(init=0, count=2)
            wait_for(served, lambda: told(served, "NVML answers again"), "no answer")
            wait_for(served, lambda: told(served, "The number of GPUs changed"), "no change of number")
            wait_for(served, lambda: sampled(1, gap_at), "nothing after the gap")

            gpus.field(1, 82, 0).error(1, 0, "nvmlDeviceGetPowerUsage")
            gpus.set(count=3)
            wait_for(served, lambda: served.alerts().count("The number of GPUs changed") == 2, "no second change")
        assert served.finish() == 0

        assert not streamed(served, "gpu.2.powerWatts")
        assert streamed(served, "gpu.1.powerWatts")
        assert 79 in streamed(served, "gpu.0.xid")
        assert 79 in read_from_rows(served, "system/gpu0/xid")
        assert served.failures_of_samplers() == 0
        assert_samples_are_extra(served, steps)
        told_of = {alert.title: alert for alert in status.report(served.run_dir).alerts}
        assert "ERROR" == told_of["GPU 1 is lost"].level

    def test_that_hang_hold_up_nothing_else(self, serve: Serve, gpus: StubGpus) -> None:
        gpus.set(count=2, delay_us=30_000_000)
        served = sampling(serve, gpus, samplers__own=True)

        with training(served) as steps:
            wait_for(served, lambda: len(streamed(served, "sidestep/memory_bytes")) >= 3)
            wait_for(served, lambda: len(served.steps()) > 20)
        before = time.monotonic()
        assert served.finish() == 0

        assert time.monotonic() - before < 25
        assert not streamed(served, "system/gpu0/utilization")
        assert_samples_are_extra(served, steps)

    def test_are_shared_by_the_ranks_whose_processes_are_on_them(self, serve: Serve, gpus: StubGpus) -> None:
        gpus.set(count=1).process(0, os.getpid(), 3 << 30).process(0, 1, 1 << 30)
        served = sampling(serve, gpus)
        served.worker(rank=5, node=NODE, pid=os.getpid()).hello()

        wait_for(served, lambda: 3 << 30 in streamed(served, "system/gpu0/rank5/memory_bytes"))

        assert 1 in streamed(served, "system/gpu0/foreign_process_count")

    def test_are_those_that_nvitop_sees(self, serve: Serve, gpus: StubGpus) -> None:
        pytest.importorskip("nvitop")
        gpus.set(count=2).gpu(0, util=71, mem_used=7 << 30, temp=61).gpu(1, util=3, mem_used=1 << 30, temp=33)
        served = sampling(serve, gpus)

        with training(served):
            wait_for(served, lambda: len(streamed(served, "system/gpu1/utilization")) >= 2)
        served.finish()

        newest = {name: value for it in served.stream() for name, value in it.values.items()}
        ours = [
            [newest[f"system/gpu{i}/{name}"] for name in ("utilization", "memory_used_bytes", "temperature_c")]
            + [round(newest[f"system/gpu{i}/power_w"] * 1000)]
            for i in (0, 1)
        ]
        assert nvitop_says(gpus) == ours


class TestSamplers:
    def test_that_are_killed_come_back(self, serve: Serve, gpus: StubGpus) -> None:
        gpus.set(count=1)
        served = sampling(serve, gpus)

        with training(served) as steps:
            wait_for(served, lambda: streamed(served, "system/gpu0/utilization"))
            first = killed(served.samplers())
            successor = served.samplers(other_than=first.pid)
            started = successor.create_time()
            wait_for(served, lambda: streamed(served, "system/gpu0/utilization", after=started))
        assert served.finish() == 0

        assert steps == served.steps()
        assert served.ledger().balances

    def test_die_with_intake(self, serve: Serve, gpus: StubGpus) -> None:
        served = sampling(serve, gpus)
        served.worker(node=NODE).hello()
        samplers = served.samplers()

        assert served.process is not None
        served.process.kill()

        eventually(lambda: not samplers.is_running() or samplers.status() == psutil.STATUS_ZOMBIE, DEADLINE_S)

    def test_of_an_intake_that_was_killed_are_no_lost_worker(self, serve: Serve, gpus: StubGpus) -> None:
        gpus.set(count=1)
        served = sampling(serve, gpus)
        worker = served.worker(node=NODE)
        worker.hello()
        worker.log(0, 1)
        wait_for(served, lambda: streamed(served, "system/gpu0/utilization"))

        served.kill()
        served.start()
        restarted = time.time()
        worker.hello()
        wait_for(served, lambda: streamed(served, "system/gpu0/utilization", after=restarted))
        worker.log(2, 3)
        worker.bye()
        assert served.finish() == 0

        report = status.report(served.run_dir)
        assert (0, 1, [0, 1, 2, 3]) == (report.lost_sessions, report.ranks, served.steps())
        assert {"worker", "sampler"} == {session.role for session in report.sessions}
        assert report.ledger.balances
        assert 0 == report.ledger.pending

    def test_are_no_rank_and_hold_no_row(self, serve: Serve, gpus: StubGpus) -> None:
        """With patience beyond the test's end, a session that held the axis would keep every row."""
        gpus.set(count=1)
        served = sampling(serve, gpus, order__patience_s=1000)
        worker = served.worker(node=NODE)
        worker.hello()
        wait_for(served, lambda: streamed(served, "system/gpu0/utilization"))

        worker.log(0, 1, 2)

        wait_for(served, lambda: [0, 1] == served.steps()[:2])
        assert (1, 1) == (served.status()["sessions"], served.status()["live"])

    def test_come_only_after_the_first_worker(self, serve: Serve, gpus: StubGpus) -> None:
        served = sampling(serve, gpus)

        assert served.status()["samplers"]["pid"] is None
        served.worker(node=NODE).hello()
        assert served.samplers()

    def test_that_are_switched_off_are_not_there(self, serve: Serve, gpus: StubGpus) -> None:
        served = sampling(serve, gpus, samplers__enabled=False)
        with training(served):
            wait_for(served, served.steps)
        served.finish()

        assert served.failures_of_samplers() is None
        assert not served.stream()

    def test_are_in_the_stream_once_though_delivery_is_killed(self, serve: Serve, gpus: StubGpus) -> None:
        gpus.set(count=1)
        served = sampling(serve, gpus, sink="wandb", delivery__confirm_interval_s=30)  # so that much is read again

        with training(served) as steps:
            for _ in range(2):
                delivery = served.delivery()
                before = time.time()
                wait_for(served, lambda at=before: streamed(served, "gpu.0.gpu", after=at))
                killed(delivery)
                served.delivery(other_than=delivery.pid)
            after = time.time()
            wait_for(served, lambda: streamed(served, "gpu.0.gpu", after=after))
        assert served.finish() == 0

        times = [it.time for it in served.stream()]
        assert len(times) == len(set(times))
        assert_samples_are_extra(served, steps)

    def test_are_in_the_stream_once_though_delivery_dies_before_it_tells(
        self, serve: Serve, gpus: StubGpus
    ) -> None:
        """Each life tells once what it has read, and dies between writing that down again and telling."""
        gpus.set(count=1)
        served = sampling(serve, gpus, crash_at="delivery.stream:2", delivery__confirm_interval_s=30)

        with training(served) as steps:
            wait_for(served, lambda: served.status()["delivery"]["restarts"] >= 3)
        assert served.finish() == 0

        times = [it.time for it in served.stream()]
        assert times
        assert len(times) == len(set(times))
        assert_samples_are_extra(served, steps)


class TestTorchAllocators:
    """What a worker says of its own process, on the GPU that it means."""

    def test_go_before_what_nvml_says(self, serve: Serve, gpus: StubGpus) -> None:
        gpus.set(count=2).gpu("*", mem_used=5 << 30)
        served = sampling(serve, gpus)
        worker = served.worker(node=NODE)
        worker.hello()
        wait_for(served, lambda: 5 << 30 in streamed(served, "system/gpu1/memory_allocated"))

        say_allocated(worker, 3 << 30, ordinal=0, device=gpus.uuid(1))
        wait_for(served, lambda: 3 << 30 in streamed(served, "system/gpu1/memory_allocated"))
        since = time.time()
        wait_for(served, lambda: streamed(served, "system/gpu1/utilization", after=since))

        assert not streamed(served, "system/gpu1/memory_allocated", after=since)
        assert 5 << 30 in streamed(served, "system/gpu0/memory_allocated", after=since)

    def test_are_asked_for_at_the_interval(self, serve: Serve, gpus: StubGpus) -> None:
        assert sampling(serve, gpus, samplers__interval_s=0.75).worker().hello().sample_interval_s == 0.75

    @pytest.mark.parametrize("switch", ["samplers__torch", "samplers__enabled"])
    def test_are_not_asked_for_when_switched_off(self, serve: Serve, gpus: StubGpus, switch: str) -> None:
        assert sampling(serve, gpus, **{switch: False}).worker().hello().sample_interval_s == 0


def say_allocated(worker: RawWorker, size: int, **device: Any) -> None:
    data = {"values": {"memory_allocated": size, "memory_reserved": size}, **device}
    worker.log(records=[encode_record(Record(kind=Kind.SAMPLES, time=time.time(), step=None, data=data))])


def read_from_rows(served: ServedRun, name: str) -> list[float]:
    return [row.values[name] for row in served.rows() if name in row.values]


def only(values: Any, ending: str) -> dict[str, float]:
    return {name: value for name, value in values.items() if name.endswith(ending)}


def nvitop_says(gpus: StubGpus) -> list[list[int]]:
    script = """
import json, nvitop
print(json.dumps([
    [it.gpu_utilization(), it.memory_used(), it.temperature(), it.power_usage()] for it in nvitop.Device.all()
]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | gpus.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found: list[list[int]] = json.loads(done.stdout)
    return found
