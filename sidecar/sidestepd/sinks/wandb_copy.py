"""Rows of an offline run into a run on a server, as they are: with the time since the run's start that each had.

A row is published as the history record that wandb-core would make of it. `run.log` would give it the time since
this copy began, and the charts over relative time would show a run that took a second.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from wandb.proto import wandb_internal_pb2 as pb

from sidestepd.rows import Row
from sidestepd.sinks import wandb_log
from sidestepd.sinks.wandb_online import OnlineSink


class CopySink(OnlineSink):
    """Of the run whose segments lie in a directory; its system samples go with it."""

    def __init__(self, segments: Path, *, began: Callable[[], None]) -> None:
        super().__init__()
        self.begin = began  # type: ignore[method-assign]
        self._segments = segments
        self._samples_are_sent = False

    def _send(self, row: Row) -> None:
        record = pb.HistoryRecord()  # type: ignore[attr-defined]
        record.step.num = row.step
        for name, value in {**row.values, "_timestamp": row.time, "_step": row.step}.items():
            record.item.add(key=name, value_json=json.dumps(value))
        self._publish(history=record)

    def close(self, exit_code: int) -> None:
        """Send the samples that the server lacks before the run is finished."""
        if not self._samples_are_sent:
            self._send_samples()
            self._samples_are_sent = True
        super().close(exit_code)

    def _send_samples(self) -> None:
        for path in wandb_log.segments(self._segments):
            for record in wandb_log.records(path):
                if record.HasField("stats") and record.stats.timestamp.ToNanoseconds() / 1e9 > self.held.sampled:
                    self._publish(stats=record.stats)
