"""Something to be killed around: processes that log one record per step, at a pace, like ranks of a training.

    python -m tests.support.training --ranks 4 --steps 3000 --rate 100

Each rank logs its step number under `mine` (kept per rank) and under `mean` (reduced). A rank that is told to be
mortal by `--mortal RANK` tells its pid in the file of that name, and nothing else.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import sidestep


def main() -> int:
    """All ranks, or the one that the environment says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=100.0, help="steps in a second")
    parser.add_argument("--pids", type=Path, help="where each rank writes its pid, under its number")
    parser.add_argument("--until", type=Path, help="log on after the last step until this file is there")
    options = parser.parse_args()
    if "RANK" in os.environ:
        return train(options, int(os.environ["RANK"]))
    return spawn(options.ranks)


def spawn(ranks: int) -> int:
    """Start every rank, as torchrun would; the worst of their exit codes."""
    processes = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
        processes.append(subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=os.environ | own))
    return max(abs(process.wait()) for process in processes)


def train(options: argparse.Namespace, rank: int) -> int:
    """One rank."""
    run = sidestep.init(project="chaos", config={"steps": options.steps})
    run.define_metric("mine", reduce="per_rank")
    if options.pids:
        draft = options.pids / f".{rank}"
        draft.write_text(str(os.getpid()))
        draft.rename(options.pids / str(rank))
    due, step = time.monotonic(), 0
    while step < options.steps or (options.until and not options.until.exists()):
        run.log({"mine": step, "mean": step + rank}, step=step)
        step += 1
        due += 1 / options.rate
        time.sleep(max(0.0, due - time.monotonic()))
    if options.until:
        options.until.with_suffix(f".{rank}").write_text(str(step))
    run.finish(timeout=60.0)
    stats = run.stats()
    print(f"rank {rank}: {stats}", file=sys.stderr)
    return 0 if stats.acknowledged == stats.offered else 1


if __name__ == "__main__":
    sys.exit(main())
