"""Train and evaluate on handwritten digits, all into one offline wandb run, and show what the run holds.

    python demo.py [--dir DIR]

- the commands are those a user would type; only the interpreter is pinned to this one
- a run that is not whole ends in a line for each thing that is wrong, and exit code 1
"""

from __future__ import annotations

import argparse
import json
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import Any

from inspect_run import Contents, check_run, read_run
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
SIDESTEP = [sys.executable, "-m", "sidestep"]


def main() -> int:
    """Run the examples, show the run, check it."""
    options = parse_options()
    run_dir, exit_code = run_examples(options.dir, options.steps)
    if run_dir is None:
        print(f"demo: `sidestep run` made no run and ended with exit code {exit_code}", file=sys.stderr)
        return 1

    found = read_run(run_dir)
    show(run_dir, found, read_status(run_dir))
    problems = check_run(run_dir)
    if exit_code:
        problems.insert(0, f"`sidestep run` ended with exit code {exit_code}")
    for problem in problems:
        print(f"demo: {problem}", file=sys.stderr)
    return 1 if problems else 0


def run_examples(base: Path, steps: int) -> tuple[Path | None, int]:
    """Train, then evaluate, as one `sidestep run`; returns its run directory and its exit code."""
    run_id = secrets.token_hex(4)
    python, train, evaluate = map(
        quote, (sys.executable, str(HERE / "digits_ddp.py"), str(HERE / "digits_eval.py"))
    )
    torchrun = f"{python} -m torch.distributed.run --standalone --nproc-per-node 2"
    words = f"{torchrun} {train} --steps {steps} && {python} {evaluate}"
    named = ["--mode", "offline", "--project", "digits", "--name", "demo", "--id", run_id, "--dir", str(base)]

    print(f'$ sidestep run {" ".join(named)} -- sh -c "{words}"', flush=True)
    done = subprocess.run([*SIDESTEP, "run", *named, "--", "sh", "-c", words], check=False)
    return next(base.glob(f"sidestep-runs/*-{run_id}"), None), done.returncode


def read_status(run_dir: Path) -> dict[str, Any]:
    """What `sidestep status --json` says of a run."""
    told = subprocess.run([*SIDESTEP, "status", "--json", str(run_dir)], check=True, stdout=subprocess.PIPE)
    return dict(json.loads(told.stdout))


def show(run_dir: Path, found: Contents, status: dict[str, Any]) -> None:
    """Print the run as two small tables."""
    console = Console()
    about = Table(title=f"run {status['run']['id']}", title_justify="left", show_header=False)
    for name, text in facts(found, status):
        about.add_row(name, text)
    console.print(about)

    metrics = Table("metric", "against", "rows", "first", "last", title="metrics", title_justify="left")
    for name in found.names():
        values = found.column(name)
        metrics.add_row(name, found.axes.get(name, "?"), str(len(values)), shown(values[0]), shown(values[-1]))
    console.print(metrics)
    print(f"in {run_dir}; to send it to W&B: sidestep sync {run_dir}")


def facts(found: Contents, status: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is to be said of the run beside its metrics."""
    ledger, steps = status["ledger"], found.column("_step")
    yield "state", f"{status['state']}, exit code {found.exit_code}"
    yield "rows", f"{len(steps)}, _step {min(steps, default='-')} to {max(steps, default='-')}"
    yield "segments", str(found.segments)
    yield "ranks", f"{found.config.get('world_size')} of the training, {len(status['sessions'])} processes in all"
    yield "config", ", ".join(f"{name}={shown(value)}" for name, value in found.config.items() if name != "_wandb")
    yield "defined", f"{len(found.axes)} names, {sum('*' in name for name in found.axes)} patterns"
    yield "eval/accuracy", " ".join(map(shown, found.column("eval/accuracy")))
    yield "summary", f"best_accuracy={shown(found.summary.get('best_accuracy'))}"
    yield (
        "ledger",
        f"{ledger['offered']} records offered = {ledger['delivered']} delivered + "
        f"{sum(ledger['rejected'].values())} rejected + {sum(ledger['dropped'].values())} dropped + "
        f"{ledger['pending']} pending + {ledger['unknown']} unknown",
    )


def shown(value: Any) -> str:
    """A value in a few characters."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def parse_options() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description="Train on digits into one offline run, and show it.")
    parser.add_argument("--dir", type=Path, default=Path(), help="where the folder sidestep-runs is made")
    parser.add_argument("--steps", type=int, default=300)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
