"""TensorBoard's writer, into the run: `from sidestep.tensorboard import SummaryWriter`.

`init(sync_tensorboard=True)` has the writers of torch and tensorboardX tell the run too, and changes no import.
"""

from __future__ import annotations

from sidestep.tensorboard.writer import SummaryWriter

__all__ = ["SummaryWriter"]
