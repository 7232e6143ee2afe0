"""JAX: an array is asked to come to the host, and read by the sender when it says that it is computed.

- an array of JAX never changes, so it is kept as it is until it is read; one whose memory was given away
  (`donate_argnums`) meanwhile is refused
- a tracer, inside of `jit` or `grad`, has no value; an array that is spread over hosts has none here
- JAX itself is never imported
"""

from __future__ import annotations

from typing import Any

from sidestep.convert import histograms, numpy
from sidestep.errors import UnsupportedValue
from sidestep.staging import Call, Deferred

MOST_ELEMENTS = 1 << 20
"""Of an array that is counted on the host: it is kept until then, and counted in the sender's thread."""


class OnItsWay(Deferred):
    """An array that was asked to come to the host."""

    __slots__ = ("_array", "_bins")

    def __init__(self, array: Any, bins: int) -> None:
        super().__init__(64 + 16 * min(int(array.size), 2 * bins))
        self._array, self._bins = array, bins

    def ready(self) -> bool:
        """Whether it is computed: reading it then takes no longer than copying it."""
        array = self._array
        return array is None or array.is_deleted() or bool(array.is_ready())

    def value(self) -> Any:
        """As of numpy's array of it."""
        array, self._array = self._array, None
        if array.is_deleted():
            raise UnsupportedValue("its memory was given away (donated) before it could be read: log a copy")
        try:
            host = array.__array__()
        except Exception as error:  # noqa: BLE001 - a computation that failed on the device says so here
            raise UnsupportedValue(f"it can not be read: {type(error).__name__}") from None
        if host.size > numpy.MOST_ELEMENTS:
            return histograms.of_numpy(_counted_as(host), self._bins)
        return numpy.convert(host)

    def give_up(self) -> None:
        """Let go of it."""
        self._array = None


def convert(value: Any, call: Call | None = None) -> Any:
    """What is on its way; a scalar type of JAX's is numpy's and never comes here."""
    if not hasattr(value, "copy_to_host_async") or not hasattr(value, "is_ready"):
        raise UnsupportedValue(
            f"JAX's {type(value).__name__} has no value here: inside of jit and grad there are only names. "
            "Return it, and log it outside"
        )
    if call is None:
        raise UnsupportedValue("it is an array of JAX, and reading it would wait for its device")
    if value.is_deleted():
        raise UnsupportedValue("its memory was given away (donated): log it before")
    if not value.is_fully_addressable:
        if not value.is_fully_replicated:
            raise UnsupportedValue("it is spread over several hosts: log a part, or what you reduce it to")
        value = value.addressable_data(0)
    if value.size > MOST_ELEMENTS:
        raise UnsupportedValue(
            f"it is an array of {value.size} elements, and histograms are made of up to {MOST_ELEMENTS}: "
            "log jnp.histogram of it, or a part"
        )
    value.copy_to_host_async()
    return call.defer(OnItsWay(value, call.bins))


def _counted_as(host: Any) -> Any:
    """bfloat16 and float8 are types of ml_dtypes, which numpy does not count."""
    return host.astype("float32") if host.dtype.kind == "V" else host
