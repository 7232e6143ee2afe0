"""Ask a W&B server how much of a run it holds: the question that wandb-core asks when it resumes.

- every question has a deadline, and goes past wandb-core, which may hang
- whatever keeps the server from answering is a Retry in words for people; it is lasting where it takes one to
  heal it: no key, a wrong one, a place where there is no W&B
- the key is looked up anew for each question and kept nowhere: not in a message, a file or a log
"""

from __future__ import annotations

import base64
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import wandb
from wandb.sdk.lib import wbauth

from sidestepd import credentials
from sidestepd.errors import Retry, Trouble

DEADLINE_S = 10.0
LONGEST_PAUSE_S = 30.0
HURRY_S = 0.2

_RESUME_STATUS = """
query RunResumeStatus($project: String, $entity: String, $name: String!) {
  model(name: $project, entityName: $entity) {
    id
    bucket(name: $name, missingOk: true) {
      id
      historyLineCount
      historyTail
      eventsTail
      summaryMetrics
    }
  }
}
"""
_HISTORY = """
query HistoryPage(
  $entity: String!, $project: String!, $run: String!, $minStep: Int64!, $maxStep: Int64!, $pageSize: Int!
) {
  project(name: $project, entityName: $entity) {
    run(name: $run) { history(minStep: $minStep, maxStep: $maxStep, samples: $pageSize) }
  }
}
"""
_PAGE = 500
"""Rows that are asked for at once."""
_FORGET_SUMMARY = """
mutation UpsertBucket($name: String, $project: String, $entity: String, $summaryMetrics: JSONString) {
  upsertBucket(
    input: {name: $name, modelName: $project, entityName: $entity, summaryMetrics: $summaryMetrics}
  ) { bucket { id } }
}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What the server holds of a run: how many rows, the `_step` of the last one, or -1.

    `said_step` is the step that the summary speaks of, which wandb believes where there is no row; `sampled` the
    time of the last system sample.
    """

    rows: int = 0
    last_step: int = -1
    said_step: int = -1
    sampled: float = 0.0


class Server:
    """The W&B server at `url`. For several threads."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def held(self, run: str, project: str | None, entity: str | None) -> Held | None:
        """What it holds of a run; None if it knows of none. Raises Retry."""
        data = self._ask("RunResumeStatus", _RESUME_STATUS, name=run, project=project, entity=entity)
        bucket = (data.get("model") or {}).get("bucket")
        try:
            return None if bucket is None else _held(bucket)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise Retry(f"{self.url} answers what can not be understood: {error!r}") from error

    def rows(
        self, run: str, project: str | None, entity: str | None, steps: range
    ) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """The rows that it holds of these steps, in their order, with `_step` and values. Raises Retry."""
        for first in range(steps.start, steps.stop, _PAGE):
            page = {"minStep": first, "maxStep": min(first + _PAGE, steps.stop), "pageSize": _PAGE}
            data = self._ask("HistoryPage", _HISTORY, run=run, project=project, entity=entity, **page)
            try:
                rows = [json.loads(line) for line in data["project"]["run"]["history"]]
                yield from ((int(row["_step"]), row) for row in rows)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise Retry(f"{self.url} answers what can not be understood: {error!r}") from error

    def forget_summary(self, run: str, project: str | None, entity: str | None) -> None:
        """Empty the summary of a run that holds no row."""
        names = {"name": run, "project": project, "entity": entity}
        self._ask("UpsertBucket", _FORGET_SUMMARY, **names, summaryMetrics="{}")

    def _ask(self, operation: str, query: str, **variables: Any) -> Mapping[str, Any]:
        body = json.dumps({"operationName": operation, "query": query, "variables": variables}).encode()
        credentials = base64.b64encode(f"api:{_key(self.url)}".encode()).decode()
        headers = {"Content-Type": "application/json", "Authorization": f"Basic {credentials}"}
        request = urllib.request.Request(f"{self.url}/graphql", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE_S) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error) from None
        except TimeoutError:
            raise Retry(f"{self.url} does not answer within {DEADLINE_S:.0f} s") from None
        except ValueError:
            raise Retry(f"{self.url} does not answer as W&B does") from None
        except OSError as error:
            raise Retry(f"{self.url} can not be reached: {getattr(error, 'reason', error)}") from None
        if not isinstance(answer, dict) or answer.get("errors") or not isinstance(answer.get("data"), dict):
            raise Retry(f"{self.url} answers with an error: {json.dumps(answer)[:200]}")
        return dict(answer["data"])

    def _refusal(self, error: urllib.error.HTTPError) -> Retry:
        match error.code:
            case 401 | 403:
                hint = "`wandb login` or WANDB_API_KEY sets another"
                return Retry(f"{self.url} refuses the API key ({error.code}); {hint}", after_s=5.0, lasting=True)
            case 404:
                return Retry(f"there is no W&B at {self.url} (404)", after_s=5.0, lasting=True)
            case 429:
                return Retry(f"{self.url} asks for patience (429)", after_s=_seconds(error.headers, 5.0))
        return Retry(f"{self.url} fails with {error.code}")


def _key(url: str) -> str:
    unreadable = credentials.take(os.environ)
    try:
        auth = wbauth.authenticate_session(host=url, source="sidestep", prompt=False, update_session=False)
    except wandb.errors.Error as error:
        raise Retry(f"the API key can not be used: {error}", after_s=5.0, lasting=True) from None
    if not isinstance(auth, wbauth.AuthApiKey):
        hint = unreadable or "`wandb login` or WANDB_API_KEY sets one"
        raise Retry(f"there is no API key for {url}; {hint}", lasting=True)
    return auth.api_key


def _seconds(headers: Any, default: float) -> float:
    try:
        return float(headers.get("Retry-After"))
    except (TypeError, ValueError):
        return default


def _held(bucket: Mapping[str, Any]) -> Held:
    history = json.loads(bucket.get("historyTail") or "[]") or []
    events = json.loads(bucket.get("eventsTail") or "[]") or []
    summary = json.loads(bucket.get("summaryMetrics") or "{}") or {}
    return Held(
        rows=int(bucket.get("historyLineCount") or 0),
        last_step=int(json.loads(history[-1])["_step"]) if history else -1,
        said_step=int(summary.get("_step", -1)),
        sampled=float(json.loads(events[-1]).get("_timestamp", 0.0)) if events else 0.0,
    )


class Asker:
    """A thread that asks again and again which step the server holds, while somebody wants to know."""

    def __init__(self, ask: Callable[[], Held | None], *, every_s: float, last_step: int) -> None:
        self.last_step = last_step
        """The last step that the server was seen to hold."""
        self.trouble: Trouble | None = None
        """What keeps it from answering."""
        self.moved_at = time.monotonic()
        """When `last_step` was last seen to move, or could not be seen."""
        self._ask, self._every_s = ask, every_s
        self._wanted, self._hurry, self._over = threading.Event(), threading.Event(), threading.Event()
        threading.Thread(target=self._run, name="asker", daemon=True).start()

    def want(self, *, hurry: bool = False) -> None:
        """There are rows to be confirmed; `hurry` if nothing else is left to do."""
        if not self._wanted.is_set():
            self.moved_at = time.monotonic()
        if hurry:
            self._hurry.set()
        self._wanted.set()

    def rest(self) -> None:
        """Every row is confirmed."""
        self._wanted.clear()

    def stop(self) -> None:
        """Ask no more."""
        self._over.set()
        self._wanted.set()
        self._hurry.set()

    def _run(self) -> None:
        pause_s = min(1.0, self._every_s)  # a young run is looked at soon
        while not self._over.is_set():
            self._wanted.wait()
            if self._hurry.wait(pause_s):
                self._over.wait(min(pause_s, HURRY_S) if self.trouble is None else min(pause_s, 1.0))
            if not self._over.is_set():
                pause_s = self._look(pause_s)

    def _look(self, pause_s: float) -> float:
        """Ask once; returns how long to wait before the next time."""
        try:
            held = self._ask()
        except Retry as later:
            self.trouble = later.trouble
            self.moved_at = time.monotonic()
            return min(LONGEST_PAUSE_S, max(later.after_s, 2 * pause_s))
        self.trouble = None
        if held is not None and held.last_step > self.last_step:
            self.last_step, self.moved_at = held.last_step, time.monotonic()
        return self._every_s
