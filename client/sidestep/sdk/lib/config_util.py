"""Where libraries look for the error of a changed configuration."""

from sidestep.errors import ConfigError

__all__ = ["ConfigError"]
