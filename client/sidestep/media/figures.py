"""Figures of matplotlib's: drawn in the worker, at once, since whoever drew them goes on drawing.

That takes as long as `savefig` does. A figure that is logged without an `Image` around it becomes an image too,
where wandb has plotly make something interactive of it. `Plotly(plotly.tools.mpl_to_plotly(figure))` does that.
"""

from __future__ import annotations

import io
import sys
from typing import Any

from sidestep.errors import UnsupportedValue


def is_figure(value: Any) -> bool:
    """Whether it is a figure, something drawn in one, or pyplot itself, which stands for its current one."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is not None and value is pyplot:
        return True
    artist = sys.modules.get("matplotlib.artist")
    return artist is not None and isinstance(value, artist.Artist)


def picture(value: Any) -> bytes:
    """What `savefig` makes of it, as PNG; little time is spent on making that small."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    figure = pyplot.gcf() if pyplot is not None and value is pyplot else value
    if not hasattr(figure, "savefig"):
        figure = getattr(value, "figure", None)
    if not hasattr(figure, "savefig"):
        raise UnsupportedValue(f"a {type(value).__name__} that is in no figure can not be drawn")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", pil_kwargs={"compress_level": 1})
    return buffer.getvalue()
