"""`make demo`: a real DDP training and its evaluation, in one run that is whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

DEMO = Path(__file__).parents[2] / "client" / "examples" / "demo.py"


def test_the_demo_shows_one_whole_run(tmp_path: Path):
    """demo.py checks the run itself, row by row, and ends with 1 if anything is missing."""
    done = subprocess.run(
        [sys.executable, str(DEMO), "--dir", str(tmp_path)], capture_output=True, text=True, check=False
    )

    assert (0, "") == (done.returncode, "".join(line for line in done.stderr.splitlines() if "demo:" in line))
    assert "eval/accuracy" in done.stdout
