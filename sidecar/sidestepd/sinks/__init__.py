"""Where rows go, one file per kind. A new sink is one file and one line here."""

from sidestepd.sinks.base import Confirmed, Rejected, RunFacts, Sink, write_all

__all__ = ["KINDS", "Confirmed", "Rejected", "RunFacts", "Sink", "make_sink", "write_all"]

KINDS = ("wandb", "jsonl")


def make_sink(kind: str) -> Sink:
    """A sink by its name. Only here, and only when asked for, is wandb imported."""
    if kind == "wandb":
        from sidestepd.sinks.wandb import WandbSink

        return WandbSink()
    if kind == "jsonl":
        from sidestepd.sinks.jsonl import JsonlSink

        return JsonlSink()
    raise ValueError(f"unknown sink {kind!r}: one of {', '.join(KINDS)}")
