"""Where rows go, one file per kind. A new sink is one file and one line here."""

import asyncio

from sidestepd.sinks.base import Confirmed, LeftOut, Rejected, RunFacts, Sink, patiently, write_all

__all__ = [
    "KINDS",
    "MODES",
    "Confirmed",
    "LeftOut",
    "Rejected",
    "RunFacts",
    "Sink",
    "load",
    "make_sink",
    "patiently",
    "write_all",
]

MODES = {"wandb": ("offline", "online"), "jsonl": ("offline",)}
"""What each kind can do with a run's mode; a kind that has no network is offline in all of them."""
KINDS = tuple(MODES)


def load(kind: str) -> None:
    """Import what a kind needs, which may take its time. Only here, and only when asked for, is wandb imported.

    The thread in which wandb speaks to wandb-core runs an event loop of this process's policy.
    """
    if kind == "wandb":
        import uvloop

        import sidestepd.sinks.wandb
        import sidestepd.sinks.wandb_online  # noqa: F401

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())


def make_sink(kind: str, mode: str = "offline") -> Sink:
    """A sink by its name."""
    if kind == "wandb" and mode == "online":
        from sidestepd.sinks.wandb_online import OnlineSink

        return OnlineSink()
    if kind == "wandb":
        from sidestepd.sinks.wandb import OfflineSink

        return OfflineSink()
    if kind == "jsonl":
        from sidestepd.sinks.jsonl import JsonlSink

        return JsonlSink()
    raise ValueError(f"unknown sink {kind!r}: one of {', '.join(KINDS)}")
