"""What charts of a classifier show, computed in the daemon: as scikit-learn and wandb do, without either.

Each function returns columns and rows. Rates are rounded to three digits, as wandb's are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sidestep.media import arrays
from sidestep.media.base import Files
from sidestep.media.value import plain_content, unpacked

MOST_ROWS = 10_000
"""What wandb's charts draw. wandb picks so many at random; here they are evenly spaced, the ends among them."""

Table = tuple[list[str], list[list[Any]]]


def series(values: Any) -> dict[str, Any]:
    """The facts of a sequence of numbers or labels, in the worker."""
    values = arrays.unwrapped(values)
    if arrays.is_array(values) and (arrays.is_tensor(values) or values.dtype.kind in "biuf"):
        return arrays.taken(values)
    from sidestep import convert

    values = values.tolist() if hasattr(values, "tolist") else list(values)
    return {"values": plain_content([convert.plain(value) for value in values])}


def of_series(facts: Mapping[str, Any], files: Files) -> Any:
    """An array again."""
    import numpy

    if "values" in facts:
        return numpy.array(unpacked(files.read(facts["values"])))
    return arrays.numpy_of(facts, files)


def computed(facts: Mapping[str, Any], files: Files) -> Table:
    """The table of what `facts` ask for."""
    finds: dict[str, Callable[..., Table]] = {"confusion": confusion, "roc": roc, "precision": precision}
    find = finds.get(facts.get("of", ""))
    if find is None:
        raise ValueError(f"{facts.get('of')!r:.40} is nothing that can be computed here")
    given = {name: of_series(value, files) for name, value in facts["series"].items()}
    options = unpacked(files.read(facts["options"]))
    try:
        return find(**given, **options)
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"the labels and the predictions do not go together: {error!r:.200}") from error


def confusion(
    y_true: Any, preds: Any = None, probs: Any = None, class_names: Sequence[str] | None = None
) -> Table:
    """How often each class was taken for each."""
    predicted = (probs.argmax(axis=1) if probs is not None else preds).tolist()
    true = y_true.tolist()
    if len(predicted) != len(true):
        raise ValueError(f"{len(predicted)} predictions do not go with {len(true)} labels")
    if class_names is None:
        classes = sorted({*predicted, *true})
        names = [f"Class_{at + 1}" for at in range(len(classes))]
    else:
        names, classes = [str(name) for name in class_names], list(range(len(class_names)))
    place = {label: at for at, label in enumerate(classes)}
    if unknown := {*predicted, *true} - place.keys():
        raise ValueError(f"{sorted(map(str, unknown))[0]:.80} is none of the {len(classes)} classes")
    counts = [[0.0] * len(classes) for _ in classes]
    for was, seen in zip(true, predicted, strict=True):
        counts[place[was]][place[seen]] += 1
    rows = [[names[i], names[j], counts[i][j]] for i in range(len(classes)) for j in range(len(classes))]
    return ["Actual", "Predicted", "nPredictions"], rows


def roc(y_true: Any, y_probas: Any, labels: Any = None, classes_to_plot: Any = None) -> Table:
    """True against false positives, for each class against the others."""
    import numpy

    columns = []
    for label, positive, score in _classes(y_true, y_probas, labels, classes_to_plot):
        false, true = _counts(positive, score)
        if len(false) > 2:  # points on a straight line say nothing
            corner = numpy.r_[True, numpy.diff(false, 2).astype(bool) | numpy.diff(true, 2).astype(bool), True]
            false, true = false[corner], true[corner]
        columns.append((label, _share(numpy.r_[0, false]), _share(numpy.r_[0, true])))
    return ["class", "fpr", "tpr"], _rows(columns)


def precision(
    y_true: Any, y_probas: Any, labels: Any = None, classes_to_plot: Any = None, interp_size: int = 21
) -> Table:
    """Precision against recall, at `interp_size` recalls, never falling with a lower recall."""
    import numpy

    recalls = numpy.linspace(0, 1, interp_size)[::-1]
    columns = []
    for label, positive, score in _classes(y_true, y_probas, labels, classes_to_plot):
        false, true = _counts(positive, score)
        precise = numpy.r_[(true / numpy.maximum(true + false, 1))[::-1], 1.0]
        recall = numpy.r_[(true / true[-1] if true[-1] else numpy.ones(len(true)))[::-1], 0.0]
        precise = numpy.maximum.accumulate(precise)[::-1]
        at = numpy.searchsorted(recall[::-1], recalls, side="left")
        columns.append((label, precise[at], recalls))
    return ["class", "precision", "recall"], _rows(columns)


def _classes(y_true: Any, y_probas: Any, labels: Any, wanted: Any) -> list[tuple[Any, Any, Any]]:
    """Of each class that is to be drawn: its label, which samples are of it, and the scores it got."""
    import numpy

    if y_probas.ndim != 2 or len(y_true) != len(y_probas) or not len(y_true):
        raise ValueError(f"{len(y_true)} labels do not go with probabilities of the shape {list(y_probas.shape)}")
    classes = numpy.unique(y_true)
    if len(classes) > y_probas.shape[1]:
        raise ValueError(f"there are {len(classes)} classes, and probabilities of {y_probas.shape[1]}")
    drawn = numpy.isin(classes, classes if wanted is None else wanted)
    named = labels is not None and numpy.issubdtype(classes.dtype, numpy.integer)
    return [
        (labels[int(it)] if named else it.item(), y_true == it, y_probas[:, at])
        for at, it in enumerate(classes)
        if drawn[at]
    ]


def _counts(positive: Any, score: Any) -> tuple[Any, Any]:
    """False and true positives, when all above a score are taken for positive, for each score from the highest."""
    import numpy

    if not numpy.isfinite(score).all():
        raise ValueError("a probability is not finite")
    order = numpy.argsort(score, kind="mergesort")[::-1]
    score, positive = score[order], positive[order]
    last = numpy.r_[numpy.nonzero(numpy.diff(score))[0], len(score) - 1]
    true = numpy.cumsum(positive, dtype=numpy.float64)[last]
    return 1 + last - true, true


def _share(counts: Any) -> Any:
    import numpy

    return counts / counts[-1] if counts[-1] else numpy.full(len(counts), numpy.nan)


def _rows(columns: Sequence[tuple[Any, Any, Any]]) -> list[list[Any]]:
    total = sum(len(first) for _, first, _ in columns)
    rows: list[list[Any]] = []
    for label, first, second in columns:
        at = _spaced(len(first), total)
        rows += [
            [label, *pair] for pair in zip(first[at].round(3).tolist(), second[at].round(3).tolist(), strict=True)
        ]
    return rows


def _spaced(count: int, total: int) -> Any:
    import numpy

    if total <= MOST_ROWS:
        return numpy.arange(count)
    return numpy.unique(numpy.linspace(0, count - 1, max(2, MOST_ROWS * count // total)).round().astype(int))
