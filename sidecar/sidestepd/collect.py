"""Take in what workers left in spill files: they ended, or were killed, while nobody listened.

- it is handed to intake through intake's own socket, so that it meets the same gate as everything else; a file
  goes when intake has committed all of it
- a file whose session lives is locked, and left alone
- a run is not closed while a file of it waits; one that can not be taken is said and left where it is
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from sidestep.collect import Collected, collect
from sidestep.endpoint import Endpoint
from sidestep.errors import SettingsError
from sidestep.spill import folder_of_run, is_free, private_folder, waiting
from sidestepd.control import Control, endpoint_at
from sidestepd.errors import ExitCode

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
ANSWER_S = 5.0


class Collector:
    """Looks for files of one run, in its directory and in this node's temporary one, and hands them to intake."""

    def __init__(self, run_dir: Path, address: str, run: str) -> None:
        self._own, self._private = folder_of_run(run_dir), private_folder()
        self._address, self._run = address, run
        self._passed_over: set[Path] = set()
        self._thread: threading.Thread | None = None
        self._next_look = 0.0
        self.collected = 0
        """Records that were taken in."""

    def tend(self, now: float) -> None:
        """Called often, with the monotonic time; starts to take in what waits."""
        if now >= self._next_look and not self._collecting:
            self._next_look = now + LOOK_EVERY_S
            if files := self._files():
                self._thread = threading.Thread(target=self._collect, args=(files,), name="collect", daemon=True)
                self._thread.start()

    def anything_left(self, now: float) -> bool:
        """Whether something of an ended session is still to be taken in; sees to it."""
        if self._collecting:
            return True
        self._next_look = 0.0
        self.tend(now)
        return self._collecting

    @property
    def _collecting(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _files(self) -> list[Path]:
        """Files whose sessions have ended."""
        return [
            path
            for folder in (self._own, self._private)
            for path in waiting(folder)
            if path not in self._passed_over and is_free(path)
        ]

    def _collect(self, files: Sequence[Path]) -> None:
        try:
            for path in files:
                ours = path.parent == self._own
                for one in collect([path], Endpoint(address=self._address), run=self._run, any_run=ours):
                    self._note(one)
        except Exception:
            logger.exception("spill files could not be collected")
            self._passed_over.update(files)

    def _note(self, one: Collected) -> None:
        if one.why == "":
            self.collected += one.records
            logger.info("collected %d records from %s", one.records, one.path)
            return
        self._passed_over.add(one.path)
        if one.why is not None:
            logger.warning("%s can not be collected and stays where it is: %s", one.path, one.why)


@click.command("collect")
@click.option("--address", help="Where a daemon listens; by default that of SIDESTEP_ADDRESS.")
@click.option("--key-file", metavar="FILE", type=click.Path(path_type=Path), envvar="SIDESTEP_KEY_FILE",
              help="Our key, for a daemon on tcp that asks for one.")  # fmt: skip
@click.option("--any", "any_run", is_flag=True, help="Also what belongs to another run, or to none.")
@click.option("--run", "run_id", metavar="ID", help="Only what belongs to the run of this id.")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), required=False)
def command(
    folder: Path | None, address: str | None, key_file: Path | None, any_run: bool, run_id: str | None
) -> None:
    """Hand on to a daemon what workers kept on disk.

    \b
    sidestep collect RUN_DIR/spill
    sidestep run -- sidestep collect --any
    sidestep collect --run ID --address ipc:///run/sidestep/train/daemon.sock

    A worker that can not reach its daemon keeps its records in its run's
    directory, or in FOLDER, by default the one that this user's workers use on
    this node. The daemon of a run collects them by itself, and so does the next
    worker of that run on that node. This is for when neither comes: the second
    line makes a new run of them, the third has a service go on with one. Files
    are removed once all of them is on the daemon's disk. The exit code is 75 if
    something is left.
    """
    address = address or os.environ.get("SIDESTEP_ADDRESS")
    try:
        endpoint = endpoint_at(address, key_file) if address else None
    except SettingsError as error:
        _say(str(error))
        sys.exit(2)
    sys.exit(_collect_here(folder or private_folder(), endpoint, any_run, run_id, _say))


def _collect_here(
    folder: Path, endpoint: Endpoint | None, any_run: bool, run_id: str | None, say: Callable[[str], object]
) -> int:
    files = waiting(folder)
    if not files:
        say(f"there is nothing in {folder}")
        return 0
    if endpoint is None:
        say("no daemon is known: say --address, or `sidestep run -- sidestep collect`")
        return ExitCode.UNAVAILABLE
    if (run := _run_at(endpoint)) is None:
        say(f"nobody answers at {endpoint}")
        return ExitCode.UNAVAILABLE
    done = collect(files, endpoint, run=run_id or run, any_run=any_run)
    if run_id:
        done = [one for one in done if one.why is not None]
    for one in done:
        say(f"{one.path}: {_words(one)}")
    return 0 if all(one.why == "" for one in done) else ExitCode.INTERRUPTED


def _run_at(endpoint: Endpoint) -> str | None:
    with Control(endpoint) as control:
        deadline = time.monotonic() + ANSWER_S
        while time.monotonic() < deadline:
            if (answer := control.ask_status()) is not None:
                return str(answer.get("run", {}).get("id", ""))
    return None


def _words(one: Collected) -> str:
    if one.why is None:
        return "passed over: its worker lives, or it is of another run (--any), or no spill file of ours"
    return f"{one.records} records collected" if one.why == "" else one.why


def _say(text: str) -> None:
    click.echo(f"sidestep: {text}", err=True)
