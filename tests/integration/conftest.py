"""Runs that are served for one test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemons import Serve, ServedRun


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    made: list[ServedRun] = []

    def make(*, start: bool = True, crash_at: str | None = None, **options: Any) -> ServedRun:
        served = ServedRun(tmp_path, **options)
        made.append(served)
        return served.start(crash_at=crash_at) if start else served

    yield make
    for served in made:
        served.__exit__(None, None, None)
