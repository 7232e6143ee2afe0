"""What is media without being called so: `log({"samples": pil_image, "curve": figure, "scores": data_frame})`.

A type is looked at by the library that it is of, which is therefore loaded; nothing is imported.
"""

from __future__ import annotations

from typing import Any

from sidestep.media.base import Media
from sidestep.media.figures import is_figure


def media_of(value: Any) -> Media | None:
    """The media that a value is, or stands for; None for all others."""
    if isinstance(value, Media):
        return value
    if is_figure(value):
        return _image(value)
    for base in type(value).__mro__:
        library = base.__module__.partition(".")[0]
        if library == "PIL" and hasattr(value, "tobytes"):
            return _image(value)
        if library == "plotly" and hasattr(value, "to_plotly_json"):
            from sidestep.media.plotly import Plotly

            return Plotly(value)
        if library == "pandas" and base.__name__ == "DataFrame":
            from sidestep.media.table import Table

            return Table(dataframe=value)
    return None


def _image(value: Any) -> Media:
    from sidestep.media.image import Image

    return Image(value)
