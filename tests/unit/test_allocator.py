"""torch's allocator, as the sender's thread reads it: with a module that stands in for torch."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest

import sidestep
from sidestep.allocator import FIGURES, Allocator
from sidestep.testing import FakeDaemon
from sidestep.wire import Kind


class FakeCuda:
    """Two devices, of which the allocator has used the second. What would wait or start something raises."""

    def __init__(self) -> None:
        self.up = True
        self.threads: set[str] = set()
        self.uuid: Any = "1f2e-33"

    def is_initialized(self) -> bool:
        return self.up

    def device_count(self) -> int:
        return 2

    def memory_stats(self, device: int) -> dict[str, int]:
        assert self.up, "this would initialise CUDA"
        self.threads.add(threading.current_thread().name)
        return {name: number * device for number, name in enumerate(FIGURES.values(), 1)}

    def get_device_properties(self, device: int) -> Any:
        assert self.up, "this would initialise CUDA"
        return SimpleNamespace(uuid=self.uuid) if self.uuid else SimpleNamespace()

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"torch.cuda.{name} is not to be touched")


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


def reading_of(cuda: Any, **environ: str) -> list[dict[str, Any]]:
    return Allocator({"torch": SimpleNamespace(cuda=cuda)}, environ).read()


class TestAllocator:
    def test_tells_of_each_device_in_use(self, cuda: FakeCuda) -> None:
        (reading,) = reading_of(cuda, CUDA_VISIBLE_DEVICES="4,6")

        assert (1, "GPU-1f2e-33", "4,6") == (reading["ordinal"], reading["device"], reading["visible"])
        assert {name: number for number, name in enumerate(FIGURES, 1)} == reading["values"]

    def test_tells_no_uuid_where_torch_knows_none(self, cuda: FakeCuda) -> None:
        cuda.uuid = None
        assert reading_of(cuda)[0]["device"] is None

    def test_leaves_cuda_alone_that_is_not_up(self, cuda: FakeCuda) -> None:
        cuda.up = False
        assert [] == reading_of(cuda)

    @pytest.mark.parametrize(
        "modules", [{}, {"torch": SimpleNamespace()}, {"torch": SimpleNamespace(cuda=SimpleNamespace())}]
    )
    def test_has_nothing_to_tell_without_torch(self, modules: dict[str, Any]) -> None:
        assert [] == Allocator(modules, {}).read()

    def test_that_fails_has_nothing_to_tell(self, cuda: FakeCuda) -> None:
        cuda.memory_stats = lambda _: (_ for _ in ()).throw(RuntimeError("CUDA error"))  # type: ignore[method-assign]
        assert [] == reading_of(cuda)


class TestWorker:
    """A real sender, against a daemon in memory."""

    @pytest.fixture
    def daemon(self, monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> Any:
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
        with FakeDaemon() as daemon:
            monkeypatch.setenv("SIDESTEP_ADDRESS", daemon.address)
            yield daemon

    def samples(self, daemon: FakeDaemon) -> list[Any]:
        return [record for record in daemon.records if record.kind is Kind.SAMPLES]

    def test_samples_when_the_daemon_wants_it(self, daemon: FakeDaemon, cuda: FakeCuda) -> None:
        daemon.sample_interval_s = 0.02
        with sidestep.init(reinit=True):
            daemon.wait_until(lambda: len(self.samples(daemon)) >= 3)

        first = self.samples(daemon)[0]
        assert "GPU-1f2e-33" == first.data["device"]
        assert {"sidestep-sender"} == cuda.threads

    def test_does_not_when_the_daemon_does_not(self, daemon: FakeDaemon, cuda: FakeCuda) -> None:
        with sidestep.init(reinit=True) as run:
            run.log({"loss": 1.0})
            assert run.flush()
        assert not self.samples(daemon)
        assert not cuda.threads

    def test_counts_its_samples_as_it_counts_all(self, daemon: FakeDaemon) -> None:
        daemon.sample_interval_s = 0.02
        with sidestep.init(reinit=True) as run:
            run.log({"loss": 1.0})
            daemon.wait_until(lambda: len(self.samples(daemon)) >= 2)
        stats = run.stats()
        assert stats.offered == stats.acknowledged == len(daemon.records)
