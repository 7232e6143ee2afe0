"""What `sidestep status` counts, for Prometheus, and whether the daemon is well, for who probes by HTTP.

- off unless `serve.metrics` names an address; nothing is told but counts, and the ids of runs
- a thread of the supervisor that reads the files of the open runs when it is asked: intake has no part in it, and
  is asked only how it is
- one question at a time, and a caller that does not finish asking is hung up on
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidestep.errors import SettingsError, SidestepError
from sidestep.wire import WORKER
from sidestepd import status
from sidestepd.control import Control, unwell
from sidestepd.home import Home
from sidestepd.status import Report

if TYPE_CHECKING:
    from prometheus_client import Metric

logger = logging.getLogger(__name__)

PATIENCE_S = 5.0
"""In which a caller must have asked."""
ANSWER_S = 2.0
"""In which intake must have said how it is."""


class Metrics:
    """The HTTP server of a daemon that serves from `home`; None is at no address, and does nothing."""

    def __init__(self, home: Home, address: str | None) -> None:
        self._home, self._address = home, address
        self._server: HTTPServer | None = None

    @property
    def port(self) -> int:
        """Where it listens; 0 while it does not."""
        return int(self._server.server_address[1]) if self._server else 0

    def start(self) -> None:
        """Listen. Raises SettingsError if that can not be."""
        if not self._address:
            return
        host, _, port = self._address.rpartition(":")
        try:
            self._server = HTTPServer((host, int(port)), _handler(self._home))
        except (OSError, OverflowError) as error:
            source = self._home.options.source("serve.metrics")
            raise SettingsError(f"serve.metrics = {self._address} (from {source}): {error}") from None
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def stop(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


def _handler(home: Home) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = PATIENCE_S

        def do_GET(self) -> None:
            if self.path == "/metrics":
                from prometheus_client.exposition import CONTENT_TYPE_LATEST

                self._say(HTTPStatus.OK, CONTENT_TYPE_LATEST, exposition(home))
            elif self.path == "/healthz":
                why = _why_unwell(home)
                code = HTTPStatus.SERVICE_UNAVAILABLE if why else HTTPStatus.OK
                self._say(code, "text/plain; charset=utf-8", f"{why or 'well'}\n".encode())
            else:
                self._say(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"/metrics or /healthz\n")

        def _say(self, code: HTTPStatus, kind: str, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - the library's name
            logger.debug(format, *arguments)

    return Handler


def _why_unwell(home: Home) -> str:
    with Control(home.address) as control:
        return unwell(control.ask_status(ANSWER_S))


def exposition(home: Home) -> bytes:
    """All metrics, in Prometheus' text format."""
    from prometheus_client import CollectorRegistry, generate_latest

    class Collector:
        def collect(self) -> Iterable[Metric]:
            return list(_collect(home))

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector())
    return bytes(generate_latest(registry))


def _collect(home: Home) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    found = list(_reports(home.open_runs))
    yield GaugeMetricFamily("sidestep_up", "Whether intake answers, and its disk does.", not _why_unwell(home))
    yield GaugeMetricFamily("sidestep_runs", "Runs that are open.", len(found))
    for name, what, values in _COUNTED:
        counter = CounterMetricFamily(f"sidestep_{name}", what, labels=["run", *_label(name)])
        for report in found:
            for label, value in values(report).items():
                counter.add_metric([report.run.id, *filter(None, [label])], value)
        yield counter
    for name, what, measure in _MEASURED:
        gauge = GaugeMetricFamily(f"sidestep_{name}", what, labels=["run"])
        for report in found:
            gauge.add_metric([report.run.id], measure(report))
        yield gauge
    workers = GaugeMetricFamily("sidestep_workers", "Workers of open runs.", labels=["run", "state"])
    for report in found:
        states = Counter(session.state for session in report.sessions if session.role == WORKER)
        for state in ("live", "bye", "lost"):
            workers.add_metric([report.run.id, state], states[state])
    yield workers


def _label(name: str) -> list[str]:
    return ["reason"] if name in ("records_rejected", "records_dropped", "media_left_out") else []


_COUNTED: tuple[tuple[str, str, Callable[[Report], Mapping[str, float]]], ...] = (
    ("records_offered", "What workers said.", lambda report: {"": report.ledger.offered}),
    ("records_delivered", "What is in the run.", lambda report: {"": report.ledger.delivered}),
    ("records_rejected", "What the sink refused for good.", lambda report: report.ledger.rejected),
    ("records_dropped", "What was given up.", lambda report: report.ledger.dropped),
    ("records_unknown", "Offered by workers that were lost, and never seen.",
     lambda report: {"": report.ledger.unknown}),
    ("values_refused", "Values that workers left out of records.",
     lambda report: {"": report.ledger.values_refused}),
    ("rows", "Rows in the run.", lambda report: {"": report.rows}),
    ("late_rows", "Rows that came after their turn.", lambda report: {"": report.late_rows}),
    ("media_delivered", "Media in the run.", lambda report: {"": report.media.get("delivered", 0)}),
    ("media_left_out", "Media that are not in the run.", lambda report: report.media.get("left_out", {})),
    ("alerts", "What people were told.", lambda report: {"": len(report.alerts)}),
)  # fmt: skip
_MEASURED: tuple[tuple[str, str, Callable[[Report], float]], ...] = (
    ("records_pending", "On their way, in workers or on disk.", lambda report: report.ledger.pending),
    ("spool_bytes", "What the spool takes on disk.", lambda report: report.spool_bytes),
    ("blob_bytes", "What media that wait take on disk.", lambda report: report.media.get("bytes", 0)),
    ("full", "Whether workers keep what they have, as there is no room.", lambda report: report.full),
    ("troubles", "Alerts whose causes last.", lambda report: len(report.troubles)),
    ("hindered", "Whether something keeps rows from the sink.", lambda report: bool(report.trouble)),
    ("last_step", "The highest step in the run.", lambda report: report.last_step or 0),
)


def _reports(run_dirs: Iterable[Path]) -> Iterator[Report]:
    """Of the runs that can be read now; one that is just being made or finished is left out."""
    for run_dir in run_dirs:
        try:
            yield status.report(run_dir)
        except (OSError, sqlite3.Error, SidestepError) as error:
            logger.debug("no metrics of %s: %s", run_dir, error)
