"""Small disks that can be filled, and one that clones files, in a mount namespace of this process's own."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidestepd.room import free_bytes

_CLONE_NEWNS = 0x00020000


@functools.cache
def _own_mounts() -> str | None:
    """Give this process mounts that nobody else sees; returns why it can not be done."""
    if os.geteuid() != 0:
        return "only root may mount"
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "unshare") or libc.unshare(_CLONE_NEWNS):
        return f"no mount namespace: {os.strerror(ctypes.get_errno())}"
    made = subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True, text=True)
    return made.stderr.strip() or None


@contextlib.contextmanager
def small_disk(at: Path, megabytes: int, kind: str = "tmpfs") -> Iterator[Path]:
    """A disk of so many megabytes at the directory `at`; the test is skipped where that can not be had."""
    why = _own_mounts()
    if why is None:
        at.mkdir(exist_ok=True)
        command = ["mount", "-t", kind, "-o", f"size={megabytes}m", kind, str(at)]
        why = subprocess.run(command, capture_output=True, text=True).stderr.strip() or None
    if why is not None:
        pytest.skip(f"no small disk here: {why}")
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)


def fill(disk: Path, *, leave: int = 0) -> Path:
    """Have somebody else take what is free, but for `leave` bytes; returns the file to be removed again."""
    path = disk / "somebody-elses"
    with path.open("ab") as file:
        while (size := min(free_bytes(disk) - leave, 1 << 20)) > 0:
            try:
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, size)
            except OSError:
                break
    return path


@contextlib.contextmanager
def disk_of_clones(at: Path, image: Path, megabytes: int = 300) -> Iterator[Path]:
    """An XFS, which clones files, in the file `image`; the test is skipped where that can not be had."""
    why = _own_mounts()
    if why is None and shutil.which("mkfs.xfs") is None:
        why = "no mkfs.xfs: apt-get install xfsprogs"
    if why is None:
        at.mkdir(exist_ok=True)
        with image.open("wb") as file:
            file.truncate(megabytes << 20)
        for command in (["mkfs.xfs", "-q", "-f", image], ["mount", "-o", "loop", image, at]):
            why = why or subprocess.run(command, capture_output=True, text=True).stderr.strip() or None
    if why is not None:
        pytest.skip(f"no disk of clones here: {why}")
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)
