"""Arrays of TensorFlow, CuPy, Paddle and MLX: read if they are in host memory, refused if they are on a device.

None of these has a copy to the host that does not wait, or says when it is done.
"""

from __future__ import annotations

from typing import Any

from sidestep.convert import numpy
from sidestep.convert.torch import refusal
from sidestep.errors import UnsupportedValue
from sidestep.staging import Call

ON_HOST = (1, 3)
"""What DLPack calls memory that the CPU reads without waiting: its own, and CUDA's pinned."""


def convert(value: Any, call: Call | None = None) -> Any:
    """As of numpy's array of it."""
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise UnsupportedValue(
            f"a value of type {type(value).__module__}.{type(value).__name__} can not be logged"
        )
    kind = _device(value)
    if kind != "cpu":
        raise UnsupportedValue(refusal(kind))
    read = getattr(value, "numpy", None)
    if read is None:
        raise UnsupportedValue(f"{type(value).__name__} can not be read without side effects")
    return numpy.convert(read(), call)


def _device(value: Any) -> str:
    """Where a value is: "cpu", or what its library calls it. Not knowing is not being on the CPU."""
    asked = getattr(value, "__dlpack_device__", None)
    if asked is not None:
        try:
            return "cpu" if int(asked()[0]) in ON_HOST else str(getattr(value, "device", "a device"))
        except Exception:  # noqa: BLE001 - not every array of a library can be exchanged; there is its name still
            pass
    name = str(getattr(value, "place", None) or getattr(value, "device", None) or "a device")
    return "cpu" if "cpu" in name.lower() else name
