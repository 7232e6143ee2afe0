"""HTML: text, a file object, or a path that ends in .html."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from sidestep.errors import UnsupportedValue
from sidestep.media.base import Files
from sidestep.media.value import Content, Value

HEAD = '<base target="_blank"><link rel="stylesheet" type="text/css" href="https://app.wandb.ai/normalize.css" />'
"""What wandb puts into a page so that it looks like the others, and its links leave the frame."""


class Html(Value):
    """A page of HTML. `inject=False` leaves out wandb's style; `data_is_not_path` takes text for what it says."""

    kind: ClassVar[str] = "html"

    __slots__ = ()

    def __init__(self, data: Any, inject: bool = True, data_is_not_path: bool = False) -> None:
        super().__init__(lambda: {"html": _content(data, bool(data_is_not_path)), "inject": bool(inject)})


def _content(data: Any, literal: bool) -> Content:
    if hasattr(data, "read"):
        if hasattr(data, "seek"):
            data.seek(0)
        data = data.read()
        return Content(data if isinstance(data, bytes) else str(data).encode("utf-8", "replace"))
    if not isinstance(data, str | os.PathLike):
        raise UnsupportedValue(f"HTML is text, a path or a file object, not a {type(data).__name__}")
    if not literal and os.fspath(data)[-5:] == ".html" and Path(data).is_file():
        return Content(path=os.fsdecode(data))
    return Content(str(data).encode("utf-8", "replace"))


def show(facts: Mapping[str, Any], files: Files) -> Any:
    """A `wandb.Html` of a file."""
    import wandb

    page = files.read(facts["html"]).decode("utf-8", "replace")
    path = files.new(".html")
    path.write_text(with_head(page) if facts.get("inject", True) else page, encoding="utf-8")
    return wandb.Html(path, inject=False)


def with_head(page: str) -> str:
    """The page with wandb's style in its head."""
    for tag, opened, closed in (("<head>", "<head>", ""), ("<html>", "<html><head>", "</head>")):
        before, found, after = page.partition(tag)
        if found:
            return f"{before}{opened}{HEAD}{closed}{after}".strip()
    return f"{HEAD}{page}".strip()
