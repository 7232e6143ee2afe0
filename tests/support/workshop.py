"""What the deployment tests are made of: wheels, a small Debian, a training, and what a run holds in the end.

- where packages come from is asked of this machine's own pip and apt, and is written nowhere
- SIDESTEP_TEST_WORKSHOP names a directory that is kept, so that the next time takes seconds; else all is made anew
- what can not be had is a skip that says which package has it
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidestep.errors import SidestepError
from sidestepd import status
from sidestepd.sinks import wandb_log

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
SUITE = "bookworm"
IN_THE_BASE = (
    "systemd", "systemd-sysv", "dbus", "dbus-user-session", "libpam-systemd", "python3", "python3-venv", "procps",
    "ca-certificates",
)  # fmt: skip
HAS = {
    "systemd-nspawn": "systemd-container",
    "systemd-analyze": "systemd",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "ip": "iproute2",
    "iptables": "iptables",
    "cc": "gcc libc6-dev",
    "mmdebstrap": "mmdebstrap",
    "podman": "podman",
    "runc": "runc",
    "shellcheck": "shellcheck",
    "fsfreeze": "util-linux",
    "mkfs.ext4": "e2fsprogs",
}
TRAIN = """
import sys, time
from pathlib import Path
import sidestep
until, id_, least = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
run = sidestep.init(id=id_, project="deployed")
step = 0
while step < least or not until.exists():
    run.log({"loss": 1 / (step + 1)}, step=step)
    step += 1
    time.sleep(0.01)
run.finish(timeout=60)
print(step, flush=True)
"""
"""Logs until a file appears, and at least so many steps; says how many steps that were."""


def need(*tools: str, root: bool = False) -> None:
    """Skip, with the reason, unless these programs are here."""
    missing = [tool for tool in tools if find(tool) is None]
    if missing:
        pytest.skip(not_here(missing))
    if root and os.geteuid() != 0:
        pytest.skip("needs root")


def not_here(missing: Sequence[str]) -> str:
    """That these programs are not, and which packages have them."""
    packages = " ".join(dict.fromkeys(HAS[tool] for tool in missing if tool in HAS))
    how = f"apt-get install {packages}" if packages else "pip install -e '.[deploy-test]'"
    return f"no {', '.join(missing)} here: {how}"


def kustomized(overlay: Path) -> list[dict[str, Any]]:
    """All manifests of an overlay of Kubernetes, as `kubectl apply -k` would send them."""
    need("kubectl")
    told = do("kubectl", "version", "--client", "--output=json")
    if "kustomizeVersion" not in told:  # nor components, nor half of the fields
        pytest.skip("kubectl is older than 1.24 here: pip install -e '.[deploy-test]'")
    return [one for one in yaml.safe_load_all(do("kubectl", "kustomize", overlay)) if one]


def blocks(page: Path, heading: str) -> list[str]:
    """The blocks of code on a page of ours under a heading."""
    found: list[str] = []
    under = inside = False
    for line in page.read_text().splitlines(keepends=True):
        if line.startswith("```"):
            inside = not inside
            found += [""] if inside and under else []
        elif inside and under:
            found[-1] += line
        elif not inside and line.startswith("#"):
            under = line.strip() == heading
    return found


def find(tool: str) -> str | None:
    """Where a program is: beside this Python, in the path, or where administrators have theirs."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    return shutil.which(tool, path=path)


def do(*words: str | Path, **options: object) -> str:
    """Run a command; its output, or an AssertionError with all it said."""
    program, *rest = map(str, words)
    done = subprocess.run(
        [find(program) or program, *rest], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=600, **options,  # type: ignore[call-overload]
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(map(str, words))}: {done.returncode}\n{done.stdout[-6000:]}"
    return str(done.stdout)


class Workshop:
    """Makes things once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._fresh: Path | None = None

    @property
    def wheels(self) -> Path:
        """A directory with this tree's own wheel, and those of all it needs, to build it too."""
        folder = self.folder / "wheels"
        if self._fresh is None:
            needed = (f"{ROOT}[daemon]", "hatchling>=1.25")
            pip("wheel", "--quiet", "--wheel-dir", str(folder), "--find-links", str(folder), *needed)
            self._fresh = folder
        return folder

    @property
    def debian(self) -> Path:
        """An archive of a Debian with systemd and Python."""
        return self._system("debian", IN_THE_BASE)

    @property
    def slurm(self) -> Path:
        """The same with SLURM: controller, node, and what users have."""
        return self._system("slurm", (*IN_THE_BASE, "slurm-wlm", "munge"))

    def launcher(self, package: str) -> Path:
        """Where the programs of a package from the Python registry are: an environment made for it alone."""
        folder = self.folder / package.partition("[")[0]
        if not (folder / "made").exists():
            do(sys.executable, "-m", "venv", folder)
            try:
                do(
                    folder / "bin/python",
                    "-m",
                    "pip",
                    "--quiet",
                    "--disable-pip-version-check",
                    "install",
                    package,
                )
            except AssertionError as error:
                pytest.skip(f"no {package} here: pip install {package}: {str(error)[-200:]}")
            (folder / "made").touch()
        return folder / "bin"

    def _system(self, name: str, packages: Sequence[str]) -> Path:
        archive = self.folder / f"{name}.tar"
        if not archive.exists():
            need("mmdebstrap", root=True)
            sources = self.folder / "sources.list"
            sources.write_text(apt_sources())
            draft = archive.with_name("draft.tar")
            what = f"--include={','.join(packages)}"
            do("mmdebstrap", "--quiet", "--variant=minbase", what, SUITE, draft, sources)
            draft.rename(archive)
        return archive


def pip(*words: str) -> None:
    """This environment's pip, as it is configured."""
    do(sys.executable, "-m", "pip", "--disable-pip-version-check", *words)


def apt_sources() -> str:
    """Where this machine's own apt has Debian from."""
    line = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $(REPO_URI) $(CODENAME) $(COMPONENT)"
    told = do("apt-get", "indextargets", "--format", f"$(ORIGIN)|$(CODENAME)|{line}", "Created-By: Packages")
    found = sorted({line.split("|", 2)[2] for line in told.splitlines() if line.startswith(f"Debian|{SUITE}")})
    if not found:
        pytest.skip(f"apt knows no Debian {SUITE} here")
    return "\n".join(found) + "\n"


def unpack(archive: Path, folder: Path) -> Path:
    """A tree of its own."""
    folder.mkdir(parents=True)
    do("tar", "--numeric-owner", "-xf", archive, "-C", folder)
    return folder


# What a run holds


def runs_in(folder: Path) -> dict[str, status.Report]:
    """The runs under a directory that can be read now, by their ids."""
    found = {}
    for path in folder.glob("sidestep-runs/*/run.json"):
        with contextlib.suppress(OSError, sqlite3.Error, SidestepError):  # it is just being made
            report = status.report(path.parent)
            found[report.run.id] = report
    return found


def rows_in(folder: Path, id_: str) -> int:
    """How many rows of a run are in it for good; 0 while there is no run."""
    report = runs_in(folder).get(id_)
    return report.rows if report else 0


def is_finished(folder: Path, id_: str) -> bool:
    """Whether a run is."""
    report = runs_in(folder).get(id_)
    return report is not None and report.state == "finished"


def steps_in(run_dir: Path) -> list[int]:
    """The steps that the run holds, in their order."""
    return [row["global_step"] for row in rows_of(run_dir)]


def rows_of(run_dir: Path) -> list[Mapping[str, Any]]:
    """The rows that the run's `.wandb` files hold, over all segments in their order."""
    return [row.values for path in wandb_log.segments(run_dir / "wandb") for row in wandb_log.history(path)]


def run_dir_in(folder: Path, id_: str) -> Path:
    """Where the run of this id lies."""
    (found,) = folder.glob(f"sidestep-runs/*-{id_}")
    return found


def assert_whole(folder: Path, id_: str, steps: int) -> status.Report:
    """Every step is in the run once and in order, and the ledger balances."""
    run_dir = run_dir_in(folder, id_)
    report = status.report(run_dir)
    ledger = report.ledger
    assert list(range(steps)) == steps_in(run_dir)
    found = (report.state, ledger.balances, ledger.pending, ledger.unknown)
    assert ("finished", True, 0, 0) == found, f"{found}: {report}"
    lost = _counted(ledger.dropped), _counted(ledger.rejected)
    assert ({}, {}) == lost, f"{lost}: {report}"
    assert ledger.delivered >= steps  # and what the program and its machine are
    return report


def _counted(reasons: object) -> dict[str, int]:
    assert isinstance(reasons, dict)
    return {reason: count for reason, count in reasons.items() if count}


def lines(words: Sequence[str]) -> str:
    """For a file."""
    return "\n".join(words) + "\n"
