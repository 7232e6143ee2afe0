"""The host sampler, on machines made of files, and once on this one; and what sidestep says of itself."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sidestepd.entries import Entry, EntryKind
from sidestepd.rowlog import RowLog
from sidestepd.samplers.host import HostSampler
from sidestepd.samplers.names import HOST_METRICS, OWN_METRICS, look_up
from sidestepd.samplers.own import OwnSampler
from sidestepd.spool import Spool
from tests.support.waiting import eventually

GIB = 1 << 30


@pytest.fixture(autouse=True)
def _proc() -> Iterator[None]:
    before = psutil.PROCFS_PATH
    yield
    psutil.PROCFS_PATH = before


class Machine:
    """Trees like /proc and /sys."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.sys, self.home = folder / "proc", folder / "sys", folder / "home"
        self.home.mkdir()
        (self.sys / "class" / "infiniband").mkdir(parents=True)
        self.cpu((100, 0, 0, 900), (0, 0, 0, 500))
        self.write("proc/meminfo", "MemTotal: 16777216 kB\nMemFree: 8388608 kB\nMemAvailable: 12582912 kB\n"
                   "Buffers: 0 kB\nCached: 0 kB\nShmem: 0 kB\nActive: 0 kB\nInactive: 0 kB\nSlab: 0 kB\n"
                   "SwapTotal: 1048576 kB\nSwapFree: 524288 kB\n")  # fmt: skip
        self.write("proc/vmstat", "pswpin 0\npswpout 0\n")
        self.write("proc/loadavg", "1.50 1.00 0.50 1/100 4242\n")
        self.write("proc/self/cgroup", "")
        self.write("proc/sys/fs/file-nr", "3000\t1000\t8000\n")
        self.disk(0, 0)
        self.network(0, 0)

    def write(self, path: str, text: str) -> None:
        target = self.proc.parent / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def cpu(self, first: tuple[int, int, int, int], second: tuple[int, int, int, int], iowait: int = 0) -> None:
        """Ticks of each core: user, nice, system, idle."""
        cores = [[*first, 0, 0, 0, 0, 0, 0], [*second, iowait, 0, 0, 0, 0, 0]]
        both = [a + b for a, b in zip(*cores, strict=True)]
        lines = [("cpu ", both), ("cpu0", cores[0]), ("cpu1", cores[1])]
        self.write("proc/stat", "".join(f"{name} {' '.join(map(str, ticks))}\n" for name, ticks in lines))

    def disk(self, read: int, written: int) -> None:
        """Sectors of two disks that no path here lies on, of a partition and a volume of theirs, and of a loop."""
        zeros = "0 0 0 0 0 0 0"
        moved = f"1 0 {read // 2} 0 1 0 {written // 2} 0 {zeros}"
        names = {
            (259, 0): "nvme0n1",
            (259, 2): "nvme1n1",
            (259, 16): "nvme1n1p1",
            (253, 0): "dm-0",
            (7, 0): "loop0",
        }
        lines = [f" {major} {minor} {name} {moved}\n" for (major, minor), name in names.items()]
        self.write("proc/diskstats", "".join(lines))
        for name in ("nvme0n1", "nvme1n1"):
            self.write(f"sys/block/{name}/device", "")

    def network(self, received: int, sent: int) -> None:
        rest = "0 0 0 0 0 0 0"
        self.write(
            "proc/net/dev",
            f"Inter\n face\n    lo: 999 {rest} 999 {rest}\n  eth0: {received} {rest} {sent} {rest}\n",
        )

    def sampler(self, **more: object) -> HostSampler:
        return HostSampler(self.home, proc=self.proc, sys=self.sys, shm=self.home, **more)  # type: ignore[arg-type]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def read(sampler: HostSampler, now: float = 1.0) -> dict[str, float]:
    return {name.removeprefix("system/"): value for name, value in sampler.read(now).values.items()}


class TestCpu:
    def test_is_busy_by_what_passed_since_the_last_time(self, machine: Machine) -> None:
        sampler = machine.sampler()
        machine.cpu((150, 0, 0, 950), (0, 0, 0, 580), iowait=20)

        values = read(sampler)

        assert (25.0, 50.0, 10.0) == (
            values["cpu/percent"], values["cpu/max_core_percent"], values["cpu/iowait_percent"]
        )  # fmt: skip
        assert (1.5, 100) == (values["cpu/load1"], values["cpu/threads"])


class TestCpuLimits:
    """The machine has two cores, and half of the time of each has passed busy."""

    def measured(self, machine: Machine, before: list[str], after: list[str]) -> dict[str, float]:
        for line in before:
            machine.write(*line.split("=", 1))
        sampler = machine.sampler()
        machine.cpu((100, 0, 0, 900), (0, 0, 0, 500))
        read(sampler, 1.0)
        for line in after:
            machine.write(*line.split("=", 1))
        machine.cpu((150, 0, 0, 950), (50, 0, 0, 550))
        return read(sampler, 3.0)

    def test_of_cgroup_v2_are_the_nearest_quota(self, machine: Machine) -> None:
        group = "sys/fs/cgroup/job"
        values = self.measured(
            machine,
            ["proc/self/cgroup=0::/job/step", f"{group}/cpu.max=50000 100000", f"{group}/step/cpu.max=max 100000",
             f"{group}/cpu.stat=usage_usec 1000000\nnr_periods 10\nnr_throttled 2\n",
             f"{group}/step/cpu.stat=usage_usec 0\n"],
            [f"{group}/cpu.stat=usage_usec 1800000\nnr_periods 30\nnr_throttled 7\n"],
        )  # fmt: skip
        assert (0.5, 80, 25) == tuple(
            round(values[f"cpu/cgroup_{name}"], 6) for name in ("limit_cores", "percent", "throttled_percent")
        )
        assert 80 == round(values["cpu/percent"], 6)

    def test_of_cgroup_v1_are_too(self, machine: Machine) -> None:
        group, accounts = "sys/fs/cgroup/cpu,cpuacct/job", "sys/fs/cgroup/cpuacct/job"
        values = self.measured(
            machine,
            ["proc/self/cgroup=4:cpu,cpuacct:/job\n3:cpuset:/job\n", f"{group}/cpu.cfs_quota_us=150000\n",
             f"{group}/cpu.cfs_period_us=100000\n", f"{accounts}/cpuacct.usage=0\n",
             f"{group}/cpu.stat=nr_periods 0\nnr_throttled 0\nthrottled_time 0\n"],
            [f"{accounts}/cpuacct.usage=600000000\n"],
        )  # fmt: skip
        assert (1.5, 20) == (values["cpu/cgroup_limit_cores"], round(values["cpu/cgroup_percent"], 6))
        assert 50 == values["cpu/percent"]
        assert "cpu/cgroup_throttled_percent" not in values

    @pytest.mark.parametrize(("cores", "limit"), [("1", 1), ("0-1", None), ("", None)])
    def test_may_be_a_set_of_cores(self, machine: Machine, cores: str, limit: float | None) -> None:
        values = self.measured(
            machine,
            ["proc/self/cgroup=0::/", f"sys/fs/cgroup/cpuset.cpus.effective={cores}\n",
             "sys/fs/cgroup/cpu.stat=usage_usec 0\n"],
            [],
        )  # fmt: skip
        assert limit == values.get("cpu/cgroup_limit_cores")


class TestMemory:
    def test_is_the_machines_without_a_limit(self, machine: Machine) -> None:
        values = read(machine.sampler())
        assert (25.0, 50.0) == (values["memory/percent"], values["swap/percent"])
        assert 12 * GIB == values["memory/available_bytes"]
        assert "memory/cgroup_limit_bytes" not in values

    def group(self, machine: Machine, path: str, current: str, limit: str, used: int, most: str) -> None:
        machine.write(f"sys/fs/cgroup/{path}/{current}", f"{used}\n")
        machine.write(f"sys/fs/cgroup/{path}/{limit}", f"{most}\n")
        machine.write(f"sys/fs/cgroup/{path}/memory.stat", f"anon 1\ninactive_file {GIB}\n")

    def test_is_the_nearest_limits_of_cgroup_v2(self, machine: Machine) -> None:
        machine.write("proc/self/cgroup", "0::/job/step\n")
        self.group(machine, "job/step", "memory.current", "memory.max", 4 * GIB, "max")
        self.group(machine, "job", "memory.current", "memory.max", 4 * GIB, str(4 * GIB))

        values = read(machine.sampler())

        assert (3 * GIB, 4 * GIB) == (values["memory/cgroup_used_bytes"], values["memory/cgroup_limit_bytes"])
        assert 75.0 == values["memory/percent"]

    def test_is_the_limits_of_cgroup_v1(self, machine: Machine) -> None:
        machine.write("proc/self/cgroup", "5:cpu:/\n4:memory:/job\n0::/\n")
        self.group(machine, "memory/job", "memory.usage_in_bytes", "memory.limit_in_bytes", 3 * GIB, str(8 * GIB))
        values = read(machine.sampler())
        assert (2 * GIB, 8 * GIB) == (values["memory/cgroup_used_bytes"], values["memory/cgroup_limit_bytes"])
        assert 25.0 == values["memory/percent"]

    def test_in_a_container_is_what_its_root_says(self, machine: Machine) -> None:
        machine.write("proc/self/cgroup", "4:memory:/docker/1f2e\n")
        self.group(machine, "memory", "memory.usage_in_bytes", "memory.limit_in_bytes", 3 * GIB, str(4 * GIB))
        assert 4 * GIB == read(machine.sampler())["memory/cgroup_limit_bytes"]

    def test_has_no_limit_where_v1_says_a_huge_one(self, machine: Machine) -> None:
        machine.write("proc/self/cgroup", "4:memory:/job\n")
        unlimited = str(2**63 - 4096)
        self.group(machine, "memory/job", "memory.usage_in_bytes", "memory.limit_in_bytes", 3 * GIB, unlimited)
        assert "memory/cgroup_limit_bytes" not in read(machine.sampler())


class TestRates:
    def test_of_disks_and_networks_are_bytes_in_a_second(self, machine: Machine) -> None:
        sampler = machine.sampler()
        read(sampler, 1.0)
        machine.disk(read=200, written=400)
        machine.network(received=3000, sent=5000)

        values = read(sampler, 3.0)

        for disk in ("nvme0n1", "nvme1n1"):
            told = {name: values[f"disk/{disk}/{name}"] for name in ("read_bytes_per_s", "written_bytes_per_s")}
            assert {"read_bytes_per_s": 100 * 256, "written_bytes_per_s": 200 * 256} == told
            assert (200 * 256, 400 * 256) == tuple(values[f"disk/{disk}/{it}_bytes"] for it in ("read", "written"))
        assert not [name for name in values if "dm-0" in name or "loop" in name]
        assert (1500, 2500) == (values["network/received_bytes_per_s"], values["network/sent_bytes_per_s"])
        assert (3000, 5000) == (values["network/received_bytes"], values["network/sent_bytes"])

    def test_of_networks_count_what_goes_over_a_bridge_once(self, machine: Machine) -> None:
        rest = "0 0 0 0 0 0 0"
        lines = [
            f" {name}: {received} {rest} 7 {rest}" for name, received in (("br0", 5), ("eth0", 9), ("eth1", 1))
        ]
        machine.write("proc/net/dev", "\n".join(["Inter", " face", *lines, ""]))
        for name in ("eth0", "eth1"):
            machine.write(f"sys/class/net/{name}/device", "")
        machine.write("sys/class/net/br0/bridge", "")
        sampler = machine.sampler()
        read(sampler, 1.0)
        machine.write("proc/net/dev", "\n".join(["Inter", " face", *lines, ""]).replace(" 9 ", " 109 "))
        assert (100, 0) == tuple(read(sampler, 3.0)[f"network/{name}_bytes"] for name in ("received", "sent"))

    def test_tell_nothing_when_a_counter_went_back(self, machine: Machine) -> None:
        machine.network(received=3000, sent=5000)
        sampler = machine.sampler()
        read(sampler, 1.0)
        machine.network(received=10, sent=20)
        values = read(sampler, 3.0)
        assert "network/sent_bytes_per_s" not in values
        assert 0 == values["network/sent_bytes"]
        machine.network(received=10, sent=25)
        assert 5 == read(sampler, 4.0)["network/sent_bytes"]

    def test_of_tcp_are_the_segments_that_were_sent_again(self, machine: Machine) -> None:
        names = "Ip: A\nIp: 1\nTcp: RtoMin RetransSegs InErrs\nTcp: 200 {} 3\nUdp: A\nUdp: 2\n"
        machine.write("proc/net/snmp", names.format(40))
        sampler = machine.sampler()
        read(sampler, 1.0)
        machine.write("proc/net/snmp", names.format(47))
        assert 7 == read(sampler, 2.0)["network/tcp_retransmits"]

    def test_of_infiniband_count_words_over_all_ports(self, machine: Machine) -> None:
        def counters(words: int) -> None:
            for port in (1, 2):
                for name in ("port_xmit_data", "port_rcv_data"):
                    machine.write(f"sys/class/infiniband/mlx5_0/ports/{port}/counters/{name}", f"{words}\n")

        counters(0)
        sampler = machine.sampler()
        read(sampler, 1.0)
        counters(100)
        assert 400.0 == read(sampler, 3.0)["infiniband/mlx5_0/sent_bytes_per_s"]


class TestTheRest:
    def test_disks_are_the_runs_and_those_that_were_asked_for(self, machine: Machine) -> None:
        values = read(machine.sampler(paths=[machine.home, Path("/nowhere")]))
        mount = next(it for it in (machine.home, *machine.home.parents) if it.is_mount())
        usage = psutil.disk_usage(str(machine.home))
        for place in (mount, machine.home):
            told = [values[f"disk/{place}/{it}"] for it in ("percent", "used_bytes", "free_bytes")]
            assert [usage.percent, usage.used, usage.free] == pytest.approx(told, rel=0.01)
        assert values["disk/percent"] == values[f"disk/{mount}/percent"]
        assert not [name for name in values if "nowhere" in name]

    def test_pressure_is_there_where_the_kernel_tells_it(self, machine: Machine) -> None:
        assert "pressure/io_percent" not in read(machine.sampler())
        line = "avg10=1.50 avg60=0 avg300=0 total=1"
        machine.write("proc/pressure/io", f"some {line}\nfull {line.replace('1.50', '0.25')}\n")
        machine.write("proc/pressure/cpu", f"some {line}\nfull {line}\n")
        values = read(machine.sampler())
        assert (1.5, 0.25) == (values["pressure/io_percent"], values["pressure/io_full_percent"])
        assert [1.5] == [value for name, value in values.items() if name.startswith("pressure/cpu")]

    def test_descriptors_are_those_in_use(self, machine: Machine) -> None:
        values = read(machine.sampler())
        assert (2000, 25.0) == (values["files/open"], values["files/percent"])

    def test_what_is_missing_costs_only_itself(self, machine: Machine) -> None:
        for name in ("proc/meminfo", "proc/net/dev", "proc/diskstats", "proc/loadavg"):
            (machine.proc.parent / name).unlink()
        sampler = machine.sampler()
        read(sampler, 1.0)
        values = read(sampler, 2.0)
        assert "files/open" in values
        assert "disk/percent" in values
        assert "memory/percent" not in values
        assert not [name for name in values if name.endswith("read_bytes_per_s")]

    def test_a_kernel_without_cgroups_or_loadavg_has_its_cpu_and_memory(self, machine: Machine) -> None:
        for name in ("proc/self/cgroup", "proc/loadavg"):
            (machine.proc.parent / name).unlink()
        sampler = machine.sampler()
        machine.cpu((150, 0, 0, 950), (0, 0, 0, 600))
        values = read(sampler)
        assert {"cpu/percent", "memory/percent"} <= values.keys()
        assert "cpu/load1" not in values

    def test_an_infiniband_port_without_counters_costs_no_other(self, machine: Machine) -> None:
        sampler = machine.sampler()
        for counted in (0, 100):
            for device, text in (("mlx5_0", "no counters"), ("mlx5_1", str(counted))):
                machine.write(f"sys/class/infiniband/{device}/ports/1/counters/port_xmit_data", text)
            values = read(sampler, 1.0 + counted)
        sent = [name for name in values if name.startswith("infiniband/")]
        assert ["infiniband/mlx5_1/sent_bytes_per_s"] == sent


class TestThisMachine:
    def test_is_as_psutil_says(self, tmp_path: Path) -> None:
        sampler = HostSampler(tmp_path)
        values = eventually(
            lambda: "cpu/percent" in (it := read(sampler)) and it, 30, "no tick of the clock passed"
        )

        assert not [name for name in values if look_up(f"system/{name}") is None]
        assert values["memory/percent"] >= psutil.virtual_memory().percent - 5
        assert abs(values["memory/available_bytes"] - psutil.virtual_memory().available) < GIB
        assert values["swap/percent"] == pytest.approx(psutil.swap_memory().percent, abs=2)
        assert values["disk/percent"] == pytest.approx(psutil.disk_usage(str(tmp_path)).percent, abs=1)
        assert 0 <= values["cpu/percent"] <= values["cpu/max_core_percent"] <= 100
        assert values["cpu/load1"] == pytest.approx(os.getloadavg()[0], abs=2)

    def test_lacks_at_most_what_not_every_machine_has(self, machine: Machine) -> None:
        """Of a machine that has all, every name of the table is read."""
        for name in ("cpu", "memory", "io"):
            machine.write(f"proc/pressure/{name}", "some avg10=1 x=0\nfull avg10=1 x=0\n")
        for name in ("port_xmit_data", "port_rcv_data"):
            machine.write(f"sys/class/infiniband/mlx5_0/ports/1/counters/{name}", "1\n")
        machine.write("proc/net/snmp", "Tcp: RetransSegs\nTcp: 5\n")
        machine.write("proc/self/cgroup", "0::/\n")
        for name, text in (("current", "2"), ("max", "4"), ("stat", "inactive_file 1\n")):
            machine.write(f"sys/fs/cgroup/memory.{name}", text)
        machine.write("sys/fs/cgroup/cpu.max", "100000 100000\n")
        machine.write("sys/fs/cgroup/cpu.stat", "usage_usec 0\nnr_periods 0\nnr_throttled 0\n")
        sampler = machine.sampler(paths=[machine.home])
        read(sampler, 1.0)
        machine.cpu((150, 0, 0, 950), (0, 0, 0, 600))
        machine.write("sys/fs/cgroup/cpu.stat", "usage_usec 5\nnr_periods 1\nnr_throttled 1\n")

        kinds = {known.metric.name for name in sampler.read(2.0).values if (known := look_up(name))}

        assert {metric.name for metric in HOST_METRICS} == kinds


class TestOwn:
    def test_tells_of_the_spool_the_lag_and_the_processes(self, tmp_path: Path) -> None:
        spool, rowlog = Spool(tmp_path / "spool.db"), RowLog(tmp_path / "delivery.db")
        spool.commit([Entry.of_event(EntryKind.BOOT, received=at, boot="b") for at in (100.0, 110.0, 120.0)], [])
        rowlog.settle(ledger={"read_through": 1, "waiting": 4, "late_rows": 2, "dropped": {"size": 1, "shape": 2}})
        sampler = OwnSampler(tmp_path, pid=os.getpid(), clock=lambda: 125.0)

        sampler.read(0.0)
        values = sampler.read(1.0).values

        assert {metric.name for metric in OWN_METRICS} == set(values)
        assert 15.0 == values["sidestep/lag_s"]
        assert (4, 2, 3) == tuple(values[f"sidestep/{it}"] for it in ("waiting_rows", "late_rows", "dropped"))
        files = sum(path.stat().st_size for path in tmp_path.glob("spool.db*"))
        assert files == values["sidestep/spool_bytes"]
        assert values["sidestep/memory_bytes"] >= psutil.Process().memory_info().rss * 0.5
        spool.close()
        rowlog.close()

    def test_finds_a_spool_that_lies_elsewhere(self, tmp_path: Path) -> None:
        run_dir, place = tmp_path / "run", tmp_path / "place"
        run_dir.mkdir()
        place.mkdir()
        (run_dir / "spool.json").write_text(json.dumps({"dir": str(place)}))
        spool, rowlog = Spool(place / "spool.db"), RowLog(place / "delivery.db")
        spool.commit([Entry.of_event(EntryKind.BOOT, received=100.0, boot="b")], [])
        rowlog.settle(ledger={"read_through": 0, "waiting": 0, "late_rows": 0, "dropped": {}})

        values = OwnSampler(run_dir, pid=os.getpid(), clock=lambda: 103.0).read(0.0).values

        assert 3.0 == values["sidestep/lag_s"]
        assert values["sidestep/spool_bytes"] > 0
        spool.close()
        rowlog.close()

    def test_is_silent_of_a_delivery_that_has_not_begun(self, tmp_path: Path) -> None:
        values = OwnSampler(tmp_path, pid=os.getpid()).read(0.0).values
        assert 0 == values["sidestep/spool_bytes"]
        assert "sidestep/lag_s" not in values
