"""A small model that is watched for a few steps, by sidestep or, the same script, by wandb.

    python -m tests.support.watched sidestep FILE          # under `sidestep run`
    python -m tests.support.watched wandb FILE             # offline, in the current directory
    torchrun --nproc-per-node 2 -m tests.support.watched sidestep FILE --ddp

What rank 0's gradients and parameters were at the last step that was counted goes to FILE, for numpy to count.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

import numpy as np
import torch

STEPS, EVERY = 6, 3


def main() -> int:
    """Train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("library", choices=["sidestep", "wandb"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--ddp", action="store_true")
    options = parser.parse_args()
    rank = int(os.environ.get("RANK", "0"))
    library = importlib.import_module(options.library)
    run = library.init(project="watched", mode="offline")
    torch.manual_seed(11)
    model: torch.nn.Module = torch.nn.Sequential(torch.nn.Linear(10, 40), torch.nn.Tanh(), torch.nn.Linear(40, 1))
    if options.ddp:
        torch.distributed.init_process_group("gloo")
        model = torch.nn.parallel.DistributedDataParallel(model)
    run.watch(model, log="all", log_freq=EVERY)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    torch.manual_seed(rank)
    parameters: dict[str, np.ndarray] = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        inputs = torch.randn(32, 10)
        parameters = {f"parameters/{name}": it.detach().numpy().copy() for name, it in model.named_parameters()}
        (model(inputs) - inputs.sum(1, keepdim=True)).square().mean().backward()
        weights = torch.arange(100.0)
        run.log({"loss": float(step), "rank": rank, "weights": weights, "array": np.arange(50) ** 2}, step=step)
        optimizer.step()
    run.unwatch()
    gradients = {
        f"gradients/{name}": it.grad.numpy() for name, it in model.named_parameters() if it.grad is not None
    }
    if rank == 0:
        np.savez(options.file, **parameters, **gradients)
    run.finish()
    if options.ddp:
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
