"""Charts: a table, and one of W&B's drawings of it. `sidestep.plot` makes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sidestep import convert
from sidestep.errors import UnsupportedValue
from sidestep.media import curves
from sidestep.media.base import Files
from sidestep.media.table import Table
from sidestep.media.value import Value, plain_content

NEEDED = {
    "confusion": [["preds", "y_true"], ["probs", "y_true"]],
    "roc": [["y_probas", "y_true"]],
    "precision": [["y_probas", "y_true"]],
}
"""What each computed chart is made of."""


class Chart(Value):
    """A drawing `spec` of a table, whose columns `fields` names; `strings` are its titles."""

    kind: ClassVar[str] = "chart"

    __slots__ = ()

    def __init__(
        self, spec: str, table: Table, fields: Mapping[str, Any], strings: Any = None, split: bool = False
    ) -> None:
        def facts() -> dict[str, Any]:
            if not isinstance(table, Table):
                raise UnsupportedValue(f"a chart is of a sidestep.Table, not of a {type(table).__name__}")
            return _drawing(spec, fields, strings, split) | {"table": table}

        super().__init__(facts)


class Computed(Value):
    """A chart whose table the daemon computes: `of` names what, of `series` of numbers and labels."""

    kind: ClassVar[str] = "chart"

    __slots__ = ()

    def __init__(
        self,
        of: str,
        series: Mapping[str, Any],
        options: Mapping[str, Any],
        spec: str,
        fields: Mapping[str, Any],
        strings: Mapping[str, Any],
        split: bool,
    ) -> None:
        def facts() -> dict[str, Any]:
            given = sorted(name for name, values in series.items() if values is not None)
            if given not in NEEDED[of]:
                raise UnsupportedValue(f"it is made of {' or of '.join(map(' and '.join, NEEDED[of]))}")
            return _drawing(spec, fields, strings, split) | {
                "of": of,
                "series": {name: curves.series(values) for name, values in series.items() if values is not None},
                "options": plain_content(
                    {name: convert.plain(value) for name, value in options.items() if value is not None}
                ),
            }

        super().__init__(facts)


class Visualize(Value):
    """A table that stays a table of the run, under its own name, and is drawn there by the panel `spec`."""

    kind: ClassVar[str] = "chart"

    __slots__ = ()

    def __init__(self, spec: str, table: Table) -> None:
        def facts() -> dict[str, Any]:
            if not isinstance(table, Table):
                raise UnsupportedValue(f"what is drawn is a sidestep.Table, not a {type(table).__name__}")
            return {"spec": str(spec), "table": table}

        super().__init__(facts)


def _drawing(spec: str, fields: Mapping[str, Any], strings: Any, split: bool) -> dict[str, Any]:
    return {
        "spec": str(spec),
        "fields": convert.plain(dict(fields)),
        "strings": convert.plain(dict(strings or {})),
        "split": bool(split),
    }


def show(facts: Mapping[str, Any], files: Files) -> Any:
    """A custom chart of wandb's."""
    import wandb

    from sidestep import media

    if "table" in facts:
        table = media.show(facts["table"], files)
    else:
        columns, rows = curves.computed(facts, files)
        table = wandb.Table(columns=[*columns], data=rows, allow_mixed_types=True)
    if "fields" not in facts:
        return wandb.visualize(facts["spec"], table)  # type: ignore[attr-defined]
    return wandb.plot_table(facts["spec"], table, facts["fields"], facts["strings"], facts["split"])
