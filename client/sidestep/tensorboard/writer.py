"""`SummaryWriter` with torch's signatures: what it is told becomes metrics of the run, and no file is written.

- a tag is a name, `global_step` the step of the run's main axis. Tags may come in any order of steps: a step below
  one that was said already is a row of its own, with its true `global_step`. Without one the step is counted
- the first writer of a process names things as they are tagged; one for another directory puts that directory's
  name before, so that `runs/train` and `runs/val` do not overwrite each other
- nothing raises and nothing waits; `flush` and `close` have nothing to do
- what the run has no form for (graphs, embeddings, meshes, layouts) is said once
- `walltime` is not used: a row has the time of its call
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from sidestep import _current
from sidestep._run import Run

BINS = 64
MOST_BINS = 512


class Places:
    """The directories that writers were made for, and what each puts before its tags."""

    def __init__(self) -> None:
        self._first: Path | None = None

    def prefix(self, log_dir: str | os.PathLike[str]) -> str:
        """What a writer for this directory puts before its tags."""
        path = Path(os.path.abspath(log_dir))  # noqa: PTH100 - links stay what they are called
        if self._first is None:
            self._first = path
        if path == self._first:
            return ""
        base = self._first if path.is_relative_to(self._first) else self._first.parent
        below = path.relative_to(base) if path.is_relative_to(base) else Path(path.name)
        return f"{below.as_posix()}/"


_places = Places()


class SummaryWriter:
    """Writes to the run what `torch.utils.tensorboard.SummaryWriter` writes to files."""

    def __init__(
        self,
        log_dir: str | os.PathLike[str] | None = None,
        comment: str = "",
        *_: Any,
        run: Run | None = None,
        places: Places = _places,
        **__: Any,
    ) -> None:
        self.log_dir = os.fspath(log_dir) if log_dir is not None else f"runs/sidestep{comment}"
        self._given = run
        self._prefix = places.prefix(self.log_dir)
        if run is None and _current.current() is None:
            _current.init()

    # Numbers and text

    def add_scalar(self, tag: str, scalar_value: Any, global_step: Any = None, *_: Any, **__: Any) -> None:
        """One number."""
        self._log({self._name(tag): scalar_value}, global_step)

    def add_scalars(
        self, main_tag: str, tag_scalar_dict: Mapping[str, Any], global_step: Any = None, *_: Any, **__: Any
    ) -> None:
        """Several numbers, as `MAIN_TAG/TAG`."""
        name = self._name(main_tag)
        self._guard(
            name, lambda: self._log({f"{name}/{tag}": it for tag, it in tag_scalar_dict.items()}, global_step)
        )

    def add_text(self, tag: str, text_string: str, global_step: Any = None, *_: Any, **__: Any) -> None:
        """Text, as it is."""
        self._log({self._name(tag): str(text_string)}, global_step)

    def add_hparams(
        self,
        hparam_dict: Mapping[str, Any],
        metric_dict: Mapping[str, Any],
        *_: Any,
        global_step: Any = None,
        **__: Any,
    ) -> None:
        """Into the run's configuration, and metrics of what they came to."""
        self._run().config.update(hparam_dict)
        self._guard(
            "add_hparams",
            lambda: self._log({self._name(tag): it for tag, it in metric_dict.items()}, global_step),
        )

    # Media

    def add_histogram(
        self, tag: str, values: Any, global_step: Any = None, bins: Any = BINS, *_: Any, **__: Any
    ) -> None:
        """How values are spread, over `bins` bins if that is a number."""
        number = min(bins, MOST_BINS) if type(bins) is int else BINS
        self._media(tag, global_step, lambda media: media.Histogram(_flat(values), num_bins=number))

    def add_histogram_raw(
        self,
        tag: str,
        min: float,  # noqa: A002 - torch's names
        max: float,  # noqa: A002, ARG002
        num: float,  # noqa: ARG002
        sum: float,  # noqa: A002, ARG002
        sum_squares: float,  # noqa: ARG002
        bucket_limits: Any,
        bucket_counts: Any,
        global_step: Any = None,
        *_: Any,
        **__: Any,
    ) -> None:
        """A histogram that was counted already."""
        self._media(
            tag,
            global_step,
            lambda media: media.Histogram(
                np_histogram=([float(it) for it in bucket_counts], [min, *(float(it) for it in bucket_limits)])
            ),
        )

    def add_image(
        self,
        tag: str,
        img_tensor: Any,
        global_step: Any = None,
        walltime: Any = None,  # noqa: ARG002 - torch's
        dataformats: str = "CHW",
        **_: Any,
    ) -> None:
        """One image, laid out as `dataformats` says."""
        self._media(tag, global_step, lambda media: media.Image(_image(img_tensor, dataformats)))

    def add_images(
        self,
        tag: str,
        img_tensor: Any,
        global_step: Any = None,
        walltime: Any = None,  # noqa: ARG002 - torch's
        dataformats: str = "NCHW",
        **_: Any,
    ) -> None:
        """Several images, laid out as `dataformats` says."""
        if "N" not in dataformats.upper():
            return self.add_image(tag, img_tensor, global_step, dataformats=dataformats)
        rest = dataformats.upper().replace("N", "")

        def images(media: Any) -> Any:
            several = _moved(img_tensor, dataformats.upper(), f"N{rest}")
            return [media.Image(_image(one, rest)) for one in several]

        return self._media(tag, global_step, images)

    def add_figure(
        self, tag: str, figure: Any, global_step: Any = None, close: bool = True, *_: Any, **__: Any
    ) -> None:
        """A matplotlib figure or a list of them, which are closed then."""
        figures = list(figure) if isinstance(figure, list | tuple) else [figure]
        made: Callable[[Any], Any] = lambda media: [media.Image(it) for it in figures]  # noqa: E731
        self._media(tag, global_step, made if len(figures) > 1 else lambda media: media.Image(figures[0]))
        if close and (pyplot := sys.modules.get("matplotlib.pyplot")) is not None:
            for it in figures:
                self._guard(tag, lambda it=it: pyplot.close(it))  # type: ignore[misc]

    def add_audio(
        self, tag: str, snd_tensor: Any, global_step: Any = None, sample_rate: int = 44100, *_: Any, **__: Any
    ) -> None:
        """A sound of one channel, from -1 to 1."""
        self._media(tag, global_step, lambda media: media.Audio(_flat(snd_tensor), sample_rate=sample_rate))

    def add_video(
        self, tag: str, vid_tensor: Any, global_step: Any = None, fps: float = 4, *_: Any, **__: Any
    ) -> None:
        """Videos as NxTxCxHxW; floats from 0 to 1."""

        def videos(media: Any) -> Any:
            made = [media.Video(_bytes(one), fps=max(1, round(fps))) for one in vid_tensor]
            return made[0] if len(made) == 1 else made

        self._media(tag, global_step, videos)

    # What has no form here

    def add_graph(self, *_: Any, **__: Any) -> None:
        """Said once."""
        self._no_form("add_graph")

    def add_onnx_graph(self, *_: Any, **__: Any) -> None:
        """Said once."""
        self._no_form("add_onnx_graph")

    def add_embedding(self, *_: Any, **__: Any) -> None:
        """Said once."""
        self._no_form("add_embedding")

    def add_mesh(self, *_: Any, **__: Any) -> None:
        """Said once."""
        self._no_form("add_mesh")

    def add_tensor(self, *_: Any, **__: Any) -> None:
        """Said once."""
        self._no_form("add_tensor")

    def add_image_with_boxes(self, *_: Any, **__: Any) -> None:
        """Said once."""
        self._no_form("add_image_with_boxes")

    def add_pr_curve(self, *_: Any, **__: Any) -> None:
        """Said once."""
        self._no_form("add_pr_curve")

    def add_pr_curve_raw(self, *_: Any, **__: Any) -> None:
        """Said once."""
        self._no_form("add_pr_curve_raw")

    def add_custom_scalars(self, *_: Any, **__: Any) -> None:
        """Said once."""
        self._no_form("add_custom_scalars")

    def add_custom_scalars_multilinechart(self, *_: Any, **__: Any) -> None:
        """Said once."""
        self._no_form("add_custom_scalars_multilinechart")

    def add_custom_scalars_marginchart(self, *_: Any, **__: Any) -> None:
        """Said once."""
        self._no_form("add_custom_scalars_marginchart")

    # The writer

    def get_logdir(self) -> str:
        """The directory it was made for; nothing is written there."""
        return self.log_dir

    def flush(self) -> None:
        """Nothing: what was said is on its way."""

    def close(self) -> None:
        """Nothing: the run goes on."""

    def __enter__(self) -> SummaryWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> Run:
        return self._given or _current.current() or _current.init()

    def _name(self, tag: Any) -> str:
        return f"{self._prefix}{tag}"

    def _log(self, values: dict[str, Any], step: Any) -> None:
        self._run().log(values, step)

    def _media(self, tag: Any, step: Any, make: Callable[[Any], Any]) -> None:
        from sidestep import media  # only who logs media needs it

        name = self._name(tag)
        self._guard(name, lambda: self._log({name: make(media)}, step))

    def _guard(self, name: str, say_it: Callable[[], Any]) -> None:
        """What a foreign value's own code raises must not reach the training."""
        try:
            say_it()
        except Exception as error:  # noqa: BLE001 - as above
            self._run()._session.refuse_value(name, type(error), f"{type(error).__name__}: {error}")

    def _no_form(self, method: str) -> None:
        session = self._run()._session
        session.outbox.values_refused += 1
        session.notices.once(("tensorboard", method), f"SummaryWriter.{method}() has no form in the run")


def _moved(value: Any, now: str, wanted: str) -> Any:
    """An array or tensor with its dimensions, named by letters, in another order."""
    if len(now) != len(wanted) or sorted(now) != sorted(wanted):
        raise ValueError(f"dataformats={now!r} is no layout of an image")
    axes = [now.index(letter) for letter in wanted]
    return value.permute(*axes) if hasattr(value, "permute") else value.transpose(axes)


def _image(value: Any, layout: str) -> Any:
    """An image as `Image` takes it: tensors CxHxW, arrays HxWxC, both HxW."""
    layout = layout.upper()
    if "C" not in layout:
        return _moved(value, layout, "HW")
    return _moved(value, layout, "CHW" if hasattr(value, "permute") else "HWC")


def _flat(value: Any) -> Any:
    """The numbers of an array or tensor in one row; a list as it is."""
    return value.reshape(-1) if hasattr(value, "reshape") else value


def _bytes(frames: Any) -> Any:
    """Frames as bytes, of floats from 0 to 1 too."""
    if hasattr(frames, "is_floating_point"):
        return frames.mul(255).clamp(0, 255).byte() if frames.is_floating_point() else frames
    return (frames * 255).clip(0, 255).astype("uint8") if frames.dtype.kind == "f" else frames
