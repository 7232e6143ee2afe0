"""Where libraries look for the class of a run."""

from sidestep._run import Run

__all__ = ["Run"]
