"""What a tick of the GPU sampler costs, over a stand-in for NVML that takes as long as a driver may.

    python -m tests.benchmarks.samplers --gpus 8 --delay-us 100

The cost that counts is CPU: a call that waits for the driver keeps nobody else from the core. Each tick is timed
by the thread's own CPU clock and by the wall's; a share of a core follows from the interval. `--real` reads this
machine's own GPUs instead.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from sidestepd.samplers.gpu import GpuSampler
from sidestepd.samplers.host import HostSampler
from tests.support.gpus import COMPILER, NO_COMPILER, StubGpus

GOAL = 0.01
"""Of one core, at the default interval."""
INTERVAL_S, SLOW_INTERVAL_S = 5.0, 30.0


def measure(read: Callable[[float], object], ticks: int, step_s: float) -> tuple[float, float]:
    """Median CPU and wall seconds of a tick."""
    cpu, wall = [], []
    for tick in range(ticks):
        cpu_0, wall_0 = time.thread_time(), time.perf_counter()
        read(tick * step_s)
        cpu.append(time.thread_time() - cpu_0)
        wall.append(time.perf_counter() - wall_0)
    return statistics.median(cpu), statistics.median(wall)


def main() -> int:
    """Print the figures; 1 if the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--delay-us", type=int, default=100, help="how long each call takes")
    parser.add_argument("--ticks", type=int, default=200)
    parser.add_argument("--real", action="store_true", help="this machine's own GPUs")
    options = parser.parse_args()
    if not options.real:
        if COMPILER is None:
            print(NO_COMPILER)
            return 2
        StubGpus(Path(tempfile.mkdtemp())).set(count=options.gpus, delay_us=options.delay_us).load()
    fast, slow = GpuSampler(slow_interval_s=1e12), GpuSampler(slow_interval_s=0.0)
    host = HostSampler(Path.cwd())
    fast.read(0.0)
    figures = {
        "fast": measure(fast.read, options.ticks, 1.0),
        "slow": measure(slow.read, options.ticks, 1.0),
        "host": measure(host.read, options.ticks, 1.0),
    }
    for name, (cpu, wall) in figures.items():
        print(f"{name:<5} {1e3 * cpu:7.2f} ms of CPU, {1e3 * wall:7.2f} ms in all, a tick")
    gpus = figures["fast"][0] / INTERVAL_S + figures["slow"][0] / SLOW_INTERVAL_S
    print(
        f"GPUs  {100 * gpus:.3f} % of a core at {INTERVAL_S:g} s and {SLOW_INTERVAL_S:g} s; the goal: {GOAL:.0%}"
    )
    print(f"host  {100 * figures['host'][0] / INTERVAL_S:.3f} % of a core at {INTERVAL_S:g} s")
    return int(gpus > GOAL)


if __name__ == "__main__":
    sys.exit(main())
