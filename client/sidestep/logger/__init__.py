"""Loggers to build a training framework on: the run with its options in one place, a console, results, pipelines.

    from sidestep.logger import UnifiedLogger, WandbConfig, WandbLogger

    with UnifiedLogger() as console, WandbLogger(WandbConfig(project="digits"), logger=console) as logger:
        logger.log_metrics({"loss": 0.5}, step=100)

Each wraps the one run that `sidestep.init()` gives, and promises no less: nothing raises into the training. What
writes a file, or into a terminal, waits for that, as `print` does.
"""

from __future__ import annotations

from sidestep.logger.console import LogConfig, UnifiedLogger
from sidestep.logger.options import WandbConfig
from sidestep.logger.pipeline import PipelineContext
from sidestep.logger.python_types import to_python_types
from sidestep.logger.run_logger import WandbLogger
from sidestep.logger.runner import Results, Runner

__all__ = [
    "LogConfig",
    "PipelineContext",
    "Results",
    "Runner",
    "UnifiedLogger",
    "WandbConfig",
    "WandbLogger",
    "to_python_types",
]
