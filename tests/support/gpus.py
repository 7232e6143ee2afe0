"""GPUs that are not there: NVIDIA's library is stood in for by one built from `nvml_stub.c`, which a file scripts.

    gpus = StubGpus(folder)
    gpus.set(count=2).gpu(0, util=93)
    subprocess.Popen(..., env=os.environ | gpus.environment)

The real `pynvml`, and whatever else speaks NVML, sees what the file says, in that very moment.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

SOURCE = Path(__file__).with_name("nvml_stub.c")
LIBRARY = "libnvidia-ml.so.1"
COMPILER = shutil.which("cc")
NO_COMPILER = "the stand-in for NVML is built with cc"


@functools.cache
def library() -> Path:
    """The stand-in, built once for each state of its source."""
    assert COMPILER is not None, NO_COMPILER
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"sidestep-nvml-stub-{os.getuid()}-{digest}"
    folder.mkdir(mode=0o700, exist_ok=True)
    built = folder / LIBRARY
    if not built.exists():
        draft = folder / f"{LIBRARY}.{os.getpid()}"
        flags = ["-shared", "-fPIC", "-O1", "-pthread", f"-Wl,-soname,{LIBRARY}"]
        subprocess.run([COMPILER, *flags, "-o", str(draft), str(SOURCE)], check=True)
        draft.rename(built)
    return built


class StubGpus:
    """The file that scripts them. Later lines overrule earlier ones."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "gpus"
        self._lines: dict[tuple[Any, ...], str] = {}
        self.set(count=0)

    @property
    def environment(self) -> dict[str, str]:
        """For a process that shall see these GPUs."""
        return {"NVML_STUB": str(self.path), "LD_LIBRARY_PATH": str(library().parent)}

    def load(self) -> None:
        """Let this very process see them: a library that is loaded is found by its name."""
        os.environ["NVML_STUB"] = str(self.path)
        library_at = ctypes.CDLL(str(library()), mode=ctypes.RTLD_GLOBAL)
        # os.environ changes the process's environment, and the stub reads that.
        assert library_at.nvmlInit_v2 is not None

    def set(self, **figures: int) -> Self:
        """Of all together: count, init, delay_us, and what `counting` and `waiting` for events answer.

        `replaced` is when the driver was: libraries that were loaded before that are of no use from then on.
        """
        return self._put({(name,): f"{name} {value}" for name, value in figures.items()})

    def reset(self, count: int) -> Self:
        """So many GPUs as they are when nothing is said of them."""
        self._lines.clear()
        return self.set(count=count)

    def gpu(self, number: int | str, **figures: int) -> Self:
        """Figures of one GPU, or of all with "*"."""
        return self._put({(number, name): f"gpu {number} {name} {value}" for name, value in figures.items()})

    def error(self, number: int | str, code: int, function: str = "*") -> Self:
        """What a function, or every one, answers for a GPU; 0 for as usual."""
        return self._put({(number, "error", function): f"gpu {number} error {function} {code}"})

    def field(self, number: int | str, id_: int, code: int) -> Self:
        """What a field value answers."""
        return self._put({(number, "field", id_): f"gpu {number} field {id_} {code}"})

    def process(self, number: int, pid: int, size: int) -> Self:
        """A process on a GPU."""
        return self._put({(number, "process", pid): f"gpu {number} process {pid} {size}"})

    def xid(self, number: int, code: int) -> Self:
        """Something befalls a GPU."""
        return self._put({(number, "xid"): f"gpu {number} xid {code} {time.time_ns()}"})

    def hung(self) -> list[str]:
        """Of calls that take a second or more: "begun" for each, and "over" for each that is."""
        path = self.path.with_name(f"{self.path.name}.hung")
        return path.read_text().split() if path.exists() else []

    def uuid(self, number: int) -> str:
        """The stub's own."""
        return f"GPU-{number + 0xA0:08x}-1111-2222-3333-444444444444"

    def _put(self, lines: dict[tuple[Any, ...], str]) -> Self:
        self._lines |= lines
        draft = self.path.with_name(f".{self.path.name}")
        draft.write_text("".join(f"{line}\n" for line in self._lines.values()))
        draft.rename(self.path)
        return self
