"""The GPU sampler over the real pynvml and a library that stands in for NVIDIA's: what each failure costs."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidestepd.samplers.base import Reading
from sidestepd.samplers.gpu import BACKOFF_S, GpuSampler
from sidestepd.samplers.names import GPU_METRICS, look_up
from sidestepd.samplers.owners import Owners
from tests.support.gpus import COMPILER, NO_COMPILER, StubGpus

pytestmark = pytest.mark.skipif(COMPILER is None, reason=NO_COMPILER)

NOT_SUPPORTED, NO_PERMISSION, NOT_LOADED, NOT_FOUND, LOST, RESET, MISMATCH, UNKNOWN = 3, 4, 9, 13, 15, 16, 18, 999


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StubGpus:
    gpus = StubGpus(tmp_path)
    monkeypatch.setenv("NVML_STUB", "")  # so that it is as before afterwards
    gpus.load()
    return gpus


@pytest.fixture
def sampler() -> GpuSampler:
    made = GpuSampler(slow_interval_s=30)
    yield made
    made.close()


def numbers(reading: Reading, name: str) -> list[int]:
    """The GPUs of which a reading has a value."""
    return [i for i in range(8) if f"system/gpu{i}/{name}" in reading.values]


def titles(reading: Reading) -> list[str]:
    return [notice.title for notice in reading.notices]


class TestReading:
    def test_holds_the_fast_list_each_time_and_the_slow_one_when_due(
        self, gpus: StubGpus, sampler: GpuSampler
    ) -> None:
        gpus.set(count=2).gpu(1, util=7, power_mw=350_000, limit_mw=700_000, reasons=0x24)

        first, second, third = (sampler.read(now) for now in (0.0, 5.0, 30.0))

        assert [[0, 1]] * 3 == [numbers(it, "utilization") for it in (first, second, third)]
        assert [[0, 1], [], [0, 1]] == [numbers(it, "fan_percent") for it in (first, second, third)]
        assert 7 == second.values["system/gpu1/utilization"]
        assert (350, 50) == (second.values["system/gpu1/power_w"], second.values["system/gpu1/power_percent"])
        assert (1, 1, 0) == tuple(
            second.values[f"system/gpu1/throttle/{it}"] for it in ("sw_power_cap", "sw_thermal", "hw_thermal")
        )
        assert third.values["system/gpu0/pcie_sent_bytes_per_s"] >= 0

    def test_has_no_name_that_is_not_in_the_table_and_all_that_are(
        self, gpus: StubGpus, sampler: GpuSampler, tmp_path: Path
    ) -> None:
        gpus.set(count=1).gpu(0, mig=2).process(0, 17, 5)
        (tmp_path / "17").mkdir()
        (tmp_path / "17" / "status").write_text("NSpid:\t17\nPPid:\t1\n")
        sampler = GpuSampler(slow_interval_s=0, owners=Owners(lambda: {17: 0}, proc=tmp_path))
        sampler.read(0.0)
        names = set(sampler.read(1.0).values)
        gpus.xid(0, 79)
        names |= set(sampler.rest(1.0).values)
        gpus.error(0, LOST)
        names |= set(sampler.read(2.0).values)

        kinds = {known.metric.name for name in names if (known := look_up(name)) is not None}

        assert not [name for name in names if look_up(name) is None]
        torchs = {"system/gpu{i}/memory_allocated", "system/gpu{i}/memory_reserved"}
        assert {metric.name for metric in GPU_METRICS} - torchs == kinds

    def test_tells_the_uuids_when_they_change(self, gpus: StubGpus, sampler: GpuSampler) -> None:
        gpus.set(count=2)
        assert {gpus.uuid(0): 0, gpus.uuid(1): 1} == sampler.read(0.0).gpus
        assert sampler.read(1.0).gpus is None

    def test_of_mig_has_the_memory_of_its_instances(self, gpus: StubGpus, sampler: GpuSampler) -> None:
        gpus.set(count=1).gpu(0, mig=2, mig_used=3 << 30).error(0, NOT_SUPPORTED, "nvmlDeviceGetUtilizationRates")

        reading = sampler.read(0.0)

        assert 2 == reading.values["system/gpu0/mig_instances"]
        assert 3 << 30 == reading.values["system/gpu0/mig1/memory_used_bytes"]
        assert {0} == {number for uuid, number in (reading.gpus or {}).items() if uuid.startswith("MIG-")}
        assert not numbers(reading, "utilization")


class TestCapabilities:
    def test_that_are_missing_are_remembered_for_that_gpu_alone(self, gpus: StubGpus, sampler: GpuSampler) -> None:
        gpus.set(count=2).error(0, NOT_SUPPORTED, "nvmlDeviceGetPowerUsage").field(0, 82, NOT_SUPPORTED)
        sampler.read(0.0)
        gpus.error(0, 0, "nvmlDeviceGetPowerUsage").field(0, 82, 0)

        reading = sampler.read(1.0)

        assert [1] == numbers(reading, "power_w") == numbers(reading, "memory_temperature_c")
        assert [0, 1] == numbers(reading, "utilization")

    @pytest.mark.parametrize("code", [NO_PERMISSION, UNKNOWN])
    def test_that_failed_otherwise_are_tried_again(self, gpus: StubGpus, sampler: GpuSampler, code: int) -> None:
        gpus.set(count=2).error(0, code, "nvmlDeviceGetPowerUsage").field(0, 82, code)
        assert [1] == numbers(sampler.read(0.0), "power_w")
        gpus.error(0, 0, "nvmlDeviceGetPowerUsage").field(0, 82, 0)

        reading = sampler.read(1.0)

        assert [0, 1] == numbers(reading, "power_w") == numbers(reading, "memory_temperature_c")

    def test_of_old_drivers_are_asked_for_by_their_old_names(self, gpus: StubGpus, sampler: GpuSampler) -> None:
        gpus.set(count=1).gpu(0, reasons=8)
        gpus.error(0, NOT_FOUND, "nvmlDeviceGetCurrentClocksEventReasons")
        gpus.error(0, NOT_FOUND, "nvmlDeviceGetMemoryInfo_v2").field(0, 83, NOT_SUPPORTED)

        for now in (0.0, 1.0):
            reading = sampler.read(now)

        assert 8 == reading.values["system/gpu0/throttle_mask"]
        assert [0] == numbers(reading, "memory_used_bytes") == numbers(reading, "energy_j")


class TestLostGpus:
    @pytest.mark.parametrize("code", [LOST, RESET])
    def test_are_told_once_and_asked_ever_later(self, gpus: StubGpus, sampler: GpuSampler, code: int) -> None:
        gpus.set(count=3)
        sampler.read(0.0)
        gpus.error(1, code)

        first, second = sampler.read(1.0), sampler.read(1.5)

        assert ["GPU 1 is lost"] == titles(first)
        assert [] == titles(second)
        assert [0, 2] == numbers(first, "utilization") == numbers(second, "utilization")
        assert (1, 1) == tuple(it.values["system/gpu1/lost"] for it in (first, second))

        gpus.error(1, 0)
        assert [0, 2] == numbers(sampler.read(1.9), "utilization")  # not yet
        back = sampler.read(2.0)
        assert (["GPU 1 is back"], [0, 1, 2]) == (titles(back), numbers(back, "utilization"))
        assert 0 == back.values["system/gpu1/lost"]

    def test_that_are_all_lost_do_not_make_nvml_lost(self, gpus: StubGpus, sampler: GpuSampler) -> None:
        gpus.set(count=1)
        sampler.read(0.0)
        gpus.error(0, LOST)
        assert [["GPU 0 is lost"], []] == [titles(sampler.read(now)) for now in (1.0, 1.5)]


class TestNvml:
    @pytest.mark.parametrize("code", [NOT_LOADED])
    def test_that_never_was_there_is_no_news(self, gpus: StubGpus, sampler: GpuSampler, code: int) -> None:
        gpus.set(init=code)
        assert not any(sampler.read(now) for now in (0.0, 1.0, 5.0))

    @pytest.mark.parametrize("code", [UNKNOWN, NOT_LOADED, MISMATCH])
    def test_that_fails_is_a_gap_and_started_anew(self, gpus: StubGpus, sampler: GpuSampler, code: int) -> None:
        gpus.set(count=2)
        sampler.read(0.0)
        gpus.error("*", code).set(init=code)

        lost = sampler.read(1.0)

        assert (["NVML does not answer"], []) == (titles(lost), numbers(lost, "utilization"))
        assert [[], []] == [titles(sampler.read(now)) for now in (2.0, 4.0)]  # said once
        gpus.error("*", 0).set(init=0)
        assert not sampler.read(4.1)  # the next try is due later
        back = sampler.read(4.0 + 4 * BACKOFF_S[0])
        assert (["NVML answers again"], [0, 1]) == (titles(back), numbers(back, "utilization"))

    def test_that_was_replaced_forgets_what_was_not_supported(self, gpus: StubGpus, sampler: GpuSampler) -> None:
        gpus.set(count=1).error(0, NOT_SUPPORTED, "nvmlDeviceGetFanSpeed")
        sampler.read(0.0)
        gpus.error(0, 0, "nvmlDeviceGetFanSpeed").error(0, UNKNOWN)
        sampler.read(1.0)
        gpus.error(0, 0)
        assert [0] == numbers(sampler.read(10.0), "fan_percent")

    def test_that_knows_another_number_of_gpus_is_asked_anew(self, gpus: StubGpus, sampler: GpuSampler) -> None:
        gpus.set(count=2)
        sampler.read(0.0)
        gpus.set(count=1)

        reading = sampler.read(30.0)

        assert ["The number of GPUs changed"] == titles(reading)
        assert ([0], 1) == (numbers(reading, "utilization"), reading.values["system/gpu_count"])

    def test_that_fails_while_it_counts_is_a_gap(self, gpus: StubGpus, sampler: GpuSampler) -> None:
        gpus.set(count=2)
        sampler.read(0.0)
        gpus.set(counting=UNKNOWN)
        assert ["NVML does not answer"] == titles(sampler.read(30.0))
        assert not sampler.read(31.0)
        gpus.set(counting=0)
        assert ["NVML answers again"] == titles(sampler.read(40.0))


class TestEvents:
    def test_are_told_while_the_sampler_rests(self, gpus: StubGpus, sampler: GpuSampler) -> None:
        gpus.set(count=2)
        sampler.read(0.0)
        gpus.xid(1, 79)

        told = sampler.rest(1.0)

        assert ({"system/gpu1/xid": 79}, ["XID 79 on GPU 1"]) == (told.values, titles(told))
        assert "ERROR" == told.notices[0].level

    def test_are_listened_for_anew_after_a_failure(self, gpus: StubGpus, sampler: GpuSampler) -> None:
        gpus.set(count=2, waiting=LOST)
        sampler.read(0.0)
        assert not sampler.rest(0.01)
        gpus.set(waiting=0).xid(1, 79)
        assert not sampler.rest(0.01)

        sampler.read(30.0)  # with the slow list

        assert ["XID 79 on GPU 1"] == titles(sampler.rest(1.0))

    def test_that_come_again_are_counted_and_not_told_again(self, gpus: StubGpus, sampler: GpuSampler) -> None:
        gpus.set(count=1)
        sampler.read(0.0)
        gpus.xid(0, 31)
        assert "WARN" == sampler.rest(1.0).notices[0].level
        gpus.xid(0, 31)
        again = sampler.rest(1.0)
        assert ({"system/gpu0/xid": 31}, []) == (again.values, titles(again))


class TestOwners:
    """Processes are a tree under `proc`; NVML's pids are those of its outermost namespace."""

    def process(self, proc: Path, pid: int, *, parent: int = 1, inside: str = "") -> None:
        (proc / str(pid)).mkdir()
        (proc / str(pid) / "status").write_text(f"Name:\tpython\nPPid:\t{parent}\nNSpid:\t{pid}{inside}\n")

    def test_are_workers_and_their_children(self, tmp_path: Path) -> None:
        self.process(tmp_path, 100)
        self.process(tmp_path, 101, parent=100)
        self.process(tmp_path, 200)
        shares = Owners({100: 3}.copy, proc=tmp_path).share({100: 5, 101: 7, 200: 11})
        assert ({3: 12}, 1) == (shares.by_rank, shares.foreign)

    def test_in_a_container_are_known_by_the_pid_that_they_say(self, tmp_path: Path) -> None:
        self.process(tmp_path, 4711, inside="\t17")
        assert {2: 5} == Owners({17: 2}.copy, proc=tmp_path).share({4711: 5}).by_rank

    def test_that_can_not_be_seen_are_not_guessed(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        owners = Owners({17: 2}.copy, proc=tmp_path)
        shares = owners.share({4711: 5})
        owners.share({4711: 5})
        assert ({}, None) == (shares.by_rank, shares.foreign)
        assert 1 == caplog.text.count("pid namespace")
