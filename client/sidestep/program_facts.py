"""What a training is: program, arguments, git commit and difference, packages, machine.

    python -m sidestep.program_facts < what the worker knows of itself > what there is to know

- what can not be found out is left out
- passwords in the address of a git remote are left out
"""

from __future__ import annotations

import contextlib
import getpass
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MOST_BYTES = 192 * 1024
"""Of one file: it travels in one record."""
GIT_S = 10.0
REQUIREMENTS, PATCH, CODE = "requirements.txt", "diff.patch", "code"


def main() -> None:
    """Answer on standard output with what the records say."""
    with contextlib.suppress(OSError):  # a sandbox may forbid it
        os.nice(19)
    asked = json.load(sys.stdin)
    directory = Path(asked["directory"])
    root = _git(directory, "rev-parse", "--show-toplevel") if asked.get("git", True) else None
    program = _program(asked["argv"], directory)
    facts = {
        "os": platform.platform(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "args": asked["argv"][1:],
        "program": str(program) if program else (asked["argv"] or [""])[0],
        "host": platform.node(),
        "username": _user(),
        "cpu_count": os.cpu_count(),
        "cuda_version": asked.get("cuda"),
        "root": root or str(directory),
        "code_path": _below(program, Path(root) if root else directory),
    }
    if root:
        facts["git"] = {
            "commit": _git(directory, "rev-parse", "HEAD"),
            "remote": without_password(_git(directory, "remote", "get-url", "origin") or ""),
        }
    files = {}
    if asked.get("requirements", True):
        files[REQUIREMENTS] = requirements()
    if root:
        files[PATCH] = _git(Path(root), "diff", "HEAD", "--submodule=diff") or ""
    if asked.get("code") and program and facts["code_path"]:
        files[f"{CODE}/{facts['code_path']}"] = program.read_text(errors="replace")
    left_out = [name for name, text in files.items() if len(text.encode()) > MOST_BYTES]
    said: list[dict[str, Any]] = [{"facts": {**_given(facts), **({"left_out": left_out} if left_out else {})}}]
    said += [{"file": name, "text": text} for name, text in files.items() if text and name not in left_out]
    json.dump(said, sys.stdout)


def requirements() -> str:
    """The installed packages, as pip would list them."""
    found: dict[str, str] = {}
    for package in importlib.metadata.distributions():
        name = package.metadata["Name"]
        if name:
            found.setdefault(name.lower(), f"{name}=={package.version}")
    return "".join(f"{found[name]}\n" for name in sorted(found))


def without_password(remote: str) -> str:
    """The address of a git remote, without what is only its user's."""
    return re.sub(r"^(\w+://)[^/@]*@", r"\1", remote)


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=GIT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    text = done.stdout.decode("utf-8", "replace")
    return text if arguments[0] == "diff" else text.strip()


def _program(argv: list[str], directory: Path) -> Path | None:
    path = directory / (argv or [""])[0]
    return path.resolve() if path.is_file() else None


def _below(program: Path | None, root: Path) -> str | None:
    if program is None:
        return None
    return str(program.relative_to(root)) if program.is_relative_to(root) else program.name


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return None


def _given(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: it for name, it in facts.items() if it not in (None, "")}


if __name__ == "__main__":
    main()
