"""The workshop of a session: what takes long is made once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.workshop import Workshop


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    kept = os.environ.get("SIDESTEP_TEST_WORKSHOP")
    return Workshop(Path(kept) if kept else tmp_path_factory.mktemp("workshop"))
