"""torch: a tensor of one element is a number, a small one a list, and of a larger one there is a histogram.

- the device is looked at before anything else: reading a value from a GPU would stop the training loop. What is on
  one is staged (staging.py); on a kind of device that nothing can be staged from it is refused
- what is not what it seems is refused: tensors that are fake, functional, or of functorch have no values, and
  reading those of a subclass may run anything. Of a DTensor its local part is taken, which runs no collective
- torch itself is never imported: whoever logs a tensor has it loaded
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from sidestep.convert import histograms
from sidestep.convert.numpy import MOST_ELEMENTS
from sidestep.errors import UnsupportedValue
from sidestep.staging import Call, Device, Numbers

CODES = {
    "torch.float32": "f", "torch.float64": "d", "torch.float16": "e", "torch.bfloat16": "bfloat16",
    "torch.int64": "q", "torch.int32": "i", "torch.int16": "h", "torch.int8": "b", "torch.uint8": "B",
    "torch.uint16": "H", "torch.uint32": "I", "torch.uint64": "Q", "torch.bool": "?",
}  # fmt: skip
"""How a number of each type is read from memory. Others (float8) are widened before they are copied."""
CHUNK = 1 << 24
"""Elements that are counted at once: what is made for it is bounded, and a float32 counts so far exactly."""


COMPILED_NEVER = ("_run", "bags", "convert", "notices", "outbox", "session", "staging", "steps", "waiting", "wire")
"""What `log()` runs."""


def convert(value: Any, call: Call | None = None) -> Any:
    """A number, a list, or with `call` a histogram or what is still on its way from a device."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return _no_tensor(value)
    value = local(torch, value)
    device = None if call is None else call.find(value)
    if device is not None and call is not None:
        return _staged(torch, value, device, call)
    if value.device.type != "cpu":
        raise UnsupportedValue(refusal(value.device.type))
    if value.numel() > MOST_ELEMENTS:
        if call is None:
            raise UnsupportedValue(
                f"it is a tensor of {value.numel()} elements, and lists go up to {MOST_ELEMENTS}: "
                "log what you want to see of it (its mean, its norm)"
            )
        return _read(lambda: histograms.spread(*count(torch, value, call.bins)))
    return _read(value.item if value.numel() == 1 else lambda: _dense(torch, value).tolist())


def _dense(torch: Any, value: Any) -> Any:
    return value.detach().to_dense() if value.layout != torch.strided else value


def refusal(kind: str) -> str:
    """What is said of a value on a device that it can not be had from."""
    return (
        f"it is a tensor on {kind!r}, and reading it would make the training loop wait: "
        "log loss.item() where your loop waits for it anyway"
    )


def local(torch: Any, value: Any) -> Any:
    """The tensor that holds the values: itself, or a DTensor's local part; UnsupportedValue if there is none."""
    if type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        part = getattr(value, "_local_tensor", None)
        if type(value).__name__ != "DTensor" or part is None:
            raise UnsupportedValue(
                f"it is a {type(value).__name__}, whose values can not be read without side effects"
            )
        return local(torch, part)
    functorch = getattr(torch._C, "_functorch", None)
    if functorch is not None and functorch.is_functorch_wrapped_tensor(value):
        raise UnsupportedValue("it is a tensor of functorch (vmap, grad), which has no values of its own")
    if torch._is_functional_tensor(value):
        raise UnsupportedValue("it is a functional tensor, which has no values of its own")
    return value


_told: list[Any] = []
"""The rules of the compiler that were told."""


def hide_from_compiler() -> bool:
    """Have torch.compile leave what `log()` runs alone: in a compiled function it is called as it is.

    Whether that is done; where nothing was compiled so far there is nobody to tell. `watching` is not among it:
    its hooks may be inside of a model that has to be compiled whole.
    """
    rules: Any = sys.modules.get("torch._dynamo.trace_rules")
    if rules is None or rules in _told:
        return rules is not None
    _told.append(rules)  # once in a process: what is added twice is there twice, and looked through each time
    try:
        for name in COMPILED_NEVER:
            rules.add(f"sidestep.{name}")
    except (AttributeError, ImportError, AssertionError):
        pass  # another torch: it compiles what it can of us, and breaks its graph where it can not
    return True


def _staged(torch: Any, value: Any, device: Device, call: Call) -> Any:
    elements, code = value.numel(), code_of(value.dtype)
    if value.is_sparse or (code is None and (value.is_complex() or value.is_quantized)):
        raise UnsupportedValue("it is a complex, sparse or quantized tensor on a device: log its parts")
    if elements > MOST_ELEMENTS:
        return _read(lambda: call.histogram(device, value, histograms.spread))
    if elements == 0:
        return []
    if code is None:
        value, code = widened(torch, value), "f"
    if elements == 1:
        return call.number(device, value, code)
    return call.array(device, value, Numbers(code, tuple(value.shape)))


def quickly(call: Call) -> Callable[[Any], Any]:
    """What stages the usual value of a training, a loss: a tensor on a device, with no dimension, and no subclass.

    It gives None for everything else, which `convert` looks at. What is not what it seems shows when it is copied.
    """
    torch = sys.modules.get("torch")
    tensor = getattr(torch, "Tensor", None)
    find, number = call.find, call.number

    def stage(value: Any) -> Any:
        if type(value) is not tensor or value.dim():
            return None
        device = find(value)
        if device is None or (code := code_of(value.dtype)) is None or value.is_sparse:
            return None
        return number(device, value, code)

    return stage


@lru_cache(maxsize=256)
def code_of(dtype: object) -> str | None:
    """How a number of a type is read from memory, if it is."""
    return CODES.get(str(dtype))


def widened(torch: Any, value: Any) -> Any:
    """As float32, enqueued where the tensor is."""
    with torch.no_grad():
        return value.to(torch.float32)


def count(torch: Any, value: Any, bins: int) -> tuple[list[int], float, float, int]:
    """Count a tensor in host memory: counts, the least and largest of its finite elements, how many those are."""
    with torch.no_grad():
        flat, zeros = _flat(torch, value.detach())
        least, largest = _span(torch, flat)
        if not (_is_finite(least) and _is_finite(largest)):
            flat = flat[torch.isfinite(flat)]
            least, largest = _span(torch, flat)
        if zeros:
            least, largest = min(least, 0.0), max(largest, 0.0)
        if least > largest:
            return [0] * bins, 0.0, 0.0, 0
        counts = [0] * bins
        if least < largest:
            for part in flat.split(CHUNK):
                some = torch.histc(part, bins=bins, min=least, max=largest).tolist()
                counts = [total + int(more) for total, more in zip(counts, some, strict=True)]
            if zeros:
                counts[min(int(-least / (largest - least) * bins), bins - 1)] += zeros
        return counts, least, largest, flat.numel() + zeros


def _flat(torch: Any, value: Any) -> tuple[Any, int]:
    """The elements in a type that can be counted, and the zeros that a sparse tensor does not name."""
    zeros = 0
    if value.is_sparse:
        elements, value = value.numel(), value.coalesce().values()
        zeros = elements - value.numel()
    if value.is_complex():
        raise UnsupportedValue("it is a complex tensor: log its parts, or its magnitude")
    if value.dtype not in (torch.float32, torch.float64):
        exact = value.dtype in (torch.int64, torch.uint64, torch.int32, torch.uint32)
        value = value.to(torch.float64 if exact else torch.float32)
    return value.reshape(-1), zeros


def _span(torch: Any, flat: Any) -> tuple[float, float]:
    """The least and the largest; NaN if there is one, and nothing between them if there is no element."""
    if flat.numel() == 0:
        return float("inf"), float("-inf")
    least, largest = torch.aminmax(flat)
    return least.item(), largest.item()


def _is_finite(number: float) -> bool:
    return number - number == 0


def _read(read: Any) -> Any:
    try:
        return read()
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UnsupportedValue(f"it is a tensor that can not be read: {reason:.120}") from None


def _no_tensor(value: Any) -> str:
    kind = type(value).__name__
    if kind in ("dtype", "device", "Size"):
        return str(value)
    raise UnsupportedValue(f"torch's {kind} can not be logged: log a tensor, or a number")
