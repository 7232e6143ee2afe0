"""Train a small network on handwritten digits with DDP; every rank logs, and one run holds it all.

    sidestep run -- torchrun --nproc-per-node 2 digits_ddp.py

- every rank calls `init` and logs under the same names: `reduce=` says what the run shows for a step
- the checkpoints go into the run's directory, where digits_eval.py finds them
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sidestep


def main() -> None:
    """Train, log from every rank, and leave a checkpoint every so many steps."""
    options = parse_options()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")

    with sidestep.init(config=vars(options) | {"world_size": dist.get_world_size()}) as run:
        run.define_metric("train/loss", reduce="mean")
        run.define_metric("train/grad_norm", reduce="max")
        run.define_metric("train/samples", reduce="sum")
        run.define_metric("train/step_time_s", reduce="per_rank")
        train(run, options)

    dist.destroy_process_group()


def train(run: sidestep.Run, options: argparse.Namespace) -> None:
    """Take `options.steps` steps of gradient descent, each rank on its own share of the data."""
    rank, world = dist.get_rank(), dist.get_world_size()
    images, labels = (part[rank::world] for part in load_split("train"))
    shuffled = torch.Generator().manual_seed(rank)

    model = DistributedDataParallel(build_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)

    for step in range(options.steps):
        started = time.perf_counter()
        batch = torch.randint(len(images), (options.batch_size,), generator=shuffled)
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm)
        optimizer.step()

        run.log(
            {
                "train/loss": loss.detach(),
                "train/grad_norm": grad_norm,
                "train/samples": len(batch),
                "train/step_time_s": time.perf_counter() - started,
            },
            step=step,
        )
        if rank == 0 and (step + 1) % options.checkpoint_every == 0:
            save_checkpoint(model.module, step)


def build_model() -> nn.Module:
    """A network of one hidden layer: 8 x 8 pixels in, ten digits out."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def load_split(part: str) -> tuple[Tensor, Tensor]:
    """The images (n x 64, from 0 to 1) and labels of the "train" or of the "held_out" part."""
    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    train, held_out = train_test_split(torch.arange(len(labels)), test_size=0.25, random_state=0)
    chosen = {"train": train, "held_out": held_out}[part]
    return images[chosen], labels[chosen]


def checkpoint_dir() -> Path:
    """Where checkpoints lie: in the run's directory, or in the temporary one if nothing serves a run."""
    return Path(os.environ.get("SIDESTEP_RUN_DIR", tempfile.gettempdir())) / "checkpoints"


def save_checkpoint(model: nn.Module, step: int) -> None:
    """Write the weights after a step as `<step>.pt`."""
    checkpoint_dir().mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), checkpoint_dir() / f"{step}.pt")


def parse_options() -> argparse.Namespace:
    """The options of the command line; they become the run's config."""
    parser = argparse.ArgumentParser(description="Train on handwritten digits with DDP.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=32, help="images per rank and step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--max-grad-norm", type=float, default=1.0)
    parser.add_argument("--checkpoint-every", type=int, default=50, help="steps")
    return parser.parse_args()


if __name__ == "__main__":
    main()
