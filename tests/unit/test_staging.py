"""Values that are still on a device when they are logged: they come later, as they were, in their place."""

from __future__ import annotations

import gc
import math
import os
import sys
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from sidestep._run import Run
from sidestep.convert.histograms import packed, spread
from sidestep.notices import Notices
from sidestep.outbox import DropReason
from sidestep.ranks import Identity
from sidestep.session import Session
from sidestep.settings import WorkerSettings
from sidestep.staging import SLOT_BYTES, Staging
from sidestep.wire import MAX_RECORD_BYTES, Record, decode_records, plain
from tests.support.device import FakeDevice

ME = Identity(rank=0, world=1, local_rank=0, node="here", pid=os.getpid(), launch="test", attempt=0)


class Activations:
    """What a graph holds on to."""


class Remembering(torch.autograd.Function):
    """Twice its input; its node in the graph remembers something."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, kept: Any) -> torch.Tensor:
        ctx.kept = kept
        return values * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient * 2, None


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def run(device: FakeDevice) -> Iterator[Run]:
    session = Session(
        settings=WorkerSettings(when_full="drop", autostart=False),
        identity=ME,
        keywords={},
        notices=Notices(),
        devices=device.finder,
    )
    made = Run(session, {})
    yield made
    made.finish(timeout=0)


def sent(run: Run) -> list[Mapping[str, Any]]:
    """The data of what can leave now."""
    outbox, found = run._session.outbox, []
    outbox.credit = 1 << 30
    while (frame := outbox.next_frame()) is not None:
        found += decode_records(frame.body, frame.count)
        outbox.ack(frame.end)
    return [record.data for record in found if isinstance(record, Record)]


def counted(value: Mapping[str, Any]) -> tuple[list[int], list[float]]:
    """Counts and edges of a histogram in a record."""
    assert "histogram" == value["_sidestep"]
    counts, edges = plain.load(value["facts"]["counted"])
    return counts, edges


def slab_of(run: Run, device: FakeDevice) -> Any:
    return run._session.staging.slab(device)


def balanced(run: Run) -> bool:
    stats = run.stats()
    return stats.offered == stats.acknowledged + stats.pending + sum(stats.dropped.values())


class TestNumbers:
    def test_leave_when_the_flag_is_up_and_not_before(self, run: Run, device: FakeDevice):
        run.log({"loss": device.number(0.5), "epoch": 3})

        before = sent(run)
        device.run(most=1)  # the value is there, the flag is not
        between = sent(run)
        device.run()

        assert ([], [], [{"loss": 0.5, "epoch": 3}]) == (before, between, sent(run))
        assert balanced(run)

    def test_of_one_call_are_one_copy_and_one_flag(self, run: Run, device: FakeDevice):
        run.log({f"n{index}": device.number(float(index)) for index in range(10)})

        assert (1, 2) == (device.copies, len(device.stream))
        device.run()
        assert [{f"n{index}": float(index) for index in range(10)}] == sent(run)

    @pytest.mark.parametrize(
        ("value", "dtype"),
        [
            (0.1, torch.float32),
            (0.1, torch.float64),
            (0.1, torch.float16),
            (-2.7, torch.bfloat16),
            (math.inf, torch.bfloat16),
            (1.5, torch.float8_e4m3fn),
            (0.25, torch.float8_e5m2),
            (-(2**63), torch.int64),
            (-5, torch.int32),
            (-5, torch.int16),
            (-5, torch.int8),
            (255, torch.uint8),
            (True, torch.bool),
        ],
    )
    def test_of_every_type_are_what_item_gives(self, run: Run, device: FakeDevice, value: Any, dtype: torch.dtype):
        number = device.put(torch.tensor(value).to(dtype))
        in_a_row = device.put(torch.tensor([value]).to(dtype))
        expected = number.item()

        run.log({"x": number, "row": in_a_row})
        device.run()

        (found,) = sent(run)
        assert {"x": expected, "row": expected} == found
        assert type(expected) is type(found["x"])

    def test_of_several_types_are_a_copy_for_each_type(self, run: Run, device: FakeDevice):
        run.log({"a": device.number(1.0), "n": device.number(2, torch.int64), "b": device.number(3.0)})
        device.run()

        assert (2, [{"a": 1.0, "n": 2, "b": 3.0}]) == (device.copies, sent(run))

    def test_nested_in_lists_and_dicts_come_in_their_place(self, run: Run, device: FakeDevice):
        run.log({"deep": {"a": [1, device.number(2.0)]}, "plain": [1]})
        device.run()

        assert [{"deep": {"a": [1, 2.0]}, "plain": [1]}] == sent(run)

    def test_more_than_a_slot_holds_take_several(self, run: Run, device: FakeDevice):
        free = slab_of(run, device).free
        run.log({f"n{index}": device.number(index, torch.int64) for index in range(300)})

        assert slab_of(run, device).free == free - 3
        device.run()
        assert [{f"n{index}": index for index in range(300)}] == sent(run)
        assert free == slab_of(run, device).free

    def test_that_are_updated_in_place_after_the_call_are_as_they_were(self, run: Run, device: FakeDevice):
        loss, row = device.number(1.0), device.put(torch.tensor([1.0, 2.0]))

        run.log({"loss": loss, "row": row})
        device.enqueue(lambda: (loss.add_(10.0), row.zero_()))  # the training goes on, on the same stream
        run.log({"loss": loss, "row": row})
        device.run()

        first, second = sent(run)
        assert {"loss": 1.0, "row": [1.0, 2.0]} == first
        assert [0.0, 0.0] == second["row"]

    def test_do_not_keep_the_graph_that_they_come_from(self, run: Run, device: FakeDevice):
        weights, graph = torch.ones(4, requires_grad=True), Activations()
        loss = device.put(Remembering.apply(weights, graph).sum())
        row = device.put(Remembering.apply(weights, graph))
        graph = weakref.ref(graph)

        run.log({"loss": loss, "row": row})
        device._on_it.clear()
        del loss, row
        gc.collect()

        assert graph() is None
        device.run()
        assert [{"loss": 8.0, "row": [2.0] * 4}] == sent(run)


class TestArrays:
    def test_of_a_few_elements_are_lists_of_their_shape(self, run: Run, device: FakeDevice):
        tall = device.put(torch.arange(6).reshape(3, 2))
        run.log({"tall": tall, "turned": device.put(tall.t()), "none": device.put(torch.zeros(0))})
        device.run()

        assert [{"tall": [[0, 1], [2, 3], [4, 5]], "turned": [[0, 2, 4], [1, 3, 5]], "none": []}] == sent(run)

    @pytest.mark.parametrize("deterministic", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
    def test_of_more_are_histograms_as_numpys(
        self, run: Run, device: FakeDevice, dtype: torch.dtype, deterministic: bool
    ):
        values = (torch.randn(5000, generator=torch.Generator().manual_seed(7)) * 50).to(dtype)
        torch.use_deterministic_algorithms(deterministic)
        try:
            run.log({"h": device.put(values.reshape(50, 100))})
        finally:
            torch.use_deterministic_algorithms(False)
        device.run()

        counts, edges = counted(sent(run)[0]["h"])
        expected, expected_edges = np.histogram(values.double().numpy(), bins=32)
        assert (32, 5000) == (len(counts), sum(counts))
        assert np.allclose(expected_edges, edges)
        assert 5 > sum(abs(one - other) for one, other in zip(expected, counts, strict=True))  # at the edges

    def test_with_nan_and_infinities_are_histograms_of_the_rest(self, run: Run, device: FakeDevice):
        values = torch.cat([torch.arange(64.0), torch.tensor([math.nan, math.inf, -math.inf])])
        run.log({"h": device.put(values), "none": device.put(torch.full((40,), math.nan)), "n": 1})
        device.run()

        (found,) = sent(run)
        assert {"h", "n"} == set(found)
        assert ([2] * 32, 63.0) == (counted(found["h"])[0], counted(found["h"])[1][-1])
        assert 1 == run.stats().values_refused

    def test_of_one_value_are_around_it_as_numpys(self, run: Run, device: FakeDevice):
        run.log({"h": device.put(torch.full((50,), 3.0))})
        device.run()

        expected, edges = np.histogram(np.full(50, 3.0), bins=32)
        assert (expected.tolist(), edges.tolist()) == counted(sent(run)[0]["h"])

    def test_of_many_parts_are_counted_together(
        self, run: Run, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("sidestep.convert.cuda.CHUNK", 100)
        run.log({"h": device.put(torch.arange(320.0))})
        device.run()

        assert [10] * 32 == counted(sent(run)[0]["h"])[0]

    @pytest.mark.parametrize("value", [torch.ones(2, dtype=torch.complex64), torch.eye(3).to_sparse()])
    def test_that_have_no_plain_form_are_refused(self, run: Run, device: FakeDevice, value: torch.Tensor):
        run.log({"x": device.put(value), "n": 1})

        assert ([{"n": 1}], 1) == (sent(run), run.stats().values_refused)


class TestOrder:
    def test_within_the_session_is_kept(self, run: Run, device: FakeDevice):
        run.log({"n": 0})
        run.log({"n": device.number(1.0)})
        run.log({"n": 2})
        run.config.update({"lr": 0.1})

        assert [{"n": 0}] == sent(run)
        assert 3 == run.stats().pending
        device.run()
        assert [{"n": 1.0}, {"n": 2}, {"lr": 0.1}] == sent(run)
        assert balanced(run)

    def test_steps_and_times_are_those_of_the_call(self, run: Run, device: FakeDevice):
        run.log({"n": device.number(1.0)}, step=7)
        run.log({"n": 2}, step=8)
        device.run()

        frame = run._session.outbox.next_frame()
        assert frame is not None
        first, second = decode_records(frame.body, frame.count)
        assert isinstance(first, Record)
        assert isinstance(second, Record)
        assert (7, 8) == (first.step, second.step)
        assert first.time <= second.time

    def test_what_never_comes_is_overtaken_and_leaves_without_its_value_in_the_end(
        self, run: Run, device: FakeDevice
    ):
        outbox = run._session.outbox
        run.log({"n": 0, "loss": device.number(1.0)})
        run.log({"n": 1})

        assert (0, []) == (outbox.overtake(0.0), sent(run))
        assert 1 == outbox.overtake(math.inf)
        assert ([{"n": 1}], 1) == (sent(run), run.stats().pending)
        assert balanced(run)
        assert (0, []) == (outbox.join(0.0), sent(run))
        assert 1 == outbox.join(math.inf)
        assert ([{"n": 0}], 1, 0) == (sent(run), run.stats().values_refused, run.stats().pending)
        assert balanced(run)

    def test_what_was_overtaken_leaves_whole_once_it_is_there(self, run: Run, device: FakeDevice):
        outbox = run._session.outbox
        run.log({"loss": device.number(1.0)})
        run.log({"n": 1})
        outbox.overtake(math.inf)
        sent(run)

        device.run()

        assert (0, [{"loss": 1.0}]) == (outbox.join(0.0), sent(run))
        assert outbox.room == outbox._limit

    def test_at_the_end_nobody_waits(self, run: Run, device: FakeDevice):
        run.log({"n": 0, "loss": device.number(1.0)})
        run.log({"n": 1})
        run.log({"n": 2, "loss": device.number(2.0)})

        assert 2 == run._session.outbox.settle()
        assert [{"n": 0}, {"n": 1}, {"n": 2}] == sent(run)
        assert (2, True) == (run.stats().values_refused, balanced(run))

    def test_room_is_what_records_take_when_all_have_left(self, run: Run, device: FakeDevice):
        outbox = run._session.outbox
        run.log({"h": device.put(torch.arange(100.0)), "loss": device.number(1.0)})
        assert outbox.room < outbox._limit
        device.run()
        sent(run)

        assert outbox.room == outbox._limit


class TestSlab:
    def test_that_is_full_refuses_the_value_and_counts_it(self, run: Run, device: FakeDevice):
        run._session.staging = Staging(device.finder(), slots=2)
        for step in range(4):
            run.log({"n": step, "loss": device.number(float(step))})
        device.run()

        assert [{"n": 0, "loss": 0.0}, {"n": 1, "loss": 1.0}, {"n": 2}, {"n": 3}] == sent(run)
        assert 2 == run.stats().values_refused

        run.log({"loss": device.number(9.0)})
        device.run()
        assert [{"loss": 9.0}] == sent(run)

    def test_slots_of_what_was_given_up_are_used_again_only_when_the_device_is_done(
        self, run: Run, device: FakeDevice
    ):
        run._session.staging = Staging(device.finder(), slots=1)
        run.log({"loss": device.number(1.0)})
        run._session.outbox.settle()
        run.log({"loss": device.number(2.0)})  # no room: the device may still write
        device.run()
        run.log({"loss": device.number(3.0)})
        device.run()

        assert [{}, {}, {"loss": 3.0}] == sent(run)

    def test_slots_of_a_dropped_record_come_back(self, run: Run, device: FakeDevice):
        free = slab_of(run, device).free
        run.log({"loss": device.number(1.0)})
        device.run()
        run._session.outbox.abandon(DropReason.REFUSED)

        assert (free, {"refused": 1}) == (slab_of(run, device).free, run.stats().dropped)
        assert balanced(run)

    def test_a_record_that_finds_no_room_in_the_outbox_gives_its_slots_back(self, run: Run, device: FakeDevice):
        outbox = run._session.outbox
        free, outbox.room = slab_of(run, device).free, 10
        run.log({"loss": device.number(1.0)})
        device.run()
        slab_of(run, device)._reclaim()

        assert (free, {"outbox_full": 1}) == (slab_of(run, device).free, run.stats().dropped)

    def test_is_bounded(self):
        assert 4 * 2**20 == SLOT_BYTES * 4096


class TestRefusals:
    def test_during_graph_capture_nothing_is_enqueued(self, run: Run, device: FakeDevice):
        device.is_capturing = True
        run.log({"n": 1, "loss": device.number(1.0), "h": device.put(torch.zeros(50))})

        assert ([{"n": 1}], 2, 0) == (sent(run), run.stats().values_refused, len(device.stream))

    def test_a_device_that_fails_costs_the_value(
        self, run: Run, device: FakeDevice, caplog: pytest.LogCaptureFixture
    ):
        def fails(*_: Any) -> Any:
            raise RuntimeError("CUDA error: out of memory\nmore")

        device.copy = fails  # type: ignore[method-assign]
        run.log({"n": 1, "loss": device.number(1.0)})

        assert ([{"n": 1}], 1) == (sent(run), run.stats().values_refused)
        assert "out of memory" in caplog.text

    def test_a_value_beside_one_that_can_not_be_logged_is_not_waited_for(self, run: Run, device: FakeDevice):
        run.log({"bad": [device.number(1.0), object()], "n": 1})

        assert ([{"n": 1}], 1, 0) == (sent(run), run.stats().values_refused, len(device.stream))

    def test_a_step_is_not_waited_for(self, run: Run, device: FakeDevice):
        run.log({"n": 1}, step=device.number(3, torch.int64))  # type: ignore[arg-type]

        assert [{"n": 1}] == sent(run)


class TestFork:
    def test_a_child_has_nothing_to_wait_for_and_touches_no_device(self, run: Run, device: FakeDevice):
        run.log({"loss": device.number(1.0)})
        session = run._session
        staging = session.staging
        session.forked()
        try:
            assert staging is not session.staging
            assert 0 == session.outbox.pending
            run.log({"n": 1})
            assert [{"n": 1}] == sent(run)
        finally:
            assert 2 == len(device.stream)


class TestHistograms:
    def test_edges_of_the_largest_numbers_are_finite(self):
        counts, edges = counted(spread([1] * 4, -1.7e308, 1.7e308, 4))

        assert ([1] * 4, True) == (counts, all(map(math.isfinite, edges)))

    def test_are_small_enough_that_a_hundred_fit_into_a_record(self):
        value = packed([2**40] * 64, [math.pi] * 65)

        assert MAX_RECORD_BYTES > 100 * len(plain.dump(value))


def test_nothing_of_torch_is_imported_by_the_worker():
    assert "torch" not in vars(sys.modules["sidestep.staging"])
