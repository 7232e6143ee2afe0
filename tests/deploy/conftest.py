"""The workshop of a session: what takes long is made once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.images import Podman
from tests.support.workshop import Workshop, need


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    kept = os.environ.get("SIDESTEP_TEST_WORKSHOP")
    return Workshop(Path(kept) if kept else tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="session")
def podman(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    """An engine that has our image."""
    need("podman", "runc", root=True)
    with Podman(tmp_path_factory.mktemp("podman")) as podman:
        podman.build(workshop)
        yield podman
