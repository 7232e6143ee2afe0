"""Under torch.compile: `log()` is called as it is, and a model that is watched is compiled whole.

Nightly: what compiles takes ten seconds to load.
"""

from __future__ import annotations

import pytest
import torch

import sidestep
from sidestep.testing import record
from tests.unit.test_staging import counted

pytestmark = pytest.mark.nightly


def test_log_in_a_compiled_function_is_called_every_time():
    with record() as logged:
        run = sidestep.init()

        @torch.compile(backend="eager")
        def work(values: torch.Tensor) -> torch.Tensor:
            doubled = values * 2
            run.log({"sum": doubled.sum(), "one": 1.0, "h": torch.arange(64.0)})
            return doubled + 1

        results = [work(torch.full((3,), float(number))).tolist() for number in range(12)]

    assert [[2.0 * number + 1] * 3 for number in range(12)] == results
    assert [6.0 * number for number in range(12)] == logged["sum"]
    assert [1.0] * 12 == logged["one"]
    assert {(2,) * 32} == {tuple(counted(it)[0]) for it in logged["h"]}


@pytest.mark.parametrize("watched_first", [True, False])
def test_a_watched_model_is_compiled_whole_and_counted_all_the_same(watched_first: bool):
    torch.compiler.reset()
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    with record() as logged:
        run = sidestep.init()
        if watched_first:
            run.watch(model, log="all", log_freq=1)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        if not watched_first:
            run.watch(compiled, log="all", log_freq=1)
        for number in range(3):
            compiled(torch.ones(2, 3)).sum().backward()
            run.log({"n": number})

    prefix = "" if watched_first else "_orig_mod."
    for kind in ("gradients", "parameters"):
        for layer in ("0.weight", "0.bias", "1.weight", "1.bias"):
            assert [0, 1, 2] == logged.steps(f"{kind}/{prefix}{layer}")
