"""What the run and people are told beside rows: system samples, alerts, output, configuration, summary, names.

- samples, alerts, and what programs printed and are, are told at most once: that they are is written down before
- configuration, summary and names are told again after each start, which changes nothing
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sidestepd.assemble import Assembler
from sidestepd.beside import Beside
from sidestepd.config import Config
from sidestepd.crashpoints import crash_point
from sidestepd.resolve import Resolver
from sidestepd.rowlog import RowLog
from sidestepd.rows import Alert, Printed, Raised
from sidestepd.samples import Samples
from sidestepd.sinks import Sink
from sidestepd.watch import Watch

logger = logging.getLogger("sidestepd.delivery")


class Telling:
    """Takes what the stages have to say, and says it."""

    def __init__(
        self,
        sink: Sink,
        rowlog: RowLog,
        config: Config,
        resolver: Resolver,
        assembler: Assembler,
        samples: Samples,
        watch: Watch,
        beside: Beside,
    ) -> None:
        self._sink, self._rowlog, self._alerts = sink, rowlog, config.watch.alerts
        self._resolver, self._assembler, self._samples, self._watch = resolver, assembler, samples, watch
        self._beside = beside
        self._config_told: dict[str, Any] = {}
        self._summary_told: dict[str, Any] = {}
        self._named_told: dict[str, Any] = {}
        self.refused: set[str] = set()
        """Names of the configuration and of the summary whose values the sink does not take."""
        self.about: Callable[[], None] = lambda: None
        """Write down anew what only the sink knows of the run."""

    def tell_samples(self, now: float) -> None:
        """Send samples and alerts of the samplers out.

        That they are sent is written down before, and so are the alerts themselves: one that a crash keeps from
        the sink is in the run's status all the same.
        """
        samples, raised = self._samples.take()
        alerts = [_told_once(said, now) for said in raised]
        if samples or alerts:  # of which the watch has judged nothing
            self._rowlog.warn(alerts, through=0, streamed=list(self._samples.streamed))
            crash_point("delivery.stream")
        for sample in samples:
            self._sink.sample(sample)
        self._announce(alerts)

    def tell_beside(self) -> None:
        """Send what programs printed, and what they are: at most once, as samples."""
        if said := self._beside.take():
            self._rowlog.settle(beside=list(self._beside.told))
            crash_point("delivery.beside")
        for one in said:
            if isinstance(one, Printed):
                self._sink.printed(one)
            else:
                self._sink.described(one)

    def tell_alerts(self, now: float, *, through: int) -> None:
        """Tell people what the watch finds, which has seen the spool up to entry `through`."""
        self._watch.poll(now)
        if alerts := self._watch.take():
            self._rowlog.warn(alerts, through=through)
            crash_point("delivery.alert")
            self._announce(alerts)

    def _announce(self, alerts: Sequence[Alert]) -> None:
        """Tell people what is written down already, and so at most once."""
        for alert in alerts:
            logger.warning("%s: %s", alert.title, alert.text)
            if self._alerts:
                self._sink.alert(alert.title, alert.text, alert.level)

    def tell_config(self) -> None:
        """Send what workers set of the configuration and the summary since this was done last."""
        for what, said, told, tell in (
            ("config", self._resolver.config, self._config_told, self._sink.config),
            ("summary", self._resolver.summary, self._summary_told, self._sink.summary),
            ("named", self._resolver.named, self._named_told, self._name),
        ):
            changed = {name: pair[1] for name, pair in said.items() if told.get(name) is not pair}
            if changed:
                self.refused -= {f"{what}/{name}" for name in changed}
                self.refused |= {f"{what}/{name}" for name in tell(changed)}
                told.update(said)

    def _name(self, values: Mapping[str, Any]) -> Sequence[str]:
        """Call the run otherwise, and have workers and tools know."""
        self._sink.named(values)
        self.about()
        return ()

    def tell_summary(self, totals: Mapping[str, int]) -> None:
        """Send the summary of the whole run."""
        self._sink.summary({**self._assembler.aggregated(), **self._set_by_workers(), **totals})

    def _set_by_workers(self) -> dict[str, Any]:
        """What workers set of the summary, except where a row said something later."""
        latest = self._assembler.latest
        return {
            name: value
            for name, (time, value) in self._resolver.summary.items()
            if name not in latest or latest[name].time <= time
        }


def _told_once(said: Raised, now: float) -> Alert:
    """What a session raised, as people are told: whether its cause lasts, only its session knows."""
    cause = f"raised/{said.position.entry}/{said.position.seq}"
    return Alert(cause=cause, title=said.title, text=said.text, level=said.level, time=now, over=True)
