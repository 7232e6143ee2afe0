"""Where the file system clones, a file that was taken has no future: a real XFS, and what is sent from it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from sidestep import snapshot
from sidestepd.artifacts import DELIVERED
from tests.support.chaos import Training
from tests.support.disks import disk_of_clones

pytestmark = pytest.mark.nightly

SCRIPT = """
import os, sys, sidestep
run, path = sidestep.init(), sys.argv[1]
artifact = sidestep.Artifact("model", "model")
artifact.add_file(path)
run.log_artifact(artifact)
with open(path, "r+b") as file:  # the next checkpoint, over this one
    file.write(b"2" * os.path.getsize(path))
run.finish()
"""


class TestAClone:
    def test_keeps_what_is_written_over_and_needs_no_room_and_no_name(self, tmp_path: Path):
        with disk_of_clones(tmp_path / "disk", tmp_path / "image") as disk:
            path = disk / "model"
            path.write_bytes(b"1" * (64 << 20))
            os.sync()
            free = os.statvfs(disk).f_bfree

            opened = snapshot.take(path)

            assert opened.cloned
            assert ["model"] == [it.name for it in disk.iterdir()]
            assert free - os.statvfs(disk).f_bfree < 64
            path.write_bytes(b"2")
            assert opened.file is not None
            assert b"1" * 100 == os.pread(opened.file, 100, 63 << 20)
            opened.close()

    def test_is_what_arrives_of_a_checkpoint_that_is_written_over_in_place(self, tmp_path: Path):
        with disk_of_clones(tmp_path / "disk", tmp_path / "image") as disk:
            path = disk / "model"
            path.write_bytes(b"1" * (17 << 20))
            with Training(tmp_path, [sys.executable, "-c", SCRIPT, str(path)], sink="jsonl") as run:
                assert 0 == run.wait()

            assert {"delivered": 1, "left_out": {}} == {
                name: run.report().artifacts[name] for name in (DELIVERED, "left_out")
            }
            (kept,) = (it for it in run.run_dir.rglob("*") if it.is_file() and it.stat().st_size == 17 << 20)
            assert {b"1"} == {kept.read_bytes()[at : at + 1] for at in range(0, 17 << 20, 1 << 16)}
