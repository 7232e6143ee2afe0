"""A rank of a real torchrun on several nodes: it logs at a pace, and waits for the other ranks now and then.

torchrun --nnodes 3 ... -m tests.support.in_nodes --until FILE --report DIR

All ranks end at the same step: rank 0 tells the others when FILE is there. Each writes what it saw to DIR/RANK:
how many steps it took, the longest that a call of log() took, and of each call when it began, by the machine's
monotonic clock, and what it took; in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import sidestep

TOGETHER = 25
"""Steps from one meeting of the ranks to the next."""


def main() -> int:
    """One rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--until", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--rate", type=float, default=25.0)
    parser.add_argument("--exit-code", type=int, default=0, help="of rank 5")
    options = parser.parse_args()
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    run = sidestep.init(project="nodes")
    run.define_metric("mine", reduce="per_rank")
    step, calls, go_on = 0, [], torch.ones(1)
    while go_on.item():
        for _ in range(TOGETHER):
            before = time.monotonic()
            run.log({"mine": step, "mean": step + rank}, step=step)
            calls.append((before, time.monotonic() - before))
            step += 1
            time.sleep(1 / options.rate)
        go_on = torch.tensor([0.0 if options.until.exists() else 1.0])
        dist.broadcast(go_on, src=0)
    run.finish(timeout=60.0)
    stats = run.stats()
    seen = {"steps": step, "longest_s": max(took for _, took in calls), "calls": calls}
    seen |= {"acknowledged": stats.acknowledged, "offered": stats.offered}
    (options.report / str(rank)).write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()
    return options.exit_code if rank == dist_last() else 0


def dist_last() -> int:
    """The number of the last rank."""
    return int(os.environ["WORLD_SIZE"]) - 1


if __name__ == "__main__":
    sys.exit(main())
