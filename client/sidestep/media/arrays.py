"""Arrays: their bytes, copied once in the worker as they are, and a numpy array again in the daemon.

- numpy's arrays, torch's tensors on the CPU, and whatever else lends its memory (the buffer protocol)
- nothing here waits for a device: what is on one is refused, in words
- no library is imported in the worker, and none is needed but the one that the array is of
"""

from __future__ import annotations

import ctypes
import math
import re
import sys
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from sidestep.errors import UnsupportedValue
from sidestep.media.base import Files
from sidestep.media.value import Content

DTYPE = re.compile(r"[<>|=](b1|[iu][1248]|f[248])|bfloat16")
"""The dtypes that travel: numpy's own names for them, and torch's bfloat16."""
OF_TORCH = {
    "bool": "|b1",
    "uint8": "|u1",
    "int8": "|i1",
    "bfloat16": "bfloat16",
    "float16": "<f2",
    "float32": "<f4",
    "float64": "<f8",
    **{f"{sign}int{8 * size}": f"<{sign or 'i'}{size}" for sign in ("", "u") for size in (2, 4, 8)},
}
OF_BUFFER = {
    "?": "|b1",
    **{letter: "iu"[letter.isupper()] for letter in "bBhHiIlLqQ"},
    "e": "f",
    "f": "f",
    "d": "f",
}
"""By the letters of the buffer protocol; sizes are the buffer's own."""


def taken(value: Any) -> dict[str, Any]:
    """The facts of an array, or of a (nested) sequence of numbers. A copy is made, once."""
    value = unwrapped(value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview | array):
        return _of_sequence(value)
    if (torch := sys.modules.get("torch")) is not None and isinstance(value, torch.Tensor):
        return _of_tensor(value, torch)
    if (numpy := sys.modules.get("numpy")) is not None and isinstance(value, numpy.ndarray | numpy.generic):
        return _of_numpy(value)
    return _of_buffer(value)


def is_array(value: Any) -> bool:
    """Whether a value holds numbers with a shape, in memory of its own or a device's."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def is_tensor(value: Any) -> bool:
    """Whether it is torch's, whose images have their channels first."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def unwrapped(value: Any) -> Any:
    """The array that a column of a data frame holds; else the value itself."""
    if type(value).__module__.partition(".")[0] in ("pandas", "polars") and hasattr(value, "to_numpy"):
        return value.to_numpy()
    return value


def not_finite(value: Any) -> int:
    """How many numbers are NaN or infinite, as far as that is told at a glance."""
    value = unwrapped(value)
    for name in ("torch", "numpy"):
        library: Any = sys.modules.get(name)
        kind = getattr(library, "Tensor" if name == "torch" else "ndarray", None)
        if kind is not None and isinstance(value, kind):
            if str(value.dtype).removeprefix("torch.")[:5] not in ("float", "bfloa"):
                return 0
            return int(value.size if name == "numpy" else value.numel()) - int(library.isfinite(value).sum())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return sum(isinstance(it, float) and not math.isfinite(it) for it in value)
    return 0


def numpy_of(facts: Mapping[str, Any], files: Files) -> Any:
    """The array again, in the daemon. It is not to be written to."""
    import numpy

    dtype, shape = facts.get("dtype"), facts.get("shape")
    if not isinstance(dtype, str) or not DTYPE.fullmatch(dtype) or not _is_shape(shape):
        raise ValueError(f"no array has the dtype {dtype!r:.80} and the shape {shape!r:.80}")
    data = files.read(facts["data"])
    try:
        if dtype == "bfloat16":
            bits = numpy.frombuffer(data, "<u2").astype(numpy.uint32) << 16
            return bits.view(numpy.float32).reshape(shape)
        return numpy.frombuffer(data, dtype).reshape(shape)
    except ValueError as error:
        raise ValueError(f"{len(data)} bytes are no array of {dtype} of the shape {shape!r:.80}") from error


def _of_numpy(value: Any) -> dict[str, Any]:
    if not DTYPE.fullmatch(value.dtype.str):
        if value.dtype.kind == "f":  # longdouble
            value = value.astype("<f8")
        elif value.dtype.kind == "O":
            return _of_sequence(value.tolist())
        else:
            raise UnsupportedValue(f"it is an array of {value.dtype}, which is neither of numbers nor of bools")
    return {"dtype": value.dtype.str, "shape": list(value.shape), "data": Content(value.tobytes())}


def _of_tensor(value: Any, torch: Any) -> dict[str, Any]:
    """By its memory, so that it needs no numpy and takes bfloat16 too."""
    if value.device.type != "cpu":
        raise UnsupportedValue(
            f"it is a tensor on {value.device.type!r}, and reading it would make the training loop wait: "
            "hand over tensor.cpu() where your loop waits for it anyway"
        )
    if type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ or value.layout != torch.strided:
        raise UnsupportedValue(f"it is a {type(value).__name__} that can not be read without side effects")
    dtype = OF_TORCH.get(str(value.dtype).removeprefix("torch."))
    value = value.detach()
    if dtype is None:
        if not value.dtype.is_floating_point:
            raise UnsupportedValue(f"it is a tensor of {value.dtype}, which has no numbers to be shown")
        value, dtype = value.to(torch.float32), "<f4"  # the small floats
    value = value.resolve_neg().contiguous()
    size = value.numel() * value.element_size()
    data = ctypes.string_at(value.data_ptr(), size) if size else b""
    return {"dtype": dtype, "shape": list(value.shape), "data": Content(data)}


def _of_buffer(value: Any) -> dict[str, Any]:
    try:
        view = memoryview(value)
        letter = view.format.lstrip("@=")
        kind = OF_BUFFER[letter]
    except (TypeError, KeyError):
        why = "it is on a device" if hasattr(value, "__cuda_array_interface__") else "its memory can not be read"
        raise UnsupportedValue(
            f"a {type(value).__module__}.{type(value).__qualname__} is no array that can be logged: {why}; "
            "hand over a numpy array"
        ) from None
    dtype = kind if len(kind) > 1 else f"{'<' if sys.byteorder == 'little' else '>'}{kind}{view.itemsize}"
    return {"dtype": dtype, "shape": list(view.shape or ()), "data": Content(view.tobytes())}


def _of_sequence(values: Sequence[Any]) -> dict[str, Any]:
    shape, flat = _flattened(values)
    if all(type(number) is int and -(2**63) <= number < 2**63 for number in flat):
        return {"dtype": _native("i8"), "shape": shape, "data": Content(array("q", flat).tobytes())}
    try:
        numbers = array("d", flat)
    except (TypeError, ValueError, OverflowError):
        raise UnsupportedValue("it is a sequence with entries that are no numbers") from None
    return {"dtype": _native("f8"), "shape": shape, "data": Content(numbers.tobytes())}


def _flattened(values: Any) -> tuple[list[int], list[Any]]:
    """The shape of nested sequences, and what is in them."""
    if is_tensor(values) and values.device.type != "cpu":
        raise UnsupportedValue(f"it holds tensors on {values.device.type!r}: hand over numbers")
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, Sequence | range) or isinstance(values, str | bytes):
        return [], [values]
    if not any(isinstance(value, Sequence) or hasattr(value, "tolist") for value in values):
        return [len(values)], list(values)
    parts = [_flattened(value) for value in values]
    inner = parts[0][0]
    if any(shape != inner for shape, _ in parts):
        raise UnsupportedValue("it is a sequence whose entries have different lengths")
    return [len(parts), *inner], [number for _, flat in parts for number in flat]


def _native(kind: str) -> str:
    return f"{'<' if sys.byteorder == 'little' else '>'}{kind}"


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(length) is int and length >= 0 for length in shape)
