"""Where the W&B key comes from."""

from __future__ import annotations

import logging
from pathlib import Path

from sidestepd import credentials


def taken(folder: Path, **environ: str) -> str | None:
    found = {"CREDENTIALS_DIRECTORY": str(folder), **environ}
    credentials.take(found)
    return found.get("WANDB_API_KEY")


def test_the_key_is_in_the_directory_of_credentials(tmp_path):
    (tmp_path / "wandb_api_key").write_text("secret\n")

    assert "secret" == taken(tmp_path)


def test_a_key_in_the_environment_is_stronger(tmp_path):
    (tmp_path / "wandb_api_key").write_text("secret\n")

    assert "mine" == taken(tmp_path, WANDB_API_KEY="mine")


def test_an_empty_file_or_none_is_no_key(tmp_path):
    assert taken(tmp_path) is None

    (tmp_path / "wandb_api_key").write_text("\n")

    assert taken(tmp_path) is None


def test_a_file_that_can_not_be_read_is_said_and_not_shown(tmp_path, caplog):
    (tmp_path / "wandb_api_key").mkdir()

    with caplog.at_level(logging.WARNING):
        assert taken(tmp_path) is None

    assert "can not be read: [Errno 21] Is a directory" in caplog.text
