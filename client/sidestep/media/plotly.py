"""Figures of plotly's, as the JSON that they are."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

from sidestep.errors import UnsupportedValue
from sidestep.media.base import Files
from sidestep.media.figures import is_figure
from sidestep.media.value import Content, Value


class Plotly(Value):
    """An interactive figure: plotly's, or matplotlib's where `plotly.tools` is loaded to turn it into one."""

    kind: ClassVar[str] = "plotly"

    __slots__ = ()

    def __init__(self, val: Any) -> None:
        super().__init__(lambda: {"figure": Content(_json(val))})


def _json(figure: Any) -> bytes:
    if is_figure(figure):
        if (tools := sys.modules.get("plotly.tools")) is None:
            raise UnsupportedValue(
                "it is a figure of matplotlib's, and plotly.tools is not loaded: log it as an Image, "
                "or import plotly.tools"
            )
        figure = tools.mpl_to_plotly(getattr(figure, "figure", figure))
    if not hasattr(figure, "to_plotly_json"):
        raise UnsupportedValue(f"a {type(figure).__name__} is no figure of plotly's")
    return json.dumps(figure.to_plotly_json(), default=_plain, separators=(",", ":")).encode()


def _plain(value: Any) -> Any:
    """What JSON has no form for."""
    for way in ("tolist", "isoformat", "to_plotly_json"):
        if hasattr(value, way):
            return getattr(value, way)()
    return str(value)


def show(facts: Mapping[str, Any], files: Files) -> Any:
    """A `wandb.Plotly` of a file: its constructor wants plotly and the figure."""
    import wandb

    content = files.read(facts["figure"])
    try:
        json.loads(content)
    except ValueError as error:
        raise ValueError(f"it is no figure of plotly's: {error}") from error
    path = files.new(".plotly.json")
    path.write_bytes(content)
    plotly = wandb.Plotly.__new__(wandb.Plotly)
    super(wandb.Plotly, plotly).__init__()
    plotly._set_file(str(path), is_tmp=False, extension=".plotly.json")
    return plotly
