"""What wandb's own monitor tells of a machine is told by ours under the same names, with the same values."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sidestepd.samplers.host import HostSampler
from sidestepd.samplers.names import look_up
from sidestepd.sinks import wandb_log

SCRIPT = """
import threading, wandb
settings = wandb.Settings(console="off", x_stats_sampling_interval=0.5, x_stats_disk_paths=("/", "/tmp"))
run = wandb.init(project="p", mode="offline", dir=".", settings=settings)
threading.Event().wait(2.5)
run.finish()
"""
OF_ONE_PROCESS = re.compile(r"proc\.(memory\.(rssMB|percent|oomKills)|cpu\.\w+)")
"""See decision 40."""
OF_MACHINES = re.compile(r"cpu\.(powerWatts|avg_temp)|gpu\..*|_gpu.*|memory\.swap.*")
"""What only some machines have."""


def by_wandb(folder: Path) -> dict[str, float]:
    subprocess.run([sys.executable, "-c", SCRIPT], cwd=folder, check=True, capture_output=True)
    [path] = wandb_log.segments(folder / "wandb")
    return {
        item.key: json.loads(item.value_json)
        for record in wandb_log.records(path)
        if record.HasField("stats")
        for item in record.stats.item
    }


def by_us(folder: Path) -> dict[str, float]:
    sampler = HostSampler(folder, paths=[Path("/"), Path("/tmp")])
    sampler.read(0.0)
    values = sampler.read(1.0).values
    known = {name: found for name in values if (found := look_up(name)) is not None and found.metric.is_streamed}
    return {found.stream_name: values[name] * found.metric.scale for name, found in known.items()}


@pytest.mark.nightly
def test_the_system_tab_has_what_wandbs_monitor_puts_there(tmp_path: Path) -> None:
    theirs, ours = by_wandb(tmp_path), by_us(tmp_path)
    wanted = {name for name in theirs if not OF_ONE_PROCESS.fullmatch(name) and not OF_MACHINES.fullmatch(name)}

    assert {"cpu", "memory_percent", "disk./.usagePercent", "disk./tmp.usageGB", "network.sent"} <= wanted
    assert set() == wanted - ours.keys() - {"cpu"}  # which takes a tick of the clock
    close = {
        name: (theirs[name], ours[name])
        for name in ("disk./.usagePercent", "disk./.usageGB", "disk./tmp.usagePercent", "memory_percent")
    }
    assert all(a == pytest.approx(b, rel=0.05, abs=3) for a, b in close.values()), close
