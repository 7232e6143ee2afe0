"""Media: what `log()` takes beside plain values. One file for each kind, and one line in the table.

`base.py` says what a kind is, and how its bytes travel.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from sidestep.media.base import MARK, Blobs, Files, Media, Ref, is_packed, packed
from sidestep.media.image import Image

KINDS: Mapping[str, str] = {
    "image": "sidestep.media.image",
}
"""The file of each kind: that of its class, and of the function `show`."""


def show(value: Mapping[str, Any], files: Files) -> Any:
    """The object of wandb's for a packed value. Raises ValueError, in words, if its content is bad."""
    kind, facts = value[MARK], value["facts"]
    if kind not in KINDS:
        raise ValueError(f"media of the kind {kind!r:.80} is not known here: is sidestep as new as its workers?")
    return import_module(KINDS[kind]).show(facts, files)


def shown(facts: Any, files: Files) -> Any:
    """Plain values with all media in them shown: of the cells of a table, say."""
    if is_packed(facts):
        return show(facts, files)
    if isinstance(facts, dict):
        return {name: shown(value, files) for name, value in facts.items()}
    if isinstance(facts, list):
        return [shown(value, files) for value in facts]
    return facts


__all__ = ["KINDS", "Blobs", "Files", "Image", "Media", "Ref", "is_packed", "packed", "show", "shown"]
