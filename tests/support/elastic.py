"""A rank that a real torchrun starts: it crashes once, goes on from its checkpoint, and says steps again.

torchrun --nproc-per-node 2 --max-restarts 1 -m tests.support.elastic --checkpoint FILE
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import sidestep

STEPS, SAVED_AT, CRASHED_AT = 50, 20, 30
"""In its first life, rank 1 crashes before it says step `CRASHED_AT`; the checkpoint is of step `SAVED_AT`."""


def main() -> int:
    """One life of one rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--together", action="store_true", help="the others wait for the one that crashes")
    options = parser.parse_args()
    checkpoint: Path = options.checkpoint
    rank = int(os.environ["RANK"])
    run = sidestep.init(project="elastic")
    run.define_metric("mine", reduce="per_rank")
    first = int(checkpoint.read_text()) if checkpoint.exists() else 0
    for step in range(first, STEPS):
        if step == SAVED_AT and rank == 0 and first == 0:
            checkpoint.write_text(str(step))
        if step == CRASHED_AT and rank != 1 and first == 0 and options.together:
            run.flush(30.0)
            checkpoint.with_name(f"waits{rank}").touch()
            time.sleep(3600)  # as in a collective, until torchrun ends it
        if step == CRASHED_AT and rank == 1 and first == 0:
            run.flush(30.0)
            others = int(os.environ["WORLD_SIZE"]) - 1 if options.together else 0
            while not checkpoint.exists() or len(list(checkpoint.parent.glob("waits*"))) < others:
                time.sleep(0.01)
            raise RuntimeError("a crash that the checkpoint was made for")
        run.log({"mine": step, "life": 1 if first else 0, "ranks": 1}, step=step)
        time.sleep(0.02)
    run.finish(timeout=60.0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
