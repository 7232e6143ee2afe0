"""A training that logs a picture at every step, which says whose it is; and what a run holds of them.

    python -m tests.support.pictures --steps 30 --rate 20 --until FILE

It goes on after its steps until FILE is there. The first pixels of a picture hold its step and rank; the rest is
noise, so that nothing makes it small.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow

import sidestep
from sidestepd.sinks import wandb_log

SIDE = 96


def picture(step: int, rank: int) -> np.ndarray:
    """Pixels that say their step and rank."""
    pixels = np.random.default_rng(step * 100 + rank).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    pixels[0, 0] = step // 256, step % 256, rank
    return pixels


def train(steps: int, rate: float, until: Path | None, pid: Path | None) -> int:
    """One rank."""
    run = sidestep.init(project="pictures")
    if pid is not None:
        pid.with_suffix(".new").write_text(str(os.getpid()))
        pid.with_suffix(".new").rename(pid)
    due = time.monotonic()
    for step in itertools.count():
        if step >= steps and (until is None or until.exists()):
            break
        run.log({"mine": step, "img": sidestep.media.Image(picture(step, run.rank))}, step=step)
        due += 1 / rate
        time.sleep(max(0.0, due - time.monotonic()))
    run.finish(timeout=60.0)
    if until is not None:
        until.with_suffix(".steps").write_text(str(step))
    print(run.stats(), file=sys.stderr)
    return 0 if run.stats().blobs_pending == run.stats().pending == 0 else 1


def command(*, steps: int, rate: float = 20.0, until: Path | None = None, pid: Path | None = None) -> list[str]:
    """The command of it."""
    words = ["--steps", str(steps), "--rate", str(rate)]
    words += ["--until", str(until)] if until else []
    words += ["--pid", str(pid)] if pid else []
    return [sys.executable, "-m", "tests.support.pictures", *words]


def steps_taken(until: Path) -> int:
    """How many steps it took in the end."""
    return int(until.with_suffix(".steps").read_text())


def seen(run_dir: Path) -> Counter[tuple[int, int]]:
    """The step that a row says, and the one that the picture in it says: of every picture in a run."""
    rows = _lines(run_dir) if (run_dir / "rows.jsonl").exists() else _segments(run_dir)
    return Counter((int(values["global_step"]), step) for values, step in rows)


def _lines(run_dir: Path) -> Iterator[tuple[dict[str, Any], int]]:
    for line in (run_dir / "rows.jsonl").read_bytes().splitlines():
        values = json.loads(line)
        if "img" in values:
            kept = run_dir / values["img"]["pixels"]["data"]["file"]
            yield values, _step(np.frombuffer(kept.read_bytes(), np.uint8).reshape(SIDE, SIDE, 3))


def _segments(run_dir: Path) -> Iterator[tuple[dict[str, Any], int]]:
    for segment in wandb_log.segments(run_dir / "wandb"):
        for row in wandb_log.nested_history(segment):
            if "img" in row.values:
                path = segment.parent / "files" / row.values["img"]["path"]
                yield dict(row.values), _step(np.asarray(Pillow.open(path)))


def _step(pixels: np.ndarray) -> int:
    step = int(pixels[0, 0, 0]) * 256 + int(pixels[0, 0, 1])
    assert (picture(step, int(pixels[0, 0, 2])) == pixels).all()
    return step


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rate", type=float, default=20.0)
    parser.add_argument("--until", type=Path)
    parser.add_argument("--pid", type=Path)
    options = parser.parse_args()
    sys.exit(train(options.steps, options.rate, options.until, options.pid))
