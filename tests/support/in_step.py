"""Four processes without torch that wait for each other at every step; FOLDER/stop ends them.

python -m tests.support.in_step FOLDER
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path

import sidestep

RANKS = 4
WORK_S = 0.04


def rank(number: int, barrier: Barrier, stop: Event, folder: Path) -> None:
    """One of them, as a launcher would start it."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(RANKS)}
    run = sidestep.init(project="in step")
    step = 0
    while not stop.is_set():
        time.sleep(WORK_S)
        run.log({"train/loss": 1 / (step + 1)}, step=step)
        if number == 0 and (folder / "stop").exists():
            stop.set()  # before all go on: nobody sees it one step later than the others
        barrier.wait()
        step += 1
    run.finish()


def main() -> int:
    """All of them."""
    context = multiprocessing.get_context("spawn")
    barrier, stop, folder = context.Barrier(RANKS), context.Event(), Path(sys.argv[1])
    ranks = [context.Process(target=rank, args=(number, barrier, stop, folder)) for number in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return max(abs(process.exitcode or 0) for process in ranks)


if __name__ == "__main__":
    sys.exit(main())
