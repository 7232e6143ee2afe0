"""The GraphQL operations that wandb-core 0.31 was seen to ask. Any other is a breach."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from typing import Any

from tests.support.wandb_server.artifacts import Artifacts
from tests.support.wandb_server.store import ALERTS, EVENTS, HISTORY, OUTPUT, SUMMARY, Store

TAIL = 10
"""So many of the last lines are told of a run that is resumed."""
_UPSERTED = ("displayName", "config", "groupName", "jobType", "notes", "tags", "program", "summaryMetrics", "host")


class Refused(Exception):
    """An answer with another status than 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Answers:
    """One method per operation, by its name; each takes the variables and gives `data`."""

    def __init__(self, store: Store, *, entities: tuple[str, ...], base_url: Callable[[], str]) -> None:
        self._store, self._entities, self._base_url = store, entities, base_url
        self._artifacts = Artifacts(store, base_url=base_url)

    def __call__(self, operation: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        """The answer. Raises Refused, or KeyError for an operation that is not known."""
        known: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
            "Viewer": self._viewer,
            "ServerFeaturesQuery": self._features,
            "RunResumeStatus": self._resume_status,
            "HistoryPage": self._history,
            "UpsertBucket": self._upsert,
            "CreateRunFiles": self._create_files,
            "NotifyScriptableRunAlert": self._alert,
            **self._artifacts.operations(),
        }
        return known[operation](variables)

    def _viewer(self, _: Mapping[str, Any]) -> dict[str, Any]:
        entity = self._entities[0]
        teams = {"edges": [{"node": {"name": name}} for name in self._entities]}
        return {"viewer": {"id": _id(entity), "entity": entity, "username": entity, "flags": "{}", "teams": teams}}

    def _features(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _resume_status(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        entity, project = self._place(variables)
        name = variables["name"]
        found = self._store.run(entity, project, name)
        key = path_of(entity, project, name)
        bucket = None
        if found is not None:
            config = json.loads(found.get("config") or "{}")
            telemetry = config.get("_wandb", {}).get("value", {}).get("t")
            history, events = self._store.count(key, HISTORY), self._store.count(key, EVENTS)
            summary = self._store.lines(key, SUMMARY)
            bucket = {
                "id": _id(key),
                "name": name,
                "displayName": found.get("displayName", name),
                "summaryMetrics": summary[-1] if summary else found.get("summaryMetrics", "{}"),
                "logLineCount": self._store.count(key, OUTPUT),
                "historyLineCount": history,
                "eventsLineCount": events,
                "historyTail": json.dumps(self._store.lines(key, HISTORY, max(0, history - TAIL))),
                "eventsTail": json.dumps(self._store.lines(key, EVENTS, max(0, events - TAIL))),
                "config": found.get("config", "{}"),
                "tags": found.get("tags", []),
                "notes": found.get("notes"),
                "wandbConfig": json.dumps({"t": telemetry} if telemetry else {}),
            }
        model = {"id": _id(project), "name": project, "entity": {"id": _id(entity), "name": entity}}
        return {"model": {**model, "bucket": bucket}}

    def _history(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        lines = self._store.lines(path_of(*self._place(variables), variables["run"]), HISTORY)
        steps = range(variables["minStep"], variables["maxStep"])
        found = [line for line in lines if json.loads(line)["_step"] in steps][: variables["pageSize"]]
        return {"project": {"run": {"history": found}}}

    def _upsert(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        entity, project = self._place(variables)
        name = variables["name"]
        key = path_of(entity, project, name)
        if entity not in self._entities:
            raise Refused(404, f"entity {entity} not found during upsertBucket")
        inserted = self._store.upsert(entity, project, name, {it: variables.get(it) for it in _UPSERTED})
        if variables.get("summaryMetrics") is not None:
            self._store.replace(key, SUMMARY, [variables["summaryMetrics"]])
        found = self._store.run(entity, project, name) or {}
        bucket = {
            "id": _id(key),
            "name": name,
            "displayName": found.get("displayName", f"named-by-server-{name}"),
            "description": None,
            "config": found.get("config", "{}"),
            "sweepName": None,
            "project": {"id": _id(project), "name": project, "entity": {"id": _id(entity), "name": entity}},
            "historyLineCount": self._store.count(key, HISTORY),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _create_files(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        key = path_of(variables["entity"], variables["project"], variables["run"])
        files = [
            {"name": name, "uploadUrl": f"{self._base_url()}/storage/{key}/{name}"} for name in variables["files"]
        ]
        return {"createRunFiles": {"runID": _id(key), "uploadHeaders": [], "files": files}}

    def _alert(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        key = path_of(variables["entityName"], variables["projectName"], variables["runName"])
        said = json.dumps([variables["title"], variables["text"], variables["severity"]])
        self._store.put(key, ALERTS, self._store.count(key, ALERTS), [said])
        return {"notifyScriptableRunAlert": {"success": True}}

    def _place(self, variables: Mapping[str, Any]) -> tuple[str, str]:
        return variables.get("entity") or self._entities[0], variables.get("project") or "uncategorized"


def path_of(entity: str, project: str, name: str) -> str:
    """A run's place."""
    return f"{entity}/{project}/{name}"


def _id(name: str) -> str:
    return base64.b64encode(name.encode()).decode()
