"""What `define_metric` can be told: the names of reductions and summaries, known on both sides of the wire."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

REDUCTIONS = frozenset({"mean", "min", "max", "sum", "std", "count", "first", "last", "argmax_rank", "per_rank"})
"""What can be made of several ranks' values; `mean:NAME` too, weighted by the metric NAME."""
SUMMARIES = frozenset({"min", "max", "mean", "first", "last", "none"})
"""What wandb makes of a name's rows for the summary."""
_NO_OPERATION = frozenset({"best", "copy"})
"""wandb's too: what `goal` says, and its default."""


def is_reduction(name: object) -> bool:
    """Whether there is such a reduction."""
    return isinstance(name, str) and (name in REDUCTIONS or (name.startswith("mean:") and name != "mean:"))


def complaints(definition: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The attributes of a plain definition that mean nothing, each with what is wrong."""
    reduce, summary = definition.get("reduce"), definition.get("summary")
    for name in reduce if isinstance(reduce, list) else [] if reduce is None else [reduce]:
        if not is_reduction(name):
            known = ", ".join(sorted(REDUCTIONS))
            yield "reduce", f"reduce={name!r:.80} is unknown: one of {known}, mean:NAME_OF_THE_WEIGHT"
            break
    if summary is None:
        return
    names = {name.strip() for name in summary.split(",")} if isinstance(summary, str) else {str(summary)}
    if not names <= SUMMARIES | _NO_OPERATION:
        yield (
            "summary",
            f"summary={summary!r:.80} is unknown: some of {', '.join(sorted(SUMMARIES | _NO_OPERATION))}",
        )
