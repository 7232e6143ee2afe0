"""One life of a sink, in a process of its own: what it is told over a pipe, it does and answers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import wandb  # so that lives which are forked from a process that holds this module have it already

from sidestepd.errors import Reject, Retry
from sidestepd.rows import Content, Definition, Row, Sample, Version
from sidestepd.show import BlobFiles
from sidestepd.sinks import Confirmed, RunFacts, Sink, make_sink, patiently


def live(pipe: Connection, kind: str, directory: Path, environment: Mapping[str, str]) -> None:
    """Until the pipe ends, or this process is killed."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    os.environ.update(environment)
    sink, mode = make_sink(*kind.split()), kind.split()[1]
    run = RunFacts(
        id="tested", directory=directory, mode=mode, project="p", options={"tags": ["t"]}, ask_every_s=0.2
    )
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            os._exit(0)
        pipe.send(do(sink, run, name, *arguments))


def do(sink: Sink, run: RunFacts, name: str, *arguments: Any) -> Any:
    """Call a method of the sink with plain arguments; what it gives back is plain too."""
    result = None
    match name:
        case "open":
            result = _plain(patiently(lambda: sink.open(run, arguments[0]), beat=_nothing))
        case "write":
            result = [name for row in _rows(*arguments) for name in sink.write(row)] or None
        case "try_write":
            try:
                return do(sink, run, "write", *arguments)
            except Retry as later:
                return str(later)
        case "set":
            setattr(sink, *arguments)
        case "confirm":
            result = _plain(sink.confirm())
        case "define":
            sink.define([Definition(name=name, step_metric=axis) for name, axis in arguments[0]])
        case "sample":
            time, node, values = arguments
            sink.sample(Sample(time=time, node=node, values=values))
        case "about":
            result = dict(sink.about())
        case "close":
            patiently(lambda: sink.close(*arguments), beat=_nothing)
        case _:
            result = _other(sink, run, name, *arguments)
    return result


def _other(sink: Sink, run: RunFacts, name: str, *arguments: Any) -> Any:
    if name == "keep_file":
        return _keep_file(sink, run, *arguments)
    return _media(sink, run, name, *arguments) if "media" in name else getattr(sink, name)(*arguments)


def _keep_file(sink: Sink, run: RunFacts, path: str) -> str:
    """Save a file under a path in the run; why not, if it can not be."""
    (source := run.directory / "source").write_text("x")
    try:
        sink.keep(Version(id=path, time=0.0, facts=None, contents=(Content(path=path, file=source),)), None)
    except Reject as refusal:
        return refusal.reason
    return ""


def _media(sink: Sink, run: RunFacts, name: str, value: Any = None) -> Any:
    """Show a value; or write a row with a page in it, and something else that wandb has no form for."""
    if name == "write_media":
        page, odd = wandb.Html("<p>good</p>"), [[wandb.Html("")]]
        return sink.write(
            replace(
                next(_rows([0], {})), values={"page": page, "odd": odd, "n" * 300: wandb.Html("n"), "loss": 1.0}
            )
        )
    try:
        return repr(sink.show(value, BlobFiles(run.directory, run.directory / "shown", {})))
    except ValueError as error:
        return str(error)


def _plain(confirmed: Confirmed) -> dict[str, Any]:
    trouble = confirmed.trouble.what if confirmed.trouble else None
    return {"steps": list(confirmed.steps), "bookmark": dict(confirmed.bookmark), "trouble": trouble}


def _rows(steps: Sequence[int], values: Mapping[str, Any]) -> Iterator[Row]:
    for step in steps:
        held = {"loss": step * 1.0, "global_step": step}
        for name, it in values.items():  # JSON has no bytes
            held[name] = bytes.fromhex(it["bytes"]) if isinstance(it, dict) and "bytes" in it else it
        yield Row(step=step, time=step + 0.5, values=held, places={"global_step": step}, positions=())


def _nothing() -> None:
    pass
