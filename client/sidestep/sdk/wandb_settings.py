"""Where libraries look for the class of settings."""

from sidestep.settings import Settings

__all__ = ["Settings"]
