"""`WandbLogger`: the run, with its options in a `WandbConfig`.

- it begins or joins the run when it is made, and ends its process's part as a context manager or by `finish`
- it is a thin layer over `Run`: what that takes apart, counts and says is not judged again here
- nothing raises but a bad `WandbConfig`, before anything starts
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from sidestep import _current
from sidestep._run import Run
from sidestep.logger.options import WandbConfig
from sidestep.logger.resuming import Resuming
from sidestep.session import EXIT_S


class Console(Protocol):
    """Who is told what happens: a `UnifiedLogger`, or a logger of the standard library."""

    def info(self, message: str) -> Any:
        """Say something."""

    def warning(self, message: str) -> Any:
        """Say something that somebody should look at."""


class WandbLogger:
    """Metrics, images, models and configuration of a training, into the one run of all its ranks."""

    def __init__(self, config: WandbConfig | None = None, logger: Console | None = None) -> None:
        self.config = config or WandbConfig()
        self.console = logger
        self._resuming: Resuming | None = None
        keywords = self.config.keywords()
        if self.config.resume:
            keywords.update(self._resume())
        self.run: Run = _current.init(**keywords)
        self._say(f"logs into the run {self.config.name or self.run._session.settings.run_id or ''}".rstrip())

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Values of metrics at a step; as `Run.log`, with the configured prefix before each name."""
        prefix = self.config.metric_prefix
        if prefix:
            try:
                metrics = {f"{prefix}{name}": value for name, value in metrics.items()}
            except Exception:  # noqa: BLE001 - what is no dict of names and values is found out by log(), and said
                pass
        self.run.log(metrics, step)

    def log_images(
        self,
        images: Any,
        captions: Sequence[str] | str | None = None,
        prefix: str | None = None,
        step: int | None = None,
    ) -> None:
        """Images, as `PREFIX/images`: of each kind that `sidestep.Image` takes, or several in one array or tensor.

        At most `max_images_to_log` of them, the first ones.
        """
        from sidestep.media import Image  # only who logs images needs it

        name = f"{prefix or self.config.sample_prefix}/images".lstrip("/")
        most = self.config.max_images_to_log
        try:
            several = _several(images)
            shown = list(islice(several, most))
            captions = [captions] if isinstance(captions, str) else list(captions or ())
            made = [Image(it, caption=text) for it, text in zip_longest(shown, captions[: len(shown)])]
            left_out = sum(1 for _ in several) if most else 1
        except Exception as error:  # noqa: BLE001 - what is no image must not end the training
            self._refuse(name, images, f"{type(error).__name__}: {error}")
            return
        if left_out:
            self._once("images", f"log_images: of one call the first {most} are logged (max_images_to_log)")
        if made:
            self.run.log({name: made}, step)

    def log_model(
        self,
        path: str | os.PathLike[str],
        metadata: Mapping[str, Any] | None = None,
        aliases: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        """Log a model, a file or a directory, as an artifact called `PREFIX-FILE`, a new version with each call.

        Where it lay, what is known of it and what it is called is noted in the summary, as `models/PREFIX-FILE`.
        """
        path, given = Path(path), [aliases] if isinstance(aliases, str) else list(aliases or ("latest",))
        if not self.config.is_wanted(given):
            option = "log_model" if not self.config.log_model else "log_checkpoints"
            self._once(option, f"log_model: {path.name} is not logged ({option} is off)")
            return
        try:
            found = path.stat()
        except OSError as error:
            self._refuse(f"log_model({path.name})", path, f"{error}")
            return
        said = {
            "path": str(path.absolute()),
            "bytes": found.st_size,
            "written_at": found.st_mtime,
            "aliases": given,
        }
        called = name or f"{self.config.checkpoint_prefix}-{path.stem}"
        self.run.summary[f"models/{called}"] = {**said, "metadata": dict(metadata or {})}
        self._log_artifact(called, path, metadata, given)
        self._say(f"logs the model {path}")

    def _log_artifact(
        self, name: str, path: Path, metadata: Mapping[str, Any] | None, aliases: Sequence[str]
    ) -> None:
        from sidestep.artifacts import Artifact, safe_name  # only who logs models needs it

        artifact = Artifact(safe_name(name), "model", metadata=metadata)
        if path.is_dir():
            artifact.add_dir(path)
        else:
            artifact.add_file(path)
        self.run.log_artifact(artifact, aliases=aliases)

    def log_config(self, config: Any) -> None:
        """What the training is configured with; nested as you like, beside what was said before."""
        self.run.config.update(config)

    def finish(self, exit_code: int | None = None, timeout: float = EXIT_S) -> None:
        """End this process's part; see `Run.finish`."""
        if self._resuming is not None and not exit_code and not self.run._session.exit_code:
            self._resuming.end()
        self.run.finish(exit_code, timeout)

    def _resume(self) -> dict[str, Any]:
        if self.config.resume not in (True, "auto"):
            return {"resume": self.config.resume}
        if os.environ.get("SIDESTEP_RUN_ID") or os.environ.get("WANDB_RUN_ID"):
            return {"resume": "allow"}
        self._resuming = Resuming(self.config.dir)
        return {"resume": "allow", "id": self._resuming.begin()}

    def _say(self, text: str) -> None:
        if self.console is not None:
            self.console.info(text)

    def _once(self, cause: str, text: str) -> None:
        self.run._session.notices.once(("logger", cause), text)

    def _refuse(self, name: str, value: Any, why: str) -> None:
        self.run._session.refuse_value(name, type(value), why)

    def __enter__(self) -> WandbLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.finish(exit_code=0 if kind is None else 1)


def _several(images: Any) -> Any:
    """One image or many, as an iterator over images."""
    shape = getattr(images, "shape", None)
    if shape is not None:
        return iter(images) if len(shape) > 3 else iter([images])
    if isinstance(images, Iterable) and not isinstance(images, str | bytes | os.PathLike):
        return iter(images)
    return iter([images])
