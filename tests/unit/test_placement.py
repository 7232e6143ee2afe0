"""Where the databases of a run lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sidestepd import placement
from sidestepd.spool import Spool
from tests.support.spools import everything_in, filled, frame, stored


def mounted(*points: tuple[Path, str]) -> str:
    """What the kernel says of these mounts, above an ext4."""
    lines = ["27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw"]
    lines += [f"{40 + at} 27 0:{at} / {point} rw - {kind} server:/x rw" for at, (point, kind) in enumerate(points)]
    return "\n".join(lines)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "shared" / "20260101-120000-abcd"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def local(tmp_path: Path) -> Path:
    path = tmp_path / "local"
    path.mkdir()
    return path


class TestFileSystem:
    def test_is_that_of_the_nearest_mount(self, tmp_path: Path):
        text = mounted((tmp_path, "nfs4"), (tmp_path / "scratch", "xfs"))

        kinds = [placement.file_system(tmp_path / name, text) for name in ("home", "scratch/deep", "../elsewhere")]

        assert ["nfs4", "xfs", "ext4"] == kinds

    def test_is_the_one_mounted_last_at_one_place(self, tmp_path: Path):
        assert "tmpfs" == placement.file_system(tmp_path, mounted((tmp_path, "nfs"), (tmp_path, "tmpfs")))

    def test_is_found_at_a_name_with_a_space(self, tmp_path: Path):
        text = mounted((tmp_path / r"my\040disk", "lustre"))

        assert "lustre" == placement.file_system(tmp_path / "my disk" / "run", text)

    def test_is_that_of_where_a_link_leads(self, tmp_path: Path):
        (tmp_path / "link").symlink_to(tmp_path / "far")

        assert "gpfs" == placement.file_system(tmp_path / "link" / "run", mounted((tmp_path / "far", "gpfs")))

    @pytest.mark.parametrize(
        "kind", ["nfs", "nfs4", "lustre", "gpfs", "9p", "ceph", "fuse.sshfs", "fuse", "virtiofs"]
    )
    def test_of_a_network_is_known(self, kind: str):
        assert placement.is_network(kind)

    @pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs", "fuseblk", ""])
    def test_of_this_machine_is_known(self, kind: str):
        assert not placement.is_network(kind)


class TestChoice:
    def choose(self, run_dir: Path, *points: tuple[Path, str], **environ: str) -> Path:
        return placement.choose(run_dir, environ=environ, mounts=mounted(*points))

    def test_is_the_run_directory_on_a_local_disk(self, run_dir: Path, local: Path):
        assert run_dir == self.choose(run_dir, SLURM_TMPDIR=str(local))

    def test_is_the_jobs_own_local_disk_when_the_run_directory_is_on_a_network(self, run_dir: Path, local: Path):
        place = self.choose(run_dir, (run_dir.parent, "lustre"), SLURM_TMPDIR=str(local), TMPDIR="/tmp")

        assert local in place.parents
        assert run_dir.name in place.name

    def test_passes_over_what_is_on_a_network_or_not_there(self, run_dir: Path, local: Path):
        nfs = [(run_dir.parent, "nfs")]
        environ = {"SLURM_TMPDIR": str(run_dir.parent), "TMPDIR": str(local)}

        assert local in self.choose(run_dir, *nfs, **environ).parents
        assert local in self.choose(run_dir, *nfs, **{**environ, "SLURM_TMPDIR": "/not/there"}).parents

    def test_prefers_a_disk_to_memory(self, run_dir: Path, local: Path):
        points = [(run_dir.parent, "nfs"), (local, "tmpfs")]

        assert Path("/var/tmp") in self.choose(run_dir, *points, TMPDIR=str(local)).parents

    def test_takes_memory_when_there_is_nothing_else(self, run_dir: Path, local: Path):
        points = [(Path("/"), "nfs"), (local, "tmpfs")]

        assert local in self.choose(run_dir, *points, TMPDIR=str(local)).parents

    def test_is_the_run_directory_when_everything_is_on_a_network(self, run_dir: Path):
        assert run_dir == self.choose(run_dir, (Path("/"), "nfs"))

    def test_is_what_was_asked_for(self, run_dir: Path, local: Path):
        assert local == placement.choose(run_dir, local).parent

    def test_of_two_runs_of_one_name_differs(self, tmp_path: Path, local: Path):
        one, other = (placement.choose(tmp_path / base / "run", local) for base in "ab")

        assert one != other


class TestMoving:
    def test_a_local_run_directory_says_nothing_and_stays(self, run_dir: Path):
        assert run_dir == placement.settle(run_dir)
        assert run_dir == placement.home(run_dir)
        assert [] == list(run_dir.iterdir())

    def test_everybody_is_told_where_it_is(self, run_dir: Path, local: Path):
        place = placement.settle(run_dir, local)

        assert place == placement.home(run_dir)
        assert 0o700 == place.stat().st_mode & 0o777

    def test_it_comes_home_whole_and_leaves_nothing_behind(self, run_dir: Path, local: Path):
        place = placement.settle(run_dir, local)
        before = everything_in(filled(place / placement.SPOOL))

        placement.bring_home(run_dir)

        assert run_dir == placement.home(run_dir)
        assert before == everything_in(run_dir / placement.SPOOL)
        assert [] == list(local.iterdir())

    def test_it_is_taken_from_home_the_next_time(self, run_dir: Path, local: Path):
        before = everything_in(filled(run_dir / placement.SPOOL))

        place = placement.settle(run_dir, local)

        assert before == everything_in(place / placement.SPOOL)
        assert not (run_dir / placement.SPOOL).exists()

    def test_it_stays_where_it_is_after_a_kill_whatever_is_asked_for(
        self, run_dir: Path, local: Path, tmp_path: Path
    ):
        place = placement.settle(run_dir, local)
        filled(place / placement.SPOOL)

        assert place == placement.settle(run_dir, tmp_path / "another")

    def test_without_the_disk_that_it_was_on_it_begins_anew(self, run_dir: Path, local: Path, tmp_path: Path):
        """Another machine: what was not delivered is lost, and a start succeeds."""
        lost = placement.settle(run_dir, local)
        lost.rmdir()

        place = placement.settle(run_dir, tmp_path / "another")

        assert place != lost
        assert place == placement.home(run_dir)

    def test_what_was_put_aside_comes_home_too(self, run_dir: Path, local: Path):
        place = placement.settle(run_dir, local)
        filled(place / placement.SPOOL)
        (place / "quarantine" / "spool-1").mkdir(parents=True)
        (place / "spool.db.damaged").touch()

        placement.bring_home(run_dir)

        assert (run_dir / "quarantine" / "spool-1").is_dir()
        assert (run_dir / "spool.db.damaged").exists()

    def test_a_home_that_can_not_be_written_changes_nothing(self, run_dir: Path, local: Path):
        place = placement.settle(run_dir, local)
        before = everything_in(filled(place / placement.SPOOL))
        (run_dir / f".{placement.SPOOL}.draft").mkdir()

        placement.bring_home(run_dir)

        assert place == placement.home(run_dir)
        assert before == everything_in(place / placement.SPOOL)

    def test_a_place_that_can_not_be_read_is_the_run_directory(self, run_dir: Path):
        (run_dir / "spool.json").write_text("{")

        assert run_dir == placement.home(run_dir)

    def test_a_commit_in_the_log_comes_along(self, run_dir: Path, local: Path):
        """The writer was killed: part of the spool is in its write-ahead log alone."""
        place = placement.settle(run_dir, local)
        spool = Spool(place / placement.SPOOL)
        spool.commit([frame(0)], [stored(10)])
        spool._db.close()

        placement.bring_home(run_dir)

        assert [0] == [entry.first for entry in everything_in(run_dir / placement.SPOOL)]
        assert json.loads((run_dir / "spool.json").read_text()) == {"dir": None}
