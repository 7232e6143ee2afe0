"""`sidestep.plot`: the charts of `wandb.plot`, with its arguments.

    run.log({"roc": sidestep.plot.roc_curve(labels, probabilities)})

What they are made of is copied when they are made; curves and matrices are computed in the daemon, without pandas
and scikit-learn. What can not be drawn is told when it is logged; nothing here raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sidestep.media.chart import Chart, Computed, Visualize
from sidestep.media.table import Table

__all__ = [
    "bar",
    "confusion_matrix",
    "histogram",
    "line",
    "line_series",
    "plot_table",
    "pr_curve",
    "roc_curve",
    "scatter",
    "visualize",
]


def plot_table(
    vega_spec_name: str,
    data_table: Table,
    fields: Mapping[str, Any],
    string_fields: Mapping[str, Any] | None = None,
    split_table: bool = False,
) -> Chart:
    """A drawing of a table by a Vega specification that W&B knows by name."""
    return Chart(vega_spec_name, data_table, fields, string_fields, split_table)


def visualize(id: str, value: Table) -> Visualize:  # noqa: A002 - wandb's name for it
    """A table, and one of W&B's panels for it by its name."""
    return Visualize(id, value)


def line(
    table: Table, x: str, y: str, stroke: str | None = None, title: str = "", split_table: bool = False
) -> Chart:
    """Lines through the points of two columns, one for each value of the column `stroke`."""
    return Chart("wandb/line/v0", table, {"x": x, "y": y, "stroke": stroke}, {"title": title}, split_table)


def scatter(table: Table, x: str, y: str, title: str = "", split_table: bool = False) -> Chart:
    """The points of two columns."""
    return Chart("wandb/scatter/v0", table, {"x": x, "y": y}, {"title": title}, split_table)


def bar(table: Table, label: str, value: str, title: str = "", split_table: bool = False) -> Chart:
    """A bar for each row."""
    return Chart("wandb/bar/v0", table, {"label": label, "value": value}, {"title": title}, split_table)


def histogram(table: Table, value: str, title: str = "", split_table: bool = False) -> Chart:
    """How the values of a column are distributed."""
    return Chart("wandb/histogram/v0", table, {"value": value}, {"title": title}, split_table)


def line_series(
    xs: Any, ys: Any, keys: Any = None, title: str = "", xname: str = "x", split_table: bool = False
) -> Chart:
    """Several lines, over the same `xs` or each over its own."""
    columns = ["step", "lineKey", "lineVal"]
    try:
        table = Table(columns=columns, data=_series(xs, ys, keys))
    except Exception as error:  # noqa: BLE001 - whatever these are, the loop goes on
        table = Table(columns=columns)
        table._wrong = f"its lines can not be read: {error!s:.200}"
    fields = {name: name for name in columns}
    return Chart("wandb/lineseries/v0", table, fields, {"title": title, "xname": xname}, split_table)


def confusion_matrix(
    probs: Any = None,
    y_true: Any = None,
    preds: Any = None,
    class_names: Any = None,
    title: str = "Confusion Matrix Curve",
    split_table: bool = False,
) -> Computed:
    """How often each class was taken for each, by predictions or by probabilities NxK."""
    return Computed(
        "confusion",
        {"y_true": y_true, "preds": preds, "probs": probs},
        {"class_names": None if class_names is None else list(class_names)},
        "wandb/confusion_matrix/v1",
        {name: name for name in ("Actual", "Predicted", "nPredictions")},
        {"title": title},
        split_table,
    )


def roc_curve(
    y_true: Any = None,
    y_probas: Any = None,
    labels: Any = None,
    classes_to_plot: Any = None,
    title: str = "ROC Curve",
    split_table: bool = False,
) -> Computed:
    """True against false positives, by probabilities NxK."""
    return Computed(
        "roc",
        {"y_true": y_true, "y_probas": y_probas},
        {"labels": labels, "classes_to_plot": classes_to_plot},
        "wandb/area-under-curve/v0",
        {"x": "fpr", "y": "tpr", "class": "class"},
        {"title": title, "x-axis-title": "False positive rate", "y-axis-title": "True positive rate"},
        split_table,
    )


def pr_curve(
    y_true: Any = None,
    y_probas: Any = None,
    labels: Any = None,
    classes_to_plot: Any = None,
    interp_size: int = 21,
    title: str = "Precision-Recall Curve",
    split_table: bool = False,
) -> Computed:
    """Precision against recall, by probabilities NxK."""
    return Computed(
        "precision",
        {"y_true": y_true, "y_probas": y_probas},
        {"labels": labels, "classes_to_plot": classes_to_plot, "interp_size": interp_size},
        "wandb/area-under-curve/v0",
        {"x": "recall", "y": "precision", "class": "class"},
        {"title": title, "x-axis-title": "Recall", "y-axis-title": "Precision"},
        split_table,
    )


def _series(xs: Any, ys: Any, keys: Any) -> list[list[Any]]:
    xs, ys = _listed(xs), [_listed(line) for line in _listed(ys)]
    xs = [_listed(line) for line in xs] if xs and hasattr(xs[0], "__iter__") else [xs] * len(ys)
    keys = [f"line_{at}" for at in range(len(ys))] if keys is None else [str(key) for key in keys]
    if not len(xs) == len(ys) == len(keys):
        raise ValueError(f"{len(xs)} xs, {len(ys)} ys and {len(keys)} keys do not go together")
    lines = zip(xs, ys, keys, strict=True)
    return [[x, key, y] for line, values, key in lines for x, y in zip(line, values, strict=False)]


def _listed(values: Any) -> list[Any]:
    return values.tolist() if hasattr(values, "tolist") else list(values)
