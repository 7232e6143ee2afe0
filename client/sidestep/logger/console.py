"""`UnifiedLogger`: one place to say things, which go to the console and into a rotating file.

- the console is rich's where rich is installed and writes to a terminal, else plain lines
- ranks other than 0 have files of their own, and say on the console only what is a warning or worse
- a file that can not be written is said once, and the training goes on
"""

from __future__ import annotations

import importlib
import logging
import logging.handlers
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from sidestep import convert, ranks
from sidestep.errors import SettingsError, UnsupportedValue
from sidestep.logger.progress import Bar, Lines, Progress

FORMAT = "%(asctime)s %(levelname)s %(message)s"


@dataclass(slots=True)
class LogConfig:
    """Where a `UnifiedLogger` says what."""

    name: str = "training"
    """Of the logger, and of its file."""
    level: int | str = "INFO"
    """What is said at all, and more serious: DEBUG, INFO, WARNING, ERROR, CRITICAL."""
    console: bool = True
    """Say it on standard output."""
    console_level: int | str | None = None
    """Another level for the console."""
    rich: bool | None = None
    """Colours and bars; None for where rich is installed and standard output is a terminal."""
    all_ranks: bool = False
    """Ranks other than 0 say everything on the console too."""
    file: bool = True
    """Write it into `LOG_DIR/NAME.log`; rank 3 into `NAME.rank3.log`."""
    log_dir: str | os.PathLike[str] = "logs"
    """Where the files are."""
    file_level: int | str | None = None
    """Another level for the file."""
    max_bytes: int = 10 * 1024 * 1024
    """A file of this size is put aside, and a new one begun."""
    backup_count: int = 5
    """So many that were put aside are kept."""

    def __post_init__(self) -> None:
        for option in ("level", "console_level", "file_level"):
            if (level := getattr(self, option)) is not None and not isinstance(level, int):
                if level.upper() not in logging.getLevelNamesMapping():
                    raise SettingsError(f"{option} = {level!r}: must be DEBUG, INFO, WARNING, ERROR or CRITICAL")
                setattr(self, option, logging.getLevelNamesMapping()[level.upper()])
        if self.max_bytes <= 0 or self.backup_count < 0:
            raise SettingsError(
                f"max_bytes = {self.max_bytes}, backup_count = {self.backup_count}: must be positive"
            )


class UnifiedLogger:
    """Says things on the console and into a file, shows progress, and writes metrics as a line."""

    def __init__(self, config: LogConfig | None = None) -> None:
        self.config = config or LogConfig()
        self._rank = ranks.identify(os.environ, ranks.Here.now()).rank
        self._rich: Any = None
        self._progress: Progress | None = None
        self._closed = False
        self.logger = logging.getLogger(f"sidestep.console.{self.config.name}")
        self.logger.propagate = False  # it has all its handlers; the root's would say it again
        self._handlers = [it for it in (self._console(), self._file()) if it is not None]
        for handler in list(self.logger.handlers):
            self.logger.removeHandler(handler)  # of an earlier one of this name
        for handler in self._handlers:
            self.logger.addHandler(handler)
        self.logger.setLevel(min((it.level for it in self._handlers), default=logging.CRITICAL))

    # What is said

    def debug(self, message: str, *args: Any, **keywords: Any) -> None:
        """What helps to find a mistake."""
        self.logger.debug(message, *args, **keywords)

    def info(self, message: str, *args: Any, **keywords: Any) -> None:
        """What happens."""
        self.logger.info(message, *args, **keywords)

    def warning(self, message: str, *args: Any, **keywords: Any) -> None:
        """What somebody should look at."""
        self.logger.warning(message, *args, **keywords)

    def error(self, message: str, *args: Any, **keywords: Any) -> None:
        """What went wrong."""
        self.logger.error(message, *args, **keywords)

    def exception(self, message: str, *args: Any, **keywords: Any) -> None:
        """What went wrong, with the exception that is being handled."""
        self.logger.exception(message, *args, **keywords)

    def critical(self, message: str, *args: Any, **keywords: Any) -> None:
        """What ends it."""
        self.logger.critical(message, *args, **keywords)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """A line of names and values. What is on a device is named, and not waited for."""
        shown = [f"{name} {_shown(value)}" for name, value in metrics.items()]
        self.info("%s", " | ".join(shown if step is None else [f"step {step}", *shown]))

    # Progress

    def start_progress(self, total: float | None = None, description: str = "") -> None:
        """Show how far something is; one that is being shown ends."""
        self.end_progress()
        if self._rich is not None:
            self._progress = Bar(importlib.import_module("rich.progress"), self._rich, total, description)
        elif self.config.console:
            self._progress = Lines(self.info, total, description)

    def update_progress(self, advance: float = 1, description: str | None = None) -> None:
        """So much more of it is done."""
        if self._progress is not None:
            self._progress.update(advance, description)

    def end_progress(self) -> None:
        """Show it no more."""
        progress, self._progress = self._progress, None
        if progress is not None:
            progress.end()

    # Its end

    def close(self) -> None:
        """Write what is left and let go of the file."""
        self.end_progress()
        for handler in self._handlers:
            self.logger.removeHandler(handler)
            handler.close()

    def __enter__(self) -> UnifiedLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and isinstance(error, Exception):
            self.logger.error("%s: %s", type(error).__name__, error)
        self.close()

    # Where it goes

    def _console(self) -> logging.Handler | None:
        config = self.config
        if not config.console:
            return None
        handler = self._rich_handler() or logging.StreamHandler(sys.stdout)
        if self._rich is None:
            handler.setFormatter(logging.Formatter(FORMAT))
        level = _level(config.console_level, config.level)
        quiet = self._rank != 0 and not config.all_ranks
        handler.setLevel(max(level, logging.WARNING) if quiet else level)
        return handler

    def _rich_handler(self) -> logging.Handler | None:
        if self.config.rich is False or (self.config.rich is None and not _is_terminal(sys.stdout)):
            return None
        try:
            self._rich = importlib.import_module("rich.console").Console()
            handler: logging.Handler = importlib.import_module("rich.logging").RichHandler(
                console=self._rich, show_path=False
            )
        except ImportError:
            self._rich = None
            return None
        return handler

    def _file(self) -> logging.Handler | None:
        config = self.config
        if not config.file:
            return None
        of_rank = f".rank{self._rank}" if self._rank else ""
        path = Path(config.log_dir) / f"{config.name.replace(os.sep, '_')}{of_rank}.log"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handler = logging.handlers.RotatingFileHandler(
                path, maxBytes=config.max_bytes, backupCount=config.backup_count, encoding="utf-8"
            )
        except OSError as error:
            logging.getLogger("sidestep").warning("sidestep: %s can not be written: %s", path, error)
            return None
        handler.setFormatter(logging.Formatter(FORMAT))
        handler.setLevel(_level(config.file_level, config.level))
        return handler


def _level(own: int | str | None, usual: int | str) -> int:
    chosen = usual if own is None else own
    return chosen if isinstance(chosen, int) else logging.getLevelNamesMapping()[chosen]


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except Exception:  # noqa: BLE001 - standard output may be closed, None, or anybody's object
        return False


def _shown(value: Any) -> str:
    """A value in a few characters."""
    try:
        value = convert.plain(value)
    except UnsupportedValue:
        return f"<{type(value).__name__}>"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
