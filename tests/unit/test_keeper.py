"""What is told of a delivery that does not get going."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidestepd.keeper import last_words

FAILED = """\
2026-01-01 ERROR sidestepd.delivery: delivery ends, and will be started again
Traceback (most recent call last):
  File "first.py", line 1, in main
KeyError: 'first'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "second.py", line 1, in main
    raise Fatal
sidestepd.errors.Fatal: wandb-core
  is gone
"""


class TestLastWords:
    @pytest.mark.parametrize(
        ("text", "words"),
        [
            (FAILED, "sidestepd.errors.Fatal: wandb-core is gone"),
            ("one\ntwo\n\n", "two"),
            ("", ""),
            ("Traceback (most recent call last):\n  File", ""),
            ("x" * 20_000, "x" * 300),
        ],
    )
    def test_they_are_its_last_exception_or_its_last_line(self, tmp_path: Path, text: str, words: str):
        (tmp_path / "log").write_text(text)

        assert words == last_words(tmp_path / "log")

    def test_a_log_that_is_not_there_says_nothing(self, tmp_path: Path):
        assert "" == last_words(tmp_path / "log")
