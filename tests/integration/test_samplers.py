"""The samplers of a real daemon: a process beside intake and delivery, over GPUs that are not there.

Most of it happens in one run, which is trained in all the while: `life` is that run. What a test does to its GPUs
heals before the next one, and the last one reads the whole run back.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sidestep.wire import Kind, Record, encode_record
from sidestepd import status
from sidestepd.samplers.names import METRICS, look_up
from tests.support.daemons import DEADLINE_S, RawWorker, ServedRun, killed, see_gone
from tests.support.gpus import COMPILER, NO_COMPILER, StubGpus
from tests.support.waiting import eventually

pytestmark = pytest.mark.skipif(COMPILER is None, reason=NO_COMPILER)

UNKNOWN, NOT_SUPPORTED, LOST, MISMATCH, NOT_LOADED = 999, 3, 15, 18, 9
NODE = os.uname().nodename
QUICK = {"samplers__enabled": True, "samplers__interval_s": 0.5, "samplers__slow_interval_s": 0.5}
FOR_EVER_US = 30_000_000
"""As good as for ever, for a call of NVML's."""


@dataclass(slots=True)
class Life:
    """A run whose GPUs are sampled as fast as can be, with a worker that logs a step now and then."""

    served: ServedRun
    gpus: StubGpus
    worker: RawWorker
    steps: list[int] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def train(self) -> None:
        """Until the end."""
        self.worker.hello()
        self._thread = threading.Thread(target=self._train)
        self._thread.start()

    def _train(self) -> None:
        while not self._over.wait(0.05):
            self.worker.log(len(self.steps))
            self.steps.append(len(self.steps))

    def end_training(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait_for(self, what: Callable[[], object], why: str = "") -> None:
        eventually(what, 2 * DEADLINE_S, lambda: f"{why}:\n{self.served.log()}")

    def sampled(self, number: int, after: float) -> bool:
        """Whether a GPU is sampled."""
        return bool(streamed(self.served, f"gpu.{number}.gpu", after=after))

    def see_sampled(self, number: int) -> None:
        """Until it is, from now on."""
        now = time.time()
        self.wait_for(lambda: self.sampled(number, now), f"GPU {number} is not sampled")

    def told(self, title: str, since: int) -> bool:
        """Whether people were told so, but for the first alerts of all."""
        return title in self.served.alerts()[since:]


@contextmanager
def living(folder: Path, *, crash_at: str | None = None, **options: Any) -> Iterator[Life]:
    """With patience beyond the test's end: a session of samplers that held an axis would keep every row."""
    gpus = StubGpus(folder)
    options = {**QUICK, "order__patience_s": 1000, "delivery__confirm_interval_s": 30, **options}
    with ServedRun(folder, environment=gpus.environment, **options) as served:
        served.start(crash_at=crash_at)
        life = Life(served, gpus, served.worker(node=NODE, pid=os.getpid()))
        try:
            yield life
        finally:
            life.end_training()


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    with living(tmp_path_factory.mktemp("life"), sink="wandb") as life:
        life.train()
        yield life


def streamed(served: ServedRun, name: str, *, after: float = 0.0) -> list[float]:
    """The values of a name in the stream, of samples that were taken after a time."""
    return [it.values[name] for it in served.stream() if it.time > after and name in it.values]


def newest(served: ServedRun, *, after: float) -> dict[str, float]:
    """What was read last of each name."""
    return {name: value for it in served.stream() if it.time > after for name, value in it.values.items()}


def titles(served: ServedRun) -> list[str]:
    """What the run's status says that people were told."""
    return [alert.title for alert in status.report(served.run_dir).alerts]


def assert_samples_are_extra(life: Life) -> None:
    """Rows are what was logged, no more; the ledger knows of every record, and the stream has each sample once."""
    served, steps = life.served, life.steps
    assert steps == served.steps()
    ledger = served.ledger()
    assert ledger.balances
    assert (0, 0) == (ledger.pending, ledger.unknown)
    assert ledger.offered == ledger.delivered > len(steps)
    told = [(it.time, name) for it in served.stream() for name in it.values]
    assert len(told) == len(set(told))
    assert {NODE} == {it.node for it in served.stream()}


class TestGpus:
    def test_are_in_the_stream_and_the_newest_in_rows_however_many_there_are(self, life: Life) -> None:
        served, gpus = life.served, life.gpus
        for count in (0, 1, 2, 8):
            gpus.reset(count)
            for number in range(count):
                gpus.gpu(number, util=10 * number + count, power_mw=300_000)
            changed, rows = time.time(), len(served.rows())
            wanted = {f"gpu.{i}.gpu": 10 * i + count for i in range(count)}
            life.wait_for(
                lambda at=changed, wanted=wanted: wanted == only(served, ".gpu", after=at), f"not {count} GPUs"
            )
            last = f"system/gpu{count - 1}/utilization"
            life.wait_for(
                lambda rows=rows, last=last, count=count: (
                    not count or 10 * (count - 1) + count in read_from_rows(served, last, rows)
                ),
                "not in rows",
            )

        alone = {"gpu.0.smActive", "gpu.7.powerWatts", "gpu.7.smActive", "gpu.7.pcieLinkWidth", "gpu_count"}
        life.wait_for(lambda: alone <= newest(served, after=changed).keys())
        in_rows = read_from_rows(served, "system/gpu0/utilization")  # before the stream: that is told first
        assert len(in_rows) <= len(streamed(served, "gpu.0.gpu")) < len(served.rows()), "a reading is in one row"

    def test_are_those_that_nvitop_sees(self, life: Life) -> None:
        pytest.importorskip("nvitop")
        life.gpus.reset(2).gpu(0, util=71, mem_used=7 << 30, temp=61).gpu(1, util=3, mem_used=1 << 30, temp=33)
        names = ("gpu", "memoryAllocatedBytes", "temp", "powerWatts")
        since, seen = time.time(), nvitop_says(life.gpus)

        def ours() -> list[list[float]]:
            now = newest(life.served, after=since)
            return [[now.get(f"gpu.{i}.{name}", -1) for name in names] for i in (0, 1)]

        assert [[71, 7 << 30, 61, 300_000], [3, 1 << 30, 33, 300_000]] == seen
        life.wait_for(lambda: [[*it[:3], it[3] / 1000] for it in seen] == ours(), f"not as nvitop: {seen}")

    def test_are_shared_by_the_ranks_whose_processes_are_on_them(self, life: Life) -> None:
        life.gpus.reset(1).process(0, os.getpid(), 3 << 30).process(0, 1, 1 << 30)
        life.wait_for(lambda: 3 << 30 in streamed(life.served, "gpu.0.rank0.memory_bytes"))
        life.wait_for(lambda: 1 in streamed(life.served, "gpu.0.foreign_process_count"))

    def test_are_lost_and_found_alone(self, life: Life) -> None:
        served, gpus, before, begun = life.served, life.gpus, len(life.served.alerts()), time.time()
        gpus.reset(3).error(2, NOT_SUPPORTED, "nvmlDeviceGetPowerUsage").field(2, 82, UNKNOWN)
        life.wait_for(lambda: life.sampled(2, begun), "no GPUs")
        missing = ("powerWatts", "powerPercent", "memory_temperature_c")
        assert [True] * 3 == [bool(streamed(served, f"gpu.0.{it}", after=begun)) for it in missing]
        assert [[]] * 3 == [streamed(served, f"gpu.2.{it}", after=begun) for it in missing]

        gpus.error(1, LOST)
        life.wait_for(lambda: life.told("GPU 1 is lost", before), "no loss")
        lost_at = time.time()
        life.wait_for(lambda: life.sampled(0, lost_at) and life.sampled(2, lost_at), "others stopped")
        assert not life.sampled(1, lost_at)
        gpus.error(1, 0)
        life.wait_for(lambda: life.sampled(1, lost_at) and life.told("GPU 1 is back", before), "no return")
        gpus.xid(0, 79).xid(2, 31)
        life.wait_for(
            lambda: life.told("XID 79 on GPU 0", before) and life.told("XID 31 on GPU 2", before), "no XIDs"
        )

        gpus.error(2, 0, "nvmlDeviceGetPowerUsage").field(2, 82, 0)
        life.wait_for(lambda: streamed(served, "gpu.2.memory_temperature_c", after=begun), "not asked again")
        assert not streamed(served, "gpu.2.powerWatts", after=begun), "what is not supported is not asked again"
        assert streamed(served, "gpu.1.powerWatts", after=begun)
        assert 79 in streamed(served, "gpu.0.xid")
        life.wait_for(lambda: 79 in read_from_rows(served, "system/gpu0/xid"))

    @pytest.mark.parametrize("code", [UNKNOWN, NOT_LOADED], ids=["a container loses", "lose their driver"])
    def test_that_are_gone_together_are_a_gap(self, life: Life, code: int) -> None:
        """All answer with an error, and so does a start of NVML; then they are there again, but for one."""
        gpus, before = life.gpus, len(life.served.alerts())
        gpus.reset(3)
        life.see_sampled(2)
        gpus.error("*", code).set(init=code)
        life.wait_for(lambda: life.told("NVML does not answer", before), "no gap")
        gap_at = time.time()
        gpus.error("*", 0).set(init=0, count=2)
        life.wait_for(lambda: life.told("NVML answers again", before), "no answer")
        life.wait_for(lambda: life.told("The number of GPUs changed", before), "no change of number")
        life.wait_for(lambda: life.sampled(1, gap_at), "nothing after the gap")

    def test_that_are_divided_are_told_by_their_instances(self, life: Life) -> None:
        """MIG, where NVML knows no utilization."""
        gpus, begun = life.gpus, time.time()
        gpus.reset(2).gpu(0, mig=2, mig_used=3 << 30, mig_gpm_2=17)
        gpus.error(0, NOT_SUPPORTED, "nvmlDeviceGetUtilizationRates").process(0, os.getpid(), 1 << 30)
        wanted = {
            "gpu.0.mig_instances": 2, "gpu.0.mig1.memory_used_bytes": 3 << 30, "gpu.0.mig2.sm_active_percent": 17,
            "gpu.0.rank0.memory_bytes": 2 << 30,
        }  # fmt: skip
        life.wait_for(lambda: wanted.items() <= newest(life.served, after=begun).items(), f"not {wanted}")

        since = time.time()
        life.see_sampled(1)
        assert not life.sampled(0, since)

    def test_whose_driver_is_replaced_are_read_by_a_new_process(self, life: Life) -> None:
        """The library that the old one has loaded is of no use for the new driver, ever."""
        gpus, before, first = life.gpus, len(life.served.alerts()), life.served.samplers()
        gpus.reset(1).set(init=MISMATCH, replaced=time.time_ns())
        life.wait_for(lambda: life.told("NVML does not answer", before), "no gap")
        gpus.set(init=0)
        life.wait_for(lambda: life.told("NVML answers again", before), "no answer")
        successor = life.served.samplers(other_than=first.pid)
        life.wait_for(lambda: life.sampled(0, successor.create_time()), "nothing after the gap")


class TestTorchAllocators:
    def test_go_before_what_nvml_says(self, life: Life) -> None:
        served, gpus, begun = life.served, life.gpus, time.time()
        gpus.reset(2).gpu("*", mem_used=5 << 30)
        life.wait_for(lambda: 5 << 30 in streamed(served, "gpu.1.memory_allocated", after=begun))

        other = served.worker(rank=1, world=2, node=NODE, pid=os.getpid())
        assert other.hello().sample_interval_s == QUICK["samplers__interval_s"]
        say_allocated(other, 3 << 30, ordinal=0, device=gpus.uuid(1))
        other.bye()
        life.wait_for(lambda: 3 << 30 in streamed(served, "gpu.1.memory_allocated", after=begun))
        since = time.time()
        life.wait_for(lambda: life.sampled(1, since))

        assert not streamed(served, "gpu.1.memory_allocated", after=since)
        assert 5 << 30 in streamed(served, "gpu.0.memory_allocated", after=since)


class TestSamplers:
    def test_that_are_killed_come_back_and_tell_nothing_again(self, life: Life) -> None:
        """A GPU that was lost before is lost still; people hear next that it is back."""
        gpus, before = life.gpus, len(life.served.alerts())
        gpus.reset(2)
        life.see_sampled(1)
        gpus.error(1, LOST)
        life.wait_for(lambda: life.told("GPU 1 is lost", before), "no loss")
        first = killed(life.served.samplers())
        successor = life.served.samplers(other_than=first.pid)
        life.wait_for(lambda: life.sampled(0, successor.create_time()))
        gpus.error(1, 0)
        life.wait_for(lambda: life.told("GPU 1 is back", before), "no return")

        told = [it for it in life.served.alerts()[before:] if it.startswith("GPU 1")]
        assert ["GPU 1 is lost", "GPU 1 is back"] == told

    def test_are_in_the_stream_once_though_delivery_is_killed(self, life: Life) -> None:
        """What it had read is read again; that nothing is there twice, the end tells."""
        life.gpus.reset(1)
        delivery = life.served.delivery()
        life.see_sampled(0)
        killed(delivery)
        life.served.delivery(other_than=delivery.pid)
        life.see_sampled(0)

    def test_of_gpus_that_hang_hold_up_nothing_else_and_the_run_is_whole(self, life: Life) -> None:
        served, gpus = life.served, life.gpus
        gpus.reset(2).set(delay_us=FOR_EVER_US)
        hung_at, steps = time.time(), len(life.steps)
        life.wait_for(lambda: len(streamed(served, "sidestep.memory_bytes", after=hung_at)) >= 3)
        life.wait_for(lambda: len(served.steps()) > steps + 20)
        life.end_training()
        life.worker.bye()
        before = time.monotonic()
        assert served.finish() == 0

        assert time.monotonic() - before < FOR_EVER_US / 1e6 - 5
        assert ["begun"] == gpus.hung(), "a call of NVML's hung, and was not over when all else was"
        assert served.failures_of_samplers() == 0
        assert_samples_are_extra(life)
        assert_rows_have_the_short_list(served)


class TestOtherLives:
    def test_of_an_intake_that_was_killed_are_no_lost_worker(self, tmp_path: Path) -> None:
        with living(tmp_path) as life:
            served, worker = life.served, life.worker
            life.gpus.set(count=1)
            assert served.status()["samplers"]["pid"] is None, "they come after the first worker"
            worker.hello()
            samplers = served.samplers()
            worker.log(0, 1)
            life.wait_for(lambda: streamed(served, "system/gpu0/utilization"))
            assert (1, 1) == (served.status()["sessions"], served.status()["live"])

            assert served.process is not None
            served.process.kill()
            see_gone(samplers)
            served.kill()
            served.start()
            restarted = time.time()
            worker.hello()
            life.wait_for(lambda: streamed(served, "system/gpu0/utilization", after=restarted))
            worker.log(2, 3)
            worker.bye()
            assert served.finish() == 0

        report = status.report(served.run_dir)
        assert (0, 1, [0, 1, 2, 3]) == (report.lost_sessions, report.ranks, served.steps())
        assert {"worker", "sampler"} == {session.role for session in report.sessions}
        assert report.ledger.balances
        assert 0 == report.ledger.pending

    def test_of_a_delivery_that_dies_before_it_tells_are_told_once_at_most_and_alerts_in_any_case(
        self, tmp_path: Path
    ) -> None:
        """Each life tells once what it has read, and dies between writing that down again and telling."""
        with living(tmp_path, crash_at="delivery.stream:2") as life:
            life.gpus.set(count=1).error(0, LOST)
            life.train()
            life.wait_for(lambda: life.served.status()["delivery"]["restarts"] >= 3)
            life.gpus.error(0, 0)
            life.wait_for(
                lambda: "GPU 0 is back" in [it.title for it in status.report(life.served.run_dir).alerts]
            )
            life.end_training()
            life.worker.bye()
            assert life.served.finish() == 0

        assert life.served.stream()
        assert_samples_are_extra(life)
        assert ["GPU 0 is lost", "GPU 0 is back"] == titles(life.served)
        assert set(life.served.alerts()) <= set(titles(life.served))


def assert_rows_have_the_short_list(served: ServedRun) -> None:
    """By the names that the page says."""
    rows = [row.values for row in served.rows()]
    in_rows = {name for row in rows for name in row if name.startswith("system/")}
    short = {metric.name for metric in METRICS if metric.history or metric.cadence == "row"}
    assert {known.metric.name for name in in_rows if (known := look_up(name))} <= short
    assert {"system/energy_j", "system/energy_per_step_j", "system/gpu_idle_s", "system/cpu/percent"} <= in_rows


def say_allocated(worker: RawWorker, size: int, **device: Any) -> None:
    data = {"values": {"memory_allocated": size, "memory_reserved": size}, **device}
    worker.log(records=[encode_record(Record(kind=Kind.SAMPLES, time=time.time(), step=None, data=data))])


def read_from_rows(served: ServedRun, name: str, first: int = 0) -> list[float]:
    """Of the rows from the `first` on."""
    return [row.values[name] for row in served.rows()[first:] if name in row.values]


def only(served: ServedRun, ending: str, *, after: float) -> dict[str, float]:
    """What the newest reading of all GPUs holds."""
    readings = [it.values for it in served.stream() if it.time > after and "gpu_count" in it.values]
    return {name: it for name, it in readings[-1].items() if name.endswith(ending)} if readings else {"": -1}


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
