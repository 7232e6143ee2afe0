"""Where rows go, one file per kind. A new sink is one file and one line here."""

from sidestepd.sinks.base import Confirmed, Rejected, RunFacts, Sink, patiently, write_all

__all__ = [
    "KINDS",
    "MODES",
    "Confirmed",
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
    """Import what a kind needs, which may take its time. Only here, and only when asked for, is wandb imported."""
    if kind == "wandb":
        import sidestepd.sinks.wandb
        import sidestepd.sinks.wandb_online  # noqa: F401


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
