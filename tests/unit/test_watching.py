"""`watch`: what is counted, when, under which names, and that the hooks go away again."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import sidestep
from sidestep._run import Run
from sidestep.testing import Recorder, record
from tests.support.device import FakeDevice
from tests.unit.test_staging import counted


@pytest.fixture
def logged() -> Iterator[Recorder]:
    with record(strict=False) as recorder:
        yield recorder


@pytest.fixture
def run(logged: Recorder) -> Run:
    return sidestep.init()


def small_model() -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(6, 20), torch.nn.ReLU(), torch.nn.Linear(20, 5))


def step(model: torch.nn.Module) -> None:
    model.zero_grad()
    model(torch.randn(8, 6)).square().sum().backward()


def gradients(model: torch.nn.Module) -> dict[str, Any]:
    return {f"gradients/{name}": it.grad for name, it in model.named_parameters()}


def agree(value: Any, tensor: Any) -> bool:
    """Whether a histogram is numpy's of a tensor."""
    numbers = tensor.detach().double().numpy()
    expected, edges = np.histogram(numbers, bins=64)
    counts, ours = counted(value)
    off = sum(abs(one - other) for one, other in zip(expected, counts, strict=True))
    return np.allclose(edges, ours) and off <= max(2, numbers.size // 50) and sum(counts) == numbers.size


class TestGradients:
    def test_are_counted_and_in_the_row_of_the_next_call(self, run: Run, logged: Recorder):
        model = small_model()
        run.watch(model, log_freq=1)

        step(model)
        found = gradients(model)
        run.log({"loss": 1.0})

        assert set(found) == set(logged.names) - {"loss"}
        assert all(agree(logged[name][0], gradient) for name, gradient in found.items())
        assert [0, 0] == logged.steps("loss") + logged.steps("gradients/0.weight")

    def test_are_counted_at_every_so_manieth_batch(self, run: Run, logged: Recorder):
        model = small_model()
        run.watch(model, log_freq=3)

        for number in range(7):
            step(model)
            run.log({"n": number})

        assert [2, 5] == logged.steps("gradients/0.bias")

    def test_of_frozen_parameters_are_none(self, run: Run, logged: Recorder):
        model = small_model()
        model[0].requires_grad_(False)
        run.watch(model, log_freq=1)
        step(model)

        assert ["gradients/2.bias", "gradients/2.weight"] == logged.names

    def test_that_are_nan_are_left_out_and_counted(self, run: Run, logged: Recorder):
        model = small_model()
        run.watch(model, log_freq=1)
        (model(torch.full((2, 6), math.nan))).sum().backward()

        assert "gradients/0.weight" not in logged.names
        assert 2 == run.stats().values_refused  # those of weights

    def test_of_one_value_are_one_bin_as_in_wandb(self, run: Run, logged: Recorder):
        model = torch.nn.Linear(3, 2)
        run.watch(model, log_freq=1)
        model(torch.ones(4, 3)).sum().backward()

        assert ([6], [4.0, 4.0]) == counted(logged["gradients/weight"][0])

    def test_that_are_sparse_count_their_zeros(self, run: Run, logged: Recorder):
        model = torch.nn.Embedding(100, 2, sparse=True)
        run.watch(model, log_freq=1)
        model(torch.tensor([1, 1, 5])).sum().backward()

        counts, edges = counted(logged["gradients/weight"][0])
        assert (200, 196, 2) == (sum(counts), counts[0], counts[-1])
        assert (0.0, 2.0) == (edges[0], edges[-1])

    def test_a_backward_pass_that_failed_leaves_nothing_behind_that_is_lost(self, run: Run, logged: Recorder):
        model = small_model()
        run.watch(model, log_freq=1)

        def fails(_: Any) -> None:
            raise RuntimeError("no more")

        handle = model[0].weight.register_hook(fails)
        with pytest.raises(RuntimeError, match="no more"):
            step(model)
        handle.remove()
        step(model)

        assert "gradients/0.weight" in logged.names

    def test_of_many_parameters_fit_into_records(self, run: Run, logged: Recorder):
        model = torch.nn.ModuleList(torch.nn.Linear(9, 9) for _ in range(150))
        run.watch(model, log_freq=1)
        sum(layer(torch.randn(2, 9)).square().sum() for layer in model).backward()  # type: ignore[union-attr]
        run.log({"n": 1})

        assert 301 == len(logged.names)
        assert {0} == set(logged.steps("n") + logged.steps("gradients/149.weight"))
        assert {} == run.stats().dropped


class TestParameters:
    def test_are_counted_after_the_forward_pass(self, run: Run, logged: Recorder):
        model = small_model()
        model[0].requires_grad_(False)
        run.watch(model, log="parameters", log_freq=2)

        model(torch.randn(1, 6))
        assert [] == logged.names
        model(torch.randn(1, 6))

        assert {f"parameters/{name}" for name, _ in model.named_parameters()} == set(logged.names)
        for name, parameter in model.named_parameters():
            assert agree(logged[f"parameters/{name}"][0], parameter)

    def test_and_gradients_are_both_counted(self, run: Run, logged: Recorder):
        model = small_model()
        run.watch(model, log="all", log_freq=1)
        step(model)

        assert 8 == len(logged.names)
        assert [0] == logged.steps("parameters/0.weight")


class TestSeveralModels:
    def test_are_numbered_as_in_wandb(self, run: Run, logged: Recorder):
        first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        run.watch([first, second], log_freq=1)
        (first(torch.ones(1, 2)) + second(torch.ones(1, 2))).sum().backward()

        assert [
            "gradients/bias",
            "gradients/graph_1bias",
            "gradients/graph_1weight",
            "gradients/weight",
        ] == logged.names

    def test_can_be_given_a_number(self, run: Run, logged: Recorder):
        model = torch.nn.Linear(2, 2)
        run.watch(model, log_freq=1, idx=4)
        model(torch.ones(1, 2)).sum().backward()

        assert ["gradients/graph_4bias", "gradients/graph_4weight"] == logged.names


class TestUnwatch:
    @pytest.mark.parametrize("one_by_one", [True, False])
    def test_takes_the_hooks_out(self, run: Run, logged: Recorder, one_by_one: bool):
        model, other = small_model(), small_model()
        run.watch([model, other], log="all", log_freq=1)
        if one_by_one:
            run.unwatch(model)
            run.unwatch([other])
        else:
            run.unwatch()
        step(model)
        step(other)

        assert [] == logged.names
        assert {} == dict(model._forward_hooks)
        assert not any(it._backward_hooks for it in [*model.parameters(), *other.parameters()])

    def test_of_a_model_that_is_not_watched_is_nothing(self, run: Run):
        run.unwatch(small_model())
        run.watch(small_model())
        run.unwatch(small_model())

    def test_is_not_needed_at_the_end(self, run: Run, logged: Recorder):
        model = small_model()
        run.watch(model, log_freq=1)
        run.finish()
        step(model)

        assert ({}, 0) == (run.stats().dropped, len(logged.records))


class TestMistakes:
    @pytest.mark.parametrize(("models", "log"), [("no model", "gradients"), (torch.nn.Linear(1, 1), "weights")])
    def test_are_said_and_raise_nothing(self, run: Run, models: Any, log: Any, caplog: pytest.LogCaptureFixture):
        run.watch(models, log=log)

        assert ({"unsupported": 1}, True) == (run.stats().dropped, "watch(" in caplog.text)

    def test_a_graph_is_not_logged_and_that_is_said(self, run: Run, caplog: pytest.LogCaptureFixture):
        run.watch(small_model(), log_graph=True)

        assert "the graph is not logged" in caplog.text

    def test_a_run_that_is_disabled_watches_nothing(self, logged: Recorder):
        sidestep.finish()
        model = small_model()
        sidestep.init(mode="disabled").watch(model)

        assert not any(it._backward_hooks for it in model.parameters())


class TestOnADevice:
    def test_is_enqueued_and_comes_later(self, logged: Recorder):
        run = sidestep.init()
        device = FakeDevice()
        run._session.staging.find = lambda _: device
        model = small_model()
        run.watch(model, log="all", log_freq=1)

        run._session.outbox.idle = False  # the recorder takes nothing until the device is done
        loss = model(torch.randn(8, 6)).square().sum()
        assert 5 == len(device.stream)  # a copy for each, and one flag
        loss.backward()
        assert 10 == len(device.stream)
        device.run()
        run.flush()

        assert all(agree(logged[name][0], it) for name, it in gradients(model).items())


class TestSeveralRanks:
    @pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
    def test_no_hook_runs_a_collective(self, run: Run, logged: Recorder, monkeypatch: pytest.MonkeyPatch):
        def collective(*_: Any, **__: Any) -> None:
            raise AssertionError("a collective")

        for name in ("all_reduce", "all_gather", "broadcast", "barrier"):
            monkeypatch.setattr(torch.distributed, name, collective)
        model = small_model()
        run.watch(model, log="all", log_freq=1)
        step(model)

        assert 8 == len(logged.names)


def test_a_model_that_warns_of_full_hooks_does_not():
    with record(strict=False), warnings.catch_warnings():
        warnings.simplefilter("error")
        model = small_model()
        sidestep.init().watch(model, log="all", log_freq=1)
        step(model)
