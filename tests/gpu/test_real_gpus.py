"""On a machine with NVIDIA GPUs: what the sampler reads is what `nvidia-smi` says, and torch's is torch's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sidestepd.samplers.gpu import GpuSampler
from sidestepd.samplers.names import look_up

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="there is no nvidia-smi"),
]

TORCH = """
import json, sys
import torch
from sidestep.allocator import Allocator
allocator = Allocator(sys.modules, {})
before = allocator.read()
up_before = torch.cuda.is_initialized()
kept = torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
reading, = allocator.read()
print(json.dumps([before, up_before, reading, torch.cuda.memory_allocated(), torch.cuda.memory_reserved()]))
"""


def smi(*fields: str) -> list[list[str]]:
    """What nvidia-smi says, a line for each GPU."""
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, check=True)
    return [[word.strip() for word in line.split(",")] for line in done.stdout.splitlines()]


def torch_with_cuda() -> Any:
    """torch, or the test is skipped."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    return torch


class TestRealGpus:
    def test_are_as_nvidia_smi_says(self) -> None:
        sampler = GpuSampler()

        reading = sampler.read(time.monotonic())
        said = smi("index", "uuid", "memory.total", "memory.used", "temperature.gpu", "power.draw", "power.limit")
        sampler.close()

        assert {line[1]: int(line[0]) for line in said}.items() <= (reading.gpus or {}).items()
        for index, _, total, used, temperature, power, limit in said:
            values = {name: value for name, value in reading.values.items() if f"gpu{index}/" in name}
            prefix = f"system/gpu{index}/"
            assert values[f"{prefix}memory_total_bytes"] == pytest.approx(float(total) * 2**20, rel=0.01)
            assert values[f"{prefix}memory_used_bytes"] == pytest.approx(float(used) * 2**20, abs=2**30)
            assert values[f"{prefix}temperature_c"] == pytest.approx(float(temperature), abs=5)
            if power.replace(".", "").isdigit():  # [N/A] on some boards
                assert values[f"{prefix}power_w"] == pytest.approx(float(power), abs=100)
            if limit.replace(".", "").isdigit():
                assert values[f"{prefix}power_limit_w"] == pytest.approx(float(limit), abs=1)
        assert not [name for name in reading.values if look_up(name) is None]

    def test_at_work_use_energy_and_gpm_sees_them_work(self) -> None:
        """Where the GPU has GPM; a GPU without it has neither value, and no failure."""
        torch = torch_with_cuda()
        sampler = GpuSampler(slow_interval_s=0.0)
        first = sampler.read(time.monotonic())
        matrix = torch.ones(4096, 4096, device="cuda", dtype=torch.bfloat16)
        until = time.monotonic() + 3.0  # what is tested is the time at work itself
        while time.monotonic() < until:
            matrix = (matrix @ matrix).clamp(max=1)
            torch.cuda.synchronize()
        second = sampler.read(time.monotonic())
        sampler.close()

        uuid = "GPU-" + str(torch.cuda.get_device_properties(0).uuid).removeprefix("GPU-")
        prefix = f"system/gpu{(first.gpus or {})[uuid]}/"
        assert second.values[f"{prefix}energy_j"] > first.values[f"{prefix}energy_j"]
        assert second.values[f"{prefix}utilization"] > 0
        assert second.values.get(f"{prefix}sm_active_percent", 50) > 5
        assert second.values.get(f"{prefix}tensor_active_percent", 50) > 1
        assert second.values.get(f"{prefix}process_count", 1) >= 1
        assert not [name for name in second.values if look_up(name) is None]

    def test_cost_little_to_read(self, record_property: Any) -> None:
        """The figures go into the report; what they should be is judged in tests/benchmarks/samplers.py."""
        for name, slow_interval_s in (("fast", 1e9), ("slow", 0.0)):
            sampler = GpuSampler(slow_interval_s=slow_interval_s)
            sampler.read(0.0)
            cpu, wall = time.thread_time(), time.perf_counter()
            for tick in range(20):
                sampler.read(float(tick))
            record_property(f"{name}_cpu_ms_per_tick", 50 * (time.thread_time() - cpu))
            record_property(f"{name}_wall_ms_per_tick", 50 * (time.perf_counter() - wall))
            sampler.close()

    def test_hold_what_torch_says_and_torch_is_not_woken(self) -> None:
        torch_with_cuda()

        done = subprocess.run(
            [sys.executable, "-c", TORCH],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(str(Path(it).resolve()) for it in sys.path)},
        )
        before, up_before, reading, allocated, reserved = json.loads(done.stdout)

        assert ([], False) == (before, up_before)
        values = reading["values"]
        assert (allocated, reserved) == (values["memory_allocated"], values["memory_reserved"])
        uuids = {line[0] for line in smi("uuid")}
        assert reading["device"] in uuids
