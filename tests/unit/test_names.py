"""The names of samples, and the page that lists them. To write its table anew: python -m tests.unit.test_names"""

from __future__ import annotations

from pathlib import Path

import pytest

import sidestepd.samplers
from sidestepd import pace
from sidestepd.samplers.names import METRICS, Metric, look_up, on_node
from sidestepd.watch import SKEW_STEPS

PAGE = Path(sidestepd.samplers.__file__).with_name("NAMES.md")
BEGIN, END = "<!-- the table -->\n", "<!-- its end -->\n"
WHEN = {"fast": "`interval_s`", "slow": "`slow_interval_s`", "event": "as it happens", "row": "with a row"}

ENDINGS = {
    "%": "percent", "bytes": "bytes", "bytes/s": "_bytes_per_s", "s": "_s", "W": "_w", "J": "_j", "°C": "_c",
    "MHz": "_mhz", "cores": "_cores", "lanes": "_lanes",
}  # fmt: skip
"""How a name ends that is told in a unit."""


def table() -> str:
    """All names as they should stand in the page."""
    lines = [
        "| name | unit | in wandb's System tab | how often | rows | from |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*lines, *map(_line, METRICS)]) + "\n"


def _line(it: Metric) -> str:
    unit = it.unit + (f"; there in {1 / it.scale:,.0f} of them" if it.scale != 1 else "")
    stream = f"`{it.stream_name}`" if it.is_streamed else ""
    rows = "yes" if it.history or it.cadence == "row" else ""
    if it.over_nodes:
        rows += f"; {', '.join(it.over_nodes)}"
    return f"| `{it.name}` | {unit} | {stream} | {WHEN[it.cadence]} | {rows} | {it.source} |"


class TestNames:
    def test_are_all_in_the_page_as_they_are_here(self) -> None:
        assert table() == PAGE.read_text().partition(BEGIN)[2].partition(END)[0]

    def test_are_each_there_once(self) -> None:
        assert len({metric.name for metric in METRICS}) == len(METRICS)
        streamed = [metric.stream_name for metric in METRICS if metric.is_streamed]
        assert len(set(streamed)) == len(streamed)

    @pytest.mark.parametrize(
        "name",
        [
            "system/gpu0/memory_allocated",
            "system/gpu0/memory_reserved",
            "system/gpu0/utilization",
            "system/cpu/percent",
            "system/memory/percent",
            "system/disk/percent",
        ],
    )
    def test_that_users_know_are_on_the_short_list(self, name: str) -> None:
        known = look_up(name)
        assert known is not None
        assert known.metric.history

    @pytest.mark.parametrize("metric", METRICS, ids=lambda it: it.name)
    def test_have_their_units_in_them(self, metric: Metric) -> None:
        """But for three that users know as they are, and what is counted in things."""
        unit = metric.unit.replace(",", " ").replace(";", " ").partition(" ")[0]
        known = {f"system/gpu{{i}}/{it}" for it in ("utilization", "memory_allocated", "memory_reserved")}
        assert metric.name in known or unit not in ENDINGS or metric.name.endswith(ENDINGS[unit])

    @pytest.mark.parametrize(
        ("name", "stream"),
        [
            ("system/gpu3/utilization", "gpu.3.gpu"),
            ("system/gpu12/throttle/sw_thermal", "gpu.12.throttle.sw_thermal"),
            ("system/gpu0/rank7/memory_bytes", "gpu.0.rank7.memory_bytes"),
            ("system/gpu0/mig2/memory_used_bytes", "gpu.0.mig2.memory_used_bytes"),
            ("system/cpu/percent", "cpu"),
            ("system/memory/percent", "memory_percent"),
            ("system/disk//scratch/a/percent", "disk./scratch/a.usagePercent"),
            ("system/disk///used_bytes", "disk./.usageGB"),
            ("system/disk/nvme0n1p2/read_bytes", "disk.nvme0n1p2.in"),
            ("system/infiniband/mlx5_0/sent_bytes_per_s", "infiniband.mlx5_0.sent_bytes_per_s"),
            ("sidestep/lag_s", "sidestep.lag_s"),
        ],
    )
    def test_have_others_in_wandbs_stream(self, name: str, stream: str) -> None:
        known = look_up(name)
        assert known is not None
        assert stream == known.stream_name

    @pytest.mark.parametrize(
        "name", ["", "loss", "system/gpu/utilization", "system/gpux/utilization", "system/gpu0/utilization/x"]
    )
    def test_that_are_none_are_not_found(self, name: str) -> None:
        assert look_up(name) is None

    def test_with_several_nodes_name_the_node(self) -> None:
        assert "system/node2/gpu0/utilization" == on_node("system/gpu0/utilization", 2)

    def test_told_of_many_nodes_have_no_number(self) -> None:
        known = look_up("system/gpu0/utilization")
        assert known is not None
        assert ("system/gpu/utilization.mean", "system/gpu/utilization.min") == known.metric.node_names


class TestWhatRowsSayOfAllRanks:
    @pytest.mark.parametrize(
        "name", [pace.STEP_TIME, pace.SLOWEST, pace.SKEW, pace.SCORE, pace.STRAGGLER, SKEW_STEPS]
    )
    def test_is_in_the_readers_table(self, name: str) -> None:
        page = Path(sidestepd.samplers.__file__).parents[2] / "README.md"
        assert f"`{name}`" in page.read_text()


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2])
    print(PAGE)
