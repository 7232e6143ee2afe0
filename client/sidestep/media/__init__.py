"""Media: what `log()` takes beside plain values. One file for each kind, and one line in the table.

`base.py` says what a kind is, and how its bytes travel; `value.py` what making one never does. A file is imported
when its class is first used, in the daemon when one is shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sidestep.media.base import MARK, Blobs, Files, Media, Ref, is_packed, packed

if TYPE_CHECKING:
    from sidestep.media.audio import Audio
    from sidestep.media.chart import Chart
    from sidestep.media.histogram import Histogram
    from sidestep.media.html import Html
    from sidestep.media.image import Image
    from sidestep.media.molecule import Molecule
    from sidestep.media.object3d import Object3D, box3d
    from sidestep.media.overlays import Classes
    from sidestep.media.plotly import Plotly
    from sidestep.media.table import Table
    from sidestep.media.video import Video

KINDS: Mapping[str, str] = {
    "audio": "sidestep.media.audio",
    "chart": "sidestep.media.chart",
    "histogram": "sidestep.media.histogram",
    "html": "sidestep.media.html",
    "image": "sidestep.media.image",
    "molecule": "sidestep.media.molecule",
    "object3d": "sidestep.media.object3d",
    "plotly": "sidestep.media.plotly",
    "table": "sidestep.media.table",
    "video": "sidestep.media.video",
}
"""The file of each kind: that of its class, and of the function `show`."""

NAMES: Mapping[str, str] = {
    "Audio": "audio",
    "Chart": "chart",
    "Classes": "overlays",
    "Histogram": "histogram",
    "Html": "html",
    "Image": "image",
    "Molecule": "molecule",
    "Object3D": "object3d",
    "Plotly": "plotly",
    "Table": "table",
    "Video": "video",
    "box3d": "object3d",
}
"""What a user makes media with, and the file that it is in."""


def show(value: Mapping[str, Any], files: Files) -> Any:
    """The object of wandb's for a packed value. Raises ValueError, in words, if its content is bad."""
    kind, facts = value[MARK], value["facts"]
    if kind not in KINDS:
        raise ValueError(f"media of the kind {kind!r:.80} is not known here: is sidestep as new as its workers?")
    try:
        return import_module(KINDS[kind]).show(facts, files)
    except (KeyError, TypeError, AttributeError) as error:  # facts are a worker's, and may be anything
        raise ValueError(f"what is said of the {kind} is not what can be shown: {error!r:.200}") from error


def shown(facts: Any, files: Files) -> Any:
    """Plain values with all media in them shown: of the cells of a table, say."""
    if is_packed(facts):
        return show(facts, files)
    if isinstance(facts, dict):
        return {name: shown(value, files) for name, value in facts.items()}
    if isinstance(facts, list):
        return [shown(value, files) for value in facts]
    return facts


def __getattr__(name: str) -> Any:
    if name in NAMES:
        return getattr(import_module(f"{__name__}.{NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "KINDS",
    "MARK",
    "NAMES",
    "Audio",
    "Blobs",
    "Chart",
    "Classes",
    "Files",
    "Histogram",
    "Html",
    "Image",
    "Media",
    "Molecule",
    "Object3D",
    "Plotly",
    "Ref",
    "Table",
    "Video",
    "box3d",
    "is_packed",
    "packed",
    "show",
    "shown",
]
