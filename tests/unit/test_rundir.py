"""Where a run lives: whose directories, which addresses, and what the directory says of itself."""

from __future__ import annotations

import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidestep.errors import SettingsError
from sidestepd.config import Config
from sidestepd.rundir import (
    MAX_IPC_PATH_BYTES,
    RunFile,
    check_address,
    lay_out,
    make_private,
    new_id,
    new_run_dir,
    newest_run_dir,
    private_address,
    with_run_id,
)

NOON = 1_800_000_000.0


def options(folder: Path, **environ: str) -> Config:
    return with_run_id(Config.load(environ={"WANDB_DIR": str(folder), **environ}))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


class TestRunDirectory:
    def test_where_the_current_directory_was_deleted_it_is_said(self, tmp_path, monkeypatch):
        gone = tmp_path / "gone"
        gone.mkdir()
        monkeypatch.chdir(gone)
        gone.rmdir()

        with pytest.raises(SettingsError, match="was deleted: say --dir"):
            new_run_dir(with_run_id(Config.load(environ={})), now=NOON)

    def test_it_is_for_nobody_else(self, tmp_path):
        config = options(tmp_path)
        run_dir = new_run_dir(config, now=NOON)

        lay_out(run_dir, config, RunFile.of(config, run_dir, "ipc:///x.sock"))

        assert (0o700, 0o700) == (mode(run_dir), mode(run_dir / "logs"))

    def test_it_says_what_the_run_is(self, tmp_path):
        config = options(tmp_path, WANDB_RUN_ID="abcd1234", WANDB_PROJECT="digits", WANDB_TAGS="a,b")
        run_dir = new_run_dir(config, now=NOON)
        run = RunFile.of(config, run_dir, "ipc:///x.sock")

        lay_out(run_dir, config, run)

        assert run == RunFile.read(run_dir)
        assert ("abcd1234", "digits", ("a", "b"), "running") == (run.id, run.project, run.tags, run.state)
        assert config == Config.from_json((run_dir / "config.json").read_bytes())

    def test_one_that_is_there_is_not_taken_for_a_new_one(self, tmp_path):
        config = options(tmp_path)
        run_dir = new_run_dir(config, now=NOON)
        run_dir.mkdir(parents=True)

        with pytest.raises(SettingsError, match="is there already"):
            lay_out(run_dir, config, RunFile.of(config, run_dir, "ipc:///x.sock"))

    def test_where_none_can_be_made_the_option_is_named(self, tmp_path):
        (tmp_path / "file").write_text("")
        config = options(tmp_path / "file")

        with pytest.raises(SettingsError, match=r"run\.dir = .*file \(from WANDB_DIR\): Not a directory"):
            lay_out(new_run_dir(config, now=NOON), config, RunFile(id="x"))

    def test_the_newest_is_the_one_that_began_last(self, tmp_path):
        for now in (NOON + 60, NOON + 3600, NOON):
            config = options(tmp_path)
            run_dir = new_run_dir(config, now=now)
            lay_out(run_dir, config, RunFile.of(config, run_dir, "ipc:///x.sock"))

        newest = newest_run_dir(tmp_path)

        assert newest is not None
        assert new_run_dir(config, now=NOON + 3600).name[:15] == newest.name[:15]

    def test_a_file_of_a_later_release_is_read_as_far_as_it_is_known(self, tmp_path):
        (tmp_path / "run.json").write_text('{"id": "abcd1234", "invented_later": 1}')

        assert RunFile(id="abcd1234") == RunFile.read(tmp_path)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"id": '])
    def test_a_file_that_says_nothing_is_refused(self, tmp_path, text):
        (tmp_path / "run.json").write_text(text)

        with pytest.raises(SettingsError, match=r"run\.json can not be read"):
            RunFile.read(tmp_path)

    def test_made_up_ids_look_like_those_of_wandb_and_differ(self):
        ids = {new_id() for _ in range(100)}

        assert 100 == len(ids)
        assert all(len(id_) == 8 and id_.isalnum() and id_ == id_.lower() for id_ in ids)


class TestPrivateAddress:
    @pytest.fixture
    def short(self) -> Iterator[Path]:
        """A directory whose path leaves room for a socket's."""
        with tempfile.TemporaryDirectory(dir="/tmp") as folder:
            yield Path(folder)

    def test_it_lies_in_a_directory_for_nobody_else(self, short):
        address = private_address(Path("/runs/20260101-120000-abcd1234"), {"XDG_RUNTIME_DIR": str(short)})

        folder = Path(address.removeprefix("ipc://")).parent
        assert short == folder.parent
        assert 0o700 == mode(folder)

    def test_two_runs_of_one_name_have_two(self, short):
        environ = {"XDG_RUNTIME_DIR": str(short)}

        addresses = {
            private_address(Path(folder) / "20260101-120000-abcd1234", environ) for folder in ("/a", "/b")
        }

        assert 2 == len(addresses)

    def test_a_long_runtime_directory_is_passed_over(self, tmp_path):
        long = tmp_path / ("x" * 100)
        long.mkdir()

        address = private_address(Path("/runs/20260101-120000-abcd1234"), {"XDG_RUNTIME_DIR": str(long)})

        assert not address.startswith(f"ipc://{long}")
        assert len(address.removeprefix("ipc://")) <= MAX_IPC_PATH_BYTES

    def test_a_runtime_directory_that_is_not_there_is_passed_over(self, tmp_path):
        address = private_address(Path("/runs/x"), {"XDG_RUNTIME_DIR": str(tmp_path / "gone")})

        assert not address.startswith(f"ipc://{tmp_path / 'gone'}")

    def test_a_directory_that_is_open_to_others_is_refused(self, tmp_path):
        folder = tmp_path / "open"
        folder.mkdir()
        folder.chmod(0o755)

        with pytest.raises(SettingsError, match="is open to others"):
            make_private(folder)

    def test_a_link_that_someone_laid_out_is_refused(self, tmp_path):
        (tmp_path / "mine").mkdir(mode=0o700)
        (tmp_path / "link").symlink_to(tmp_path / "mine")

        with pytest.raises(SettingsError, match="is no directory"):
            make_private(tmp_path / "link")


class TestGivenAddress:
    @pytest.mark.parametrize("address", ["ipc:///tmp/x.sock", "tcp://127.0.0.1:5555", "tcp://[::1]:5555"])
    def test_one_that_only_this_machine_reaches_is_taken(self, address):
        assert check_address(address) is None

    @pytest.mark.parametrize(
        ("address", "why"),
        [
            ("tcp://0.0.0.0:5555", "nothing there would ask who is speaking"),
            ("tcp://*:5555", "nothing there would ask who is speaking"),
            ("tcp://127.0.0.1:0", "say ipc://"),
            ("tcp://127.0.0.1:*", "say ipc://"),
            ("ipc://relative.sock", "say ipc://"),
            ("ipc:///no/such/folder/x.sock", "there is no directory /no/such/folder"),
            ("ipc:///tmp/" + "x" * 103, "at most 107 bytes"),
            ("inproc://x", "say ipc://"),
            ("", "say ipc://"),
        ],
    )
    def test_any_other_is_refused_in_words(self, address, why):
        with pytest.raises(SettingsError, match=why):
            check_address(address)
