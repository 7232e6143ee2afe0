"""Arrays of JAX and of others: faithful stand-ins for them, since none is installed here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sidestep import convert
from sidestep._run import Run
from sidestep.errors import UnsupportedValue
from tests.support.device import FakeDevice
from tests.unit.test_staging import balanced, counted, device, run, sent

__all__ = ["device", "run"]


class Array:
    """What of a `jaxlib` array is looked at. It is computed when a test says so."""

    __module__ = "jaxlib._jax"

    def __init__(self, values: Any, *, addressable: bool = True, replicated: bool = True) -> None:
        self._values = np.asarray(values)
        self.size, self.shape, self.dtype = self._values.size, self._values.shape, self._values.dtype
        self.is_fully_addressable, self.is_fully_replicated = addressable, replicated
        self.computed = self.deleted = False
        self.asked = 0

    def copy_to_host_async(self) -> None:
        self.asked += 1

    def is_ready(self) -> bool:
        if self.deleted:
            raise RuntimeError("Array has been deleted")
        return self.computed

    def is_deleted(self) -> bool:
        return self.deleted

    def delete(self) -> None:
        self.deleted = True

    def addressable_data(self, index: int) -> Array:
        return Array(self._values)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        assert self.computed, "this would wait for the device"
        return self._values


class Tracer:
    """A name of a value, inside of jit."""

    __module__ = "jax._src.interpreters.partial_eval"
    shape = ()

    def __array__(self, *_: Any) -> Any:
        raise AssertionError("a tracer has no value")


class OnDevice:
    """An array of CuPy, or another, on a GPU, that was not to be read."""

    __module__ = "cupy"
    shape, dtype, device = (3,), np.dtype("float32"), "<CUDA Device 0>"

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def numpy(self) -> Any:
        raise AssertionError("this would wait for the device")


class EagerTensor:
    """TensorFlow's, that names its device in words."""

    __module__ = "tensorflow.python.framework.ops"

    def __init__(self, values: Any, where: str) -> None:
        self._values = np.asarray(values)
        self.shape, self.dtype = self._values.shape, self._values.dtype
        self.device = f"/job:localhost/replica:0/task:0/device:{where}:0"

    def numpy(self) -> Any:
        return self._values


class TestJax:
    def test_a_number_is_asked_for_and_comes_when_it_is_computed(self, run: Run):
        loss = Array(np.float32(0.5))
        run.log({"loss": loss, "n": 1})
        run.log({"n": 2})

        assert ([], 1) == (sent(run), loss.asked)
        loss.computed = True
        assert [{"loss": 0.5, "n": 1}, {"n": 2}] == sent(run)
        assert balanced(run)

    @pytest.mark.parametrize(
        ("values", "expected"), [([1, 2], [1, 2]), ([[1.5], [2.5]], [[1.5], [2.5]]), ([7], 7), (True, True)]
    )
    def test_small_ones_are_lists(self, run: Run, values: Any, expected: Any):
        array = Array(values)
        run.log({"x": array})
        array.computed = True

        assert [{"x": expected}] == sent(run)

    def test_larger_ones_are_histograms(self, run: Run):
        array = Array(np.arange(320.0))
        run.log({"x": array})
        array.computed = True

        assert [10] * 32 == counted(sent(run)[0]["x"])[0]

    def test_one_whose_memory_was_given_away_costs_its_value(self, run: Run):
        array = Array(1.0)
        run.log({"x": array, "n": 1})
        array.delete()

        assert ([{"n": 1}], 1) == (sent(run), run.stats().values_refused)

    def test_one_that_is_never_computed_is_given_up_in_the_end(self, run: Run):
        run.log({"x": Array(1.0), "n": 1})
        run._session.outbox.settle()

        assert ([{"n": 1}], 1) == (sent(run), run.stats().values_refused)

    def test_one_that_is_the_same_on_all_hosts_is_read_here(self, run: Run):
        run.log({"x": Array(1.0, addressable=False), "n": 1})
        run._session.outbox.settle()

        assert [{"n": 1}] == sent(run)  # it was asked for, and has not come

    @pytest.mark.parametrize(
        "value", [Tracer(), Array(np.zeros(3), addressable=False, replicated=False), Array(np.zeros(1 << 21))]
    )
    def test_what_has_no_value_here_is_refused(self, run: Run, value: Any):
        run.log({"x": value, "n": 1})

        assert ([{"n": 1}], 1) == (sent(run), run.stats().values_refused)

    def test_outside_of_log_nothing_is_waited_for(self):
        with pytest.raises(UnsupportedValue, match="wait"):
            convert.plain(Array(1.0))


class TestOthers:
    def test_on_a_device_they_are_refused_and_counted(self, run: Run):
        run.log({"x": OnDevice(), "y": EagerTensor(1.0, "GPU"), "n": 1})

        assert ([{"n": 1}], 2) == (sent(run), run.stats().values_refused)

    def test_in_host_memory_they_are_logged(self, run: Run):
        run.log({"x": EagerTensor(1.5, "CPU"), "h": EagerTensor(np.arange(64), "CPU")})

        (found,) = sent(run)
        assert (1.5, [2] * 32) == (found["x"], counted(found["h"])[0])


def test_the_fake_device_is_one_of_torch(device: FakeDevice):
    assert device.finder()(device.number(1.0)) is device
