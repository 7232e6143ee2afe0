"""Audio: samples, which the daemon writes as WAV of 16 bits with the standard library, or a file.

Floats are in [-1, 1], as for soundfile, which wandb needs for this; what is beyond is cut off.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from sidestep.errors import UnsupportedValue
from sidestep.media import arrays
from sidestep.media.base import Files
from sidestep.media.value import Content, Value, given, text_or_none

MOST_CHANNELS = 32


class Audio(Value):
    """A sound: samples of the shape N or NxC (also CxN) with their `sample_rate` in Hz, or a path."""

    kind: ClassVar[str] = "audio"

    __slots__ = ()

    def __init__(self, data_or_path: Any, sample_rate: int | None = None, caption: str | None = None) -> None:
        def facts() -> dict[str, Any]:
            common = given(rate=_rate(sample_rate), caption=text_or_none(caption))
            if isinstance(data_or_path, str | os.PathLike):
                return common | of_path(data_or_path)
            if sample_rate is None:
                raise UnsupportedValue("sample_rate= is needed where the sound is samples")
            samples = arrays.taken(data_or_path)
            if not 1 <= len(samples["shape"]) <= 2:
                raise UnsupportedValue(f"samples have the shape N or NxC, not {samples['shape']}")
            return common | {"samples": samples}

        super().__init__(facts)


def of_path(path: Any) -> dict[str, Any]:
    """A file, whose suffix says what it is."""
    path = os.fsdecode(path)
    if "://" in path:
        raise UnsupportedValue(f"{path!r:.200} is an address: log a file of this machine")
    return {"file": Content(path=path), "suffix": Path(path).suffix}


def file_of(facts: Mapping[str, Any], files: Files) -> Path:
    """In the daemon: the file as it came, under a name with its suffix."""
    suffix = str(facts.get("suffix", ""))
    path = files.new(suffix if suffix[1:].replace(".", "").isalnum() and len(suffix) <= 12 else "")
    shutil.copyfile(files.path(facts["file"]), path)
    return path


def show(facts: Mapping[str, Any], files: Files) -> Any:
    """A `wandb.Audio` of a file."""
    import wandb

    rate, caption = facts.get("rate"), facts.get("caption")
    if "file" in facts:
        audio = wandb.Audio(str(file_of(facts, files)), sample_rate=rate, caption=caption)
    else:
        path = files.new(".wav")
        seconds = _write(path, arrays.numpy_of(facts["samples"], files), int(facts["rate"]))
        audio = wandb.Audio(str(path), sample_rate=rate, caption=caption)
        audio._duration = seconds
    audio.seq_to_json = functools.partial(_list_to_json)  # type: ignore[method-assign]
    return audio


def _rate(rate: Any) -> int | None:
    if rate is None:
        return None
    if int(rate) != rate or not 0 < rate < 2**31:
        raise UnsupportedValue(f"sample_rate={rate!r:.40}: samples per second, a whole number")
    return int(rate)


def _write(path: Path, samples: Any, rate: int) -> float:
    """Write the samples; how many seconds they are."""
    import wave

    samples = _of_16_bits(_by_time(samples))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return float(len(samples) / rate)


def _by_time(samples: Any) -> Any:
    """NxC: of two axes, that of the channels is the shorter one."""
    samples = samples.reshape(-1, 1) if samples.ndim == 1 else samples
    if samples.shape[1] > MOST_CHANNELS >= samples.shape[0]:
        samples = samples.T
    if not 1 <= samples.shape[1] <= MOST_CHANNELS:
        raise ValueError(
            f"a sound has up to {MOST_CHANNELS} channels, and this has the shape {list(samples.shape)}"
        )
    return samples


def _of_16_bits(samples: Any) -> Any:
    import numpy

    if samples.dtype.kind == "f":
        whole = numpy.nan_to_num(samples.astype(numpy.float64)) * 32767.0
        return numpy.rint(whole).clip(-32768, 32767).astype("<i2")
    if samples.dtype == numpy.uint8:  # as in a WAV of 8 bits
        return ((samples.astype(numpy.int16) - 128) * 256).astype("<i2")
    if samples.dtype.kind == "i" and samples.dtype.itemsize == 4:
        return (samples >> 16).astype("<i2")
    return samples.clip(-32768, 32767).astype("<i2")


def _list_to_json(items: Any, run: Any, key: str, step: Any) -> dict[str, Any]:  # noqa: ARG001 - wandb's signature
    """What wandb writes of a list of sounds; its own does so only where soundfile is installed."""
    items = list(items)
    found = {
        "_type": "audio",
        "count": len(items),
        "audio": [item.to_json(run) for item in items],
        "sampleRates": [item._sample_rate for item in items],
        "durations": [item._duration for item in items],
    }
    if captions := type(items[0]).captions(items):
        found["captions"] = captions
    return found
