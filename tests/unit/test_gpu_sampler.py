"""The GPU sampler over the real pynvml and a library that stands in for NVIDIA's: what each failure costs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pynvml
import pytest

from sidestepd.samplers.base import Reading, StartAnew
from sidestepd.samplers.gpu import GpuSampler
from sidestepd.samplers.names import GPU_METRICS, look_up
from sidestepd.samplers.nvml import BACKOFF_S, of_field
from sidestepd.samplers.owners import MACHINE, Owners
from sidestepd.samplers.told import Told
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
    made = GpuSampler(slow_interval_s=30, works_elsewhere=lambda: False)
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
        assert [[0, 1]] * 3 == [numbers(it, "fan_percent") for it in (first, second, third)]
        assert [[0, 1], [], [0, 1]] == [numbers(it, "pcie_width_lanes") for it in (first, second, third)]
        assert 7 == second.values["system/gpu1/utilization"]
        assert (350, 50) == (second.values["system/gpu1/power_w"], second.values["system/gpu1/power_percent"])
        assert (1, 1, 0) == tuple(
            second.values[f"system/gpu1/throttle/{it}"] for it in ("sw_power_cap", "sw_thermal", "hw_thermal")
        )

    def test_has_no_name_that_is_not_in_the_table_and_all_that_are(
        self, gpus: StubGpus, sampler: GpuSampler, tmp_path: Path
    ) -> None:
        gpus.set(count=2).gpu(0, mig=2).process(0, 17, 5)
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

    def test_of_mig_has_the_processes_of_its_instances(self, gpus: StubGpus, sampler: GpuSampler) -> None:
        gpus.set(count=1).gpu(0, mig=2).process(0, 17, 5)
        assert 1 == sampler.read(0.0).values["system/gpu0/process_count"]

    def test_tells_no_memory_of_a_rank_where_the_driver_tells_none(self, gpus: StubGpus, tmp_path: Path) -> None:
        """A process counts all the same; NVML says the highest number of those whose memory it does not know."""
        gpus.set(count=2).process(0, 17, 2**64 - 1).process(1, 17, 5)
        (tmp_path / "17").mkdir()
        (tmp_path / "17" / "status").write_text("NSpid:\t17\nPPid:\t1\n")
        reading = GpuSampler(owners=Owners(lambda: {17: 3}, proc=tmp_path)).read(0.0)
        assert [0, 1] == numbers(reading, "process_count") == numbers(reading, "foreign_process_count")
        assert [1] == numbers(reading, "rank3/memory_bytes")

    def test_holds_no_number_that_means_none(self, gpus: StubGpus, sampler: GpuSampler) -> None:
        gpus.set(count=1).gpu(0, fan=0xFFFFFFFF, mem_temp=0xFFFFFFFF, replays=2**64 - 1, pstate=32)
        reading = sampler.read(0.0)
        names = ("fan_percent", "memory_temperature_c", "pcie_replays", "pstate", "power_w")
        assert [[], [], [], [], [0]] == [numbers(reading, name) for name in names]


class TestProfiling:
    """GPM: what was so between two readings."""

    def test_tells_of_the_interval_from_the_second_reading_on(self, gpus: StubGpus, sampler: GpuSampler) -> None:
        gpus.set(count=2).gpu(1, gpm_2=71, gpm_20=3)

        first, second = sampler.read(0.0), sampler.read(5.0)

        assert ([], [0, 1]) == (numbers(first, "sm_active_percent"), numbers(second, "sm_active_percent"))
        assert 71 == second.values["system/gpu1/sm_active_percent"]
        assert 3 * 2**20 == second.values["system/gpu1/pcie_sent_bytes_per_s"]

    def test_of_mig_tells_of_each_instance(self, gpus: StubGpus, sampler: GpuSampler) -> None:
        gpus.set(count=1).gpu(0, mig=2, mig_gpm_2=17)
        sampler.read(0.0)
        values = sampler.read(5.0).values
        assert [17, 17] == [values[f"system/gpu0/mig{id_}/sm_active_percent"] for id_ in (1, 2)]
        assert "system/gpu0/sm_active_percent" not in values

    def test_that_is_not_there_leaves_the_traffic_to_counters(self, gpus: StubGpus, sampler: GpuSampler) -> None:
        gpus.set(count=2).gpu(0, gpm=0)
        sampler.read(0.0)
        reading = sampler.read(30.0)
        assert [1] == numbers(reading, "sm_active_percent")
        assert [0, 1] == numbers(reading, "nvlink_sent_bytes_per_s") == numbers(reading, "pcie_sent_bytes_per_s")

    @pytest.mark.parametrize("code", [NOT_SUPPORTED, NO_PERMISSION])
    def test_that_fails_in_part_costs_that_part(self, gpus: StubGpus, sampler: GpuSampler, code: int) -> None:
        gpus.set(count=1).error(0, code, "gpm_2")
        sampler.read(0.0)
        reading = sampler.read(5.0)
        assert ([], [0]) == (numbers(reading, "sm_active_percent"), numbers(reading, "dram_active_percent"))
        gpus.error(0, 0, "gpm_2")
        assert ([0] if code == NO_PERMISSION else []) == numbers(sampler.read(10.0), "sm_active_percent")

    def test_begins_anew_after_a_gpu_was_lost(self, gpus: StubGpus, sampler: GpuSampler) -> None:
        gpus.set(count=1)
        sampler.read(0.0)
        gpus.error(0, LOST)
        sampler.read(5.0)
        gpus.error(0, 0)
        back, next_ = sampler.read(10.0), sampler.read(15.0)
        assert ([0], []) == (numbers(back, "utilization"), numbers(back, "sm_active_percent"))
        assert [0] == numbers(next_, "sm_active_percent")

    def test_does_not_trust_a_counter_of_bytes_that_goes_round_at_once(self) -> None:
        value = pynvml.c_nvmlFieldValue_t(valueType=1)
        value.value.uiVal = 7
        assert None is of_field("pcie_sent_bytes_per_s", value)
        assert 7 == of_field("memory_temperature_c", value)


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

    @pytest.mark.parametrize("function", ["nvmlDeviceGetUUID", "nvmlDeviceGetMaxMigDeviceCount"])
    def test_cost_no_other_gpu_wherever_they_fail(
        self, gpus: StubGpus, sampler: GpuSampler, function: str
    ) -> None:
        """From the start, when not even their UUID is known."""
        gpus.set(count=2).gpu(0, mig=1).error(0, LOST, function)

        first, second = sampler.read(0.0), sampler.read(0.5)

        assert ["GPU 0 is lost"] == titles(first)
        assert [1] == numbers(first, "utilization") == numbers(second, "utilization")
        gpus.error(0, 0, function)
        assert [0, 1] == numbers(sampler.read(9.0), "utilization")

    def test_that_are_all_lost_do_not_make_nvml_lost(self, gpus: StubGpus, sampler: GpuSampler) -> None:
        gpus.set(count=1)
        sampler.read(0.0)
        gpus.error(0, LOST)
        assert [["GPU 0 is lost"], []] == [titles(sampler.read(now)) for now in (1.0, 1.5)]


class TestAnotherProcess:
    """The samplers were killed and come back: what people were told before is not told again, but its end is."""

    def successor(self, tmp_path: Path) -> GpuSampler:
        return GpuSampler(slow_interval_s=30, told=Told(tmp_path / "told"), works_elsewhere=lambda: False)

    @pytest.mark.parametrize("known", [True, False])
    def test_tells_of_a_lost_gpu_only_that_it_is_back(self, gpus: StubGpus, tmp_path: Path, known: bool) -> None:
        """Whether or not the GPU says its UUID while it is lost."""
        gpus.set(count=2).error(1, LOST, "*" if not known else "nvmlDeviceGetUtilizationRates")
        told = [titles(self.successor(tmp_path).read(0.0)) for _ in range(2)]
        assert [["GPU 1 is lost"], []] == told

        gpus.reset(2)
        last = self.successor(tmp_path)

        assert [["GPU 1 is back"], []] == [titles(last.read(now)) for now in (0.0, 5.0)]
        assert [] == titles(self.successor(tmp_path).read(0.0))

    def test_tells_of_another_gpu_with_that_number(self, gpus: StubGpus, tmp_path: Path) -> None:
        told = Told(tmp_path / "told")
        told.lose(1, "GPU-of-before")
        gpus.set(count=2).error(1, LOST, "nvmlDeviceGetUtilizationRates")
        assert ["GPU 1 is lost"] == titles(self.successor(tmp_path).read(0.0))

    def test_tells_that_nvml_answers_again_and_not_again_that_it_does_not(
        self, gpus: StubGpus, tmp_path: Path
    ) -> None:
        gpus.set(count=2)
        first = self.successor(tmp_path)
        first.read(0.0)
        gpus.error("*", NOT_LOADED).set(init=NOT_LOADED)
        assert ["NVML does not answer"] == titles(first.read(1.0))

        assert [] == titles(self.successor(tmp_path).read(0.0))
        gpus.reset(1)
        assert ["NVML answers again", "The number of GPUs changed"] == titles(self.successor(tmp_path).read(0.0))

    @pytest.mark.parametrize("torn", ["", "{", "[]", '{"lost": 3}', '{"lost": {}, "nvml": "x", "count": []}'])
    def test_forgets_what_it_can_not_read(self, gpus: StubGpus, tmp_path: Path, torn: str) -> None:
        (tmp_path / "told").write_text(torn)
        gpus.set(count=1).error(0, LOST)
        assert ["GPU 0 is lost"] == titles(self.successor(tmp_path).read(0.0))


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

    def test_that_was_replaced_is_left_to_a_new_process_once_that_can_use_it(self, gpus: StubGpus) -> None:
        """This one keeps the library that it loaded."""
        works = [False, True]
        sampler = GpuSampler(works_elsewhere=lambda: works.pop(0))
        gpus.set(count=1)
        sampler.read(0.0)
        gpus.error("*", UNKNOWN).set(init=MISMATCH)

        assert [["NVML does not answer"], ["NVML does not answer"]] == [titles(sampler.read(at)) for at in (1, 2)]
        assert [True] == works
        with pytest.raises(StartAnew, match="driver was replaced"):
            sampler.read(9.0)

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

    def test_of_a_gpu_that_came_back_are_heard_again(self, gpus: StubGpus, sampler: GpuSampler) -> None:
        gpus.set(count=1).error(0, LOST)
        sampler.read(0.0)
        gpus.error(0, 0)
        sampler.read(5.0)
        sampler.read(30.0)  # with the slow list
        gpus.xid(0, 79)
        assert ["XID 79 on GPU 0"] == titles(sampler.rest(1.0))

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
        """Nor is another one: it may have but the number of a process here."""
        self.process(tmp_path, 17)
        owners = Owners({17: 2}.copy, proc=tmp_path)
        shares = owners.share({4711: 5, 17: 7})
        owners.share({4711: 5})
        assert ({}, None) == (shares.by_rank, shares.foreign)
        assert 1 == caplog.text.count("pid namespace")

    def test_of_the_machine_that_can_not_be_seen_are_gone_or_anothers(self, tmp_path: Path) -> None:
        self.process(tmp_path, 17)
        namespaces = tmp_path / "self" / "ns"
        namespaces.mkdir(parents=True)
        (namespaces / "pid").symlink_to(MACHINE)
        with subprocess.Popen(["true"]) as gone:
            gone.wait()
        shares = Owners({17: 2}.copy, proc=tmp_path).share({gone.pid: 5, 17: 7, os.getpid(): 11})
        assert ({2: 7}, 1) == (shares.by_rank, shares.foreign)
