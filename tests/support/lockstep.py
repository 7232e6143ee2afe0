"""A training whose ranks wait for each other at every step, to be run by torchrun, and disturbed from outside.

    torchrun --standalone --nproc-per-node 4 -m tests.support.lockstep FOLDER

Each step is `--work` seconds of work, one `log()`, and one `all_reduce` over gloo. FOLDER is looked at in every
step: `slow-2` makes rank 2 take 30 % longer for its work, `stop` ends the training. Each rank writes its pid into
a file of its number.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

import sidestep

SLOWER = 1.3


def main() -> None:
    """One rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", type=float, default=0.08, help="seconds of work in a step")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    run, folder = sidestep.init(project="lockstep"), options.folder
    draft = folder / f".{run.rank}"
    draft.write_text(str(os.getpid()))
    draft.rename(folder / str(run.rank))
    step, stopped = 0, False
    while not stopped:
        time.sleep(options.work * (SLOWER if (folder / f"slow-{run.rank}").exists() else 1.0))
        run.log({"train/loss": 1 / (step + 1)}, step=step)
        flag = torch.tensor(float((folder / "stop").exists()))
        dist.all_reduce(flag)
        stopped, step = bool(flag), step + 1
    run.finish()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
