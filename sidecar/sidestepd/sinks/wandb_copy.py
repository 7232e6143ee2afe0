"""An offline run into a run on a server: its rows as they are, with the time since the run's start that each had.

A row is published as the history record that wandb-core would make of it. `run.log` would give it the time since
this copy began, and the charts over relative time would show a run that took a second.

Artifacts, media and files go up behind the rows. Which artifacts the server has committed is written down beside,
so that a copy that is taken up again sends no earlier version of one once more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as pb

from sidestepd.errors import Retry
from sidestepd.rows import Row
from sidestepd.sinks import wandb_carry, wandb_log
from sidestepd.sinks.wandb_online import OnlineSink

SENT = "artifacts.sent"
"""The client ids of the artifacts that the server has, a line each."""


class CopySink(OnlineSink):
    """Of the run whose segments lie in a directory; its system samples go with it."""

    def __init__(self, segments: Path, *, began: Callable[[], None]) -> None:
        super().__init__()
        self.begin = began  # type: ignore[method-assign]
        self._segments = segments
        self._samples_are_sent = self._rest_is_sent = False

    def _send(self, row: Row) -> Sequence[str]:
        record = pb.HistoryRecord()  # type: ignore[attr-defined]
        record.step.num = row.step
        for name, value in {**row.values, "_timestamp": row.time, "_step": row.step}.items():
            record.item.add(key=name, value_json=json.dumps(value))
        self._publish(history=record)
        return ()

    def close(self, exit_code: int) -> None:
        """Send the samples that the server lacks before the run is finished."""
        if not self._samples_are_sent:
            self._send_samples()
            self._samples_are_sent = True
        if not self._rest_is_sent:
            self._send_the_rest()
            self._rest_is_sent = True
        super().close(exit_code)

    def _send_the_rest(self) -> None:
        run = self._open_run
        noted = Path(run.settings.sync_dir).parents[1] / SENT
        known = set(noted.read_text().split()) if noted.exists() else set()

        def hand_over(record: Any) -> None:
            asked = pb.LogArtifactRequest(artifact=record)  # type: ignore[attr-defined]
            interface: Any = run._interface
            answer = interface._deliver_artifact(asked).wait_or(timeout=None)
            if why := answer.response.log_artifact_response.error_message:
                raise Retry(f"W&B does not take the artifact {record.name}: {why:.200}", after_s=5.0)
            with noted.open("a") as file:
                file.write(f"{record.client_id}\n")
            known.add(record.client_id)

        wandb_carry.carry_files(run, self._segments)
        wandb_carry.carry_artifacts(run, self._segments, skip=known, hand_over=hand_over)

    def _send_samples(self) -> None:
        for path in wandb_log.segments(self._segments):
            for record in wandb_log.records(path):
                if record.HasField("stats") and record.stats.timestamp.ToNanoseconds() / 1e9 > self.held.sampled:
                    self._publish(stats=record.stats)
