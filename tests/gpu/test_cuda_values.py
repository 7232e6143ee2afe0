"""On a machine with an NVIDIA GPU: `log()` of CUDA tensors waits for nothing, and what comes is what was there."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import sidestep
from sidestep._run import Run
from sidestep.testing import FakeDaemon, environment
from tests.unit.test_staging import counted

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="there is no nvidia-smi"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
"""What waits in the CUDA runtime; `cudaMemcpyAsync` is another name."""
BUSY_CYCLES = 2_000_000_000
"""About a second of a GPU."""


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    with FakeDaemon() as made:
        for name, value in environment(made, {}).items():
            monkeypatch.setenv(name, value)
        yield made


@pytest.fixture
def run(daemon: FakeDaemon) -> Iterator[Run]:
    made = sidestep.init()
    made.log({"first": torch.ones((), device="cuda")})  # the slab is made here: pinning memory is not free
    made.log({"second": torch.ones(100, device="cuda")})
    assert made.flush()
    yield made
    made.finish()


def values() -> dict[str, Any]:
    """One of each: numbers of several types, a list, histograms."""
    return {
        "loss": torch.rand((), device="cuda") + 1,
        "half": torch.rand((), device="cuda").bfloat16(),
        "count": torch.tensor(3, device="cuda"),
        "graph": (torch.ones(3, device="cuda", requires_grad=True) * 2).sum(),
        "list": torch.arange(6, device="cuda").reshape(2, 3).t(),
        "large": torch.randn(100_000, device="cuda"),
        "ints": torch.arange(1000, device="cuda"),
        "gaps": torch.tensor([math.nan, math.inf] + [1.0, 2.0] * 50, device="cuda"),
    }


def last(daemon: FakeDaemon, name: str) -> Any:
    return [record.data[name] for record in daemon.records if name in record.data][-1]


class TestNothingWaits:
    def test_in_the_mode_in_which_waiting_is_an_error(self, run: Run, daemon: FakeDaemon):
        said = values()
        expected = {name: it.tolist() for name, it in said.items() if it.numel() <= 32}
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run.log(said)
        finally:
            torch.cuda.set_sync_debug_mode("default")

        assert run.flush()
        assert 0 == run.stats().values_refused
        assert expected == {name: last(daemon, name) for name in expected}
        for name in ("large", "ints"):
            array = said[name].double().cpu().numpy()
            counts, edges = np.histogram(array, bins=32)
            ours, our_edges = counted(last(daemon, name))
            assert np.allclose(edges, our_edges)
            assert array.size == sum(ours)
            assert array.size // 100 >= sum(abs(one - other) for one, other in zip(counts, ours, strict=True))
        assert 100 == sum(counted(last(daemon, "gaps"))[0])

    def test_in_what_the_profiler_sees(self, run: Run):
        said = values()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            run.log(said)
        calls = [event.key for event in seen.key_averages()]

        assert "cudaMemcpyAsync" in calls  # it was seen at all
        assert [] == [name for name in calls if name in WAITS]

    def test_while_the_gpu_is_busy(self, run: Run, daemon: FakeDaemon):
        number = torch.ones((), device="cuda")
        torch.cuda.synchronize()
        torch.cuda._sleep(BUSY_CYCLES)
        number.add_(1)
        run.log({"late": number})
        run.log({"after": 1})
        still_busy = not torch.cuda.current_stream().query()
        number.add_(10)  # the training goes on

        assert run.flush(30)
        assert still_busy
        assert 2.0 == last(daemon, "late")
        names = [name for record in daemon.records for name in record.data]
        assert names.index("late") < names.index("after")

    def test_watch_in_the_same_mode(self, run: Run, daemon: FakeDaemon):
        model = torch.nn.Linear(64, 64, device="cuda")
        run.watch(model, log="all", log_freq=1)
        inputs = torch.randn(8, 64, device="cuda")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(inputs).square().sum().backward()
            run.log({"n": 1})
        finally:
            torch.cuda.set_sync_debug_mode("default")

        assert run.flush()
        assert model.weight.grad is not None
        counts, edges = np.histogram(model.weight.grad.double().cpu().numpy(), bins=64)
        ours, our_edges = counted(last(daemon, "gradients/weight"))
        assert np.allclose(edges, our_edges, rtol=1e-5)
        assert 40 >= sum(abs(one - other) for one, other in zip(counts, ours, strict=True))


class TestStreamsAndGraphs:
    def test_a_value_of_a_side_stream_is_read_behind_it(self, run: Run, daemon: FakeDaemon):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(BUSY_CYCLES // 10)
            run.log({"side": torch.full((), 5.0, device="cuda")})

        assert run.flush(30)
        assert 5.0 == last(daemon, "side")

    def test_nothing_becomes_part_of_a_graph_that_is_captured(self, run: Run, daemon: FakeDaemon):
        number, graph = torch.zeros((), device="cuda"), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            number.add_(1)
            run.log({"captured": number, "n": 1})
        graph.replay()
        run.log({"outside": number})

        assert run.flush(30)
        assert 1.0 == last(daemon, "outside")
        assert 1 == run.stats().values_refused
        assert "captured" not in [name for record in daemon.records for name in record.data]

    def test_where_only_deterministic_algorithms_may_run(self, run: Run, daemon: FakeDaemon):
        torch.use_deterministic_algorithms(True)
        try:
            run.log({"h": torch.arange(320.0, device="cuda")})
        finally:
            torch.use_deterministic_algorithms(False)

        assert run.flush(30)
        assert [10] * 32 == counted(last(daemon, "h"))[0]

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
    def test_of_two_gpus(self, run: Run, daemon: FakeDaemon):
        run.log({f"gpu{index}": torch.full((), float(index), device=f"cuda:{index}") for index in (0, 1)})

        assert run.flush(30)
        assert [0.0, 1.0] == [last(daemon, "gpu0"), last(daemon, "gpu1")]
