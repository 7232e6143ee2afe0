"""Ray Train: every worker logs, and all of them are one run.

    pip install 'sidestep[daemon]' 'ray[train]'
    sidestep run -- python deploy/ray/train.py --workers 4

The daemon is beside the driver. Workers are processes of Ray, which carry none of the driver's environment: what
leads to the daemon goes with the job. Ranks are found by themselves. On several nodes say where a daemon listens
that all of them reach, or have one on each (deploy/systemd), and give its address in SIDESTEP_ADDRESS.

Ray ends workers without asking: `finish` is what makes sure that the last rows are said.
"""

from __future__ import annotations

import argparse
import os

import ray
import ray.train
from ray.train import ScalingConfig
from ray.train.v2.api.data_parallel_trainer import (
    DataParallelTrainer,
)  # what TorchTrainer and its like are made of

import sidestep

LEADS_TO_THE_DAEMON = ("SIDESTEP_ADDRESS", "SIDESTEP_RUN_ID", "SIDESTEP_RUN_DIR", "SIDESTEP_CONTEXT")


def train(config: dict[str, int]) -> None:
    """What each worker does."""
    rank = ray.train.get_context().get_world_rank()
    with sidestep.init(project="ray", config=config) as run:
        run.define_metric("loss", reduce="mean")
        for step in range(config["steps"]):
            run.log({"loss": (rank + 1) / (step + 1)}, step=step)
        run.finish(timeout=30)


def main() -> None:
    """Start Ray here, or join the cluster that RAY_ADDRESS names, and train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    environ = {name: os.environ[name] for name in LEADS_TO_THE_DAEMON if name in os.environ}
    ray.init(runtime_env={"env_vars": environ})
    scaling = ScalingConfig(num_workers=options.workers)
    DataParallelTrainer(train, train_loop_config={"steps": options.steps}, scaling_config=scaling).fit()
    ray.shutdown()


if __name__ == "__main__":
    main()
