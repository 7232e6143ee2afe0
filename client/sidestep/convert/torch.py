"""torch: tensors on the CPU with one element, or few enough to be a list.

- the device is looked at before anything else: reading a value from a GPU would stop the training loop
- a tensor that is not what it seems (fake, distributed, functional) is refused: reading it may run a collective
- torch itself is never imported: whoever logs a tensor has it loaded
"""

from __future__ import annotations

import sys
from typing import Any

from sidestep.convert.numpy import MOST_ELEMENTS
from sidestep.errors import UnsupportedValue


def convert(value: Any) -> Any:
    """A tensor of one element is a number, a small one a list."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return _no_tensor(value)
    if value.device.type != "cpu":
        raise UnsupportedValue(
            f"it is a tensor on {value.device.type!r}, and reading it would make the training loop wait: "
            "log loss.item() where your loop waits for it anyway"
        )
    if type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise UnsupportedValue(
            f"it is a {type(value).__name__}, whose values can not be read without side effects"
        )
    if value.numel() > MOST_ELEMENTS:
        raise UnsupportedValue(
            f"it is a tensor of {value.numel()} elements, and lists go up to {MOST_ELEMENTS}: "
            "log what you want to see of it (its mean, its norm)"
        )
    return _read(value)


def _read(value: Any) -> Any:
    try:
        return value.item() if value.numel() == 1 else value.tolist()
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UnsupportedValue(f"it is a tensor that can not be read: {reason:.120}") from None


def _no_tensor(value: Any) -> str:
    kind = type(value).__name__
    if kind in ("dtype", "device", "Size"):
        return str(value)
    raise UnsupportedValue(f"torch's {kind} can not be logged: log a tensor on the CPU, or a number")
