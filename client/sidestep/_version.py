"""The release. Written here so that importing sidestep reads no package metadata."""

__version__ = "0.1.0"
