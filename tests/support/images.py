"""Real OCI containers by podman, with images and volumes in a place of their own.

- the base of our image is a Debian made here: nothing is pulled
- a machine that may not raise its limits runs no container as podman configures them: a shim before runc
  lowers what is asked for to what there is
- nothing runs on the timers of a service manager here: a health check is called by its name
"""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from tests.support.workshop import ROOT, TRAIN, Workshop, do, find

BASE = "localhost/debian-with-python"
IMAGE = "localhost/sidestep"
TRAINER = "localhost/training"
WAIT_S = 120.0
_SHIM = """#!{python}
import json, os, resource, sys
NAMES = {{"RLIMIT_NOFILE": resource.RLIMIT_NOFILE, "RLIMIT_NPROC": resource.RLIMIT_NPROC}}
def lower(limits):
    for limit in limits or ():
        if limit["type"] in NAMES:
            most = resource.getrlimit(NAMES[limit["type"]])[1]
            if most != resource.RLIM_INFINITY:
                limit["hard"] = min(limit["hard"], most)
                limit["soft"] = min(limit["soft"], limit["hard"])
def rewrite(path, of):
    with open(path) as file:
        said = json.load(file)
    lower(of(said))
    with open(path, "w") as file:
        json.dump(said, file)
words = sys.argv[1:]
for at, word in enumerate(words):
    if word in ("--bundle", "-b"):
        rewrite(os.path.join(words[at + 1], "config.json"), lambda said: said["process"].get("rlimits"))
    elif word in ("--process", "-p") and "exec" in words:
        rewrite(words[at + 1], lambda said: said.get("rlimits"))
os.execv({runc!r}, [{runc!r}, *words])
"""
_TRAINER = f"""
FROM {BASE}
RUN python3 -m venv /opt/train && /opt/train/bin/pip -q install --no-cache-dir sidestep
COPY train.py /opt/train/
ENTRYPOINT ["/opt/train/bin/python", "/opt/train/train.py"]
"""
LOCKED = (
    "--read-only", "--read-only-tmpfs=false", "--tmpfs=/tmp", "--cap-drop=all", "--security-opt=no-new-privileges",
)  # fmt: skip


class Podman:
    """An engine with a store of its own; what it started is removed at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        runc = find("runc")
        assert runc is not None
        shim = folder / "runc-with-our-limits"
        shim.write_text(_SHIM.format(python=sys.executable, runc=runc))
        shim.chmod(shim.stat().st_mode | stat.S_IXUSR)
        self.words = [
            *(
                "podman",
                "--root",
                str(folder / "store"),
                "--runroot",
                str(folder / "run"),
                "--tmpdir",
                str(folder / "tmp"),
            ),
            *("--runtime", str(shim), "--cgroup-manager", "cgroupfs", "--events-backend", "file"),
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for words in (
            ("pod", "rm", "-f", "--all"),
            ("rm", "-f", "--all", "--time", "0"),
            ("volume", "rm", "-f", "--all"),
        ):
            self.run(*words)
        self.run("system", "reset", "--force")

    def do(self, *words: str, **options: Any) -> str:
        """Its output; it must succeed."""
        return do(*self.words, *words, **options).strip()

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """What it said, and how it ended."""
        return subprocess.run(
            [*self.words, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=WAIT_S
        )

    # Images

    def build(self, workshop: Workshop) -> None:
        """The base, our image by the Dockerfile as it is, and that of a training with the client alone."""
        configured = self.folder / "pip.conf"
        configured.write_text("[global]\nno-index = true\nfind-links = /wheels\n")
        mounted = ["-v", f"{workshop.wheels}:/wheels:ro", "-v", f"{configured}:/etc/pip.conf:ro"]
        how = ["build", "-q", "--format=docker", "--isolation=chroot", "--pull=never", "--network=host", *mounted]
        self.do("import", "-q", str(workshop.debian), BASE)
        dockerfile = str(ROOT / "deploy/docker/Dockerfile")
        self.do(*how, "--build-arg", f"PYTHON_IMAGE={BASE}", "-f", dockerfile, "-t", IMAGE, str(ROOT))
        context = self.folder / "trainer"
        context.mkdir()
        (context / "Dockerfile").write_text(_TRAINER)
        (context / "train.py").write_text(TRAIN)
        self.do(*how, "-t", TRAINER, str(context))

    def inspect(self, what: str, kind: str = "image") -> Mapping[str, Any]:
        """All that is known of an image or container."""
        (found,) = json.loads(self.do(kind, "inspect", what))
        assert isinstance(found, dict)
        return found

    # Containers

    def volume(self, name: str) -> Path:
        """Where a volume lies here."""
        return Path(json.loads(self.do("volume", "inspect", name))[0]["Mountpoint"])

    def processes(self, name: str) -> Sequence[psutil.Process]:
        """A container's processes, as this machine numbers them, the first one first."""
        pid = int(self.do("inspect", "--format", "{{.State.Pid}}", name))
        assert pid > 0, f"{name} does not run:\n{self.logs(name)}"
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]

    def logs(self, name: str) -> str:
        """What it said."""
        done = self.run("logs", name)
        return (done.stdout + done.stderr)[-4000:]

    def exit_code(self, name: str) -> int:
        """Once it has ended."""
        return int(self.do("wait", name))
