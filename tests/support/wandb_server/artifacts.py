"""The part of the server that keeps artifacts: versions of a name, committed when all their files are there.

- what is created with the digest of the newest version of its name is that version, with more aliases: so a client
  that sends one again adds nothing
- a version that is committed without a manifest, or without one of its files, is a breach
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any

from tests.support.wandb_server.store import Breach, Store

NOW = "2026-01-01T00:00:00"


def _name_of(said: Mapping[str, Any]) -> str:
    return str(said.get("artifactCollectionName") or said["artifactCollectionNames"][0])


class Artifacts:
    """One method per operation."""

    def __init__(self, store: Store, *, base_url: Callable[[], str]) -> None:
        self._store, self._base_url = store, base_url

    def operations(self) -> dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]]:
        """By their names."""
        return {
            "ArtifactType": self._type,
            "CreateArtifact": self._create,
            "CreateArtifactManifest": self._manifest,
            "CreateArtifactFiles": self._files,
            "CommitArtifact": self._commit,
            "ArtifactByID": self._by_id,
        }

    def _type(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        name = variables["name"].partition(":")[0]
        newest = self._newest(variables["entity"], variables["project"], name)
        found = None if newest is None else {"artifactType": {"name": newest["type"]}}
        return {"project": {"artifact": found}}

    def _create(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        said = variables["input"]
        place = said["entityName"], said["projectName"], _name_of(said)
        aliases = [it["alias"] for it in said.get("aliases") or ()]
        newest = self._newest(*place)
        if newest is not None and newest["digest"] == said["digest"]:
            newest["aliases"] = sorted({*newest["aliases"], *aliases})
            self._store.put_artifact(newest["id"], newest)
            return self._created(newest)
        made = {
            "id": base64.b64encode(f"Artifact:{len(self._store.artifacts())}".encode()).decode(),
            "place": list(place),
            "type": said["artifactTypeName"],
            "digest": said["digest"],
            "client_id": said.get("clientID"),
            "run": said.get("runName"),
            "description": said.get("description"),
            "metadata": said.get("metadata"),
            "aliases": aliases,
            "state": "PENDING",
            "files": {},
            "manifest": None,
        }
        self._store.put_artifact(made["id"], made)
        return self._created(made)

    def _created(self, artifact: Mapping[str, Any]) -> dict[str, Any]:
        sequence = {"latestArtifact": None}
        told = {"id": artifact["id"], "state": artifact["state"], "artifactSequence": sequence}
        return {"createArtifact": {"artifact": told}}

    def _manifest(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        artifact = self._of(variables["artifactID"])
        artifact["manifest"] = variables["digest"]
        self._store.put_artifact(artifact["id"], artifact)
        url = f"{self._base_url()}/storage/manifest/{artifact['id']}"
        file = {"id": artifact["id"], "uploadUrl": url, "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": artifact["id"], "file": file}}}

    def _files(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        edges = []
        for said in variables["input"]["artifactFiles"]:
            artifact = self._of(said["artifactID"])
            artifact["files"][said["name"]] = said["md5"]
            self._store.put_artifact(artifact["id"], artifact)
            url = f"{self._base_url()}/storage/artifact/{said['md5'].replace('/', '_')}"
            node = {
                "storagePath": f"wandb_artifacts/{said['name']}",
                "uploadUrl": url,
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": artifact["id"]},
            }
            edges.append({"node": node})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _commit(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        artifact = self._of(variables["artifactID"])
        if artifact["manifest"] is None:
            raise Breach(f"{artifact['place']} is committed without a manifest")
        artifact["state"] = "COMMITTED"
        self._store.put_artifact(artifact["id"], artifact)
        return {"commitArtifact": {"artifact": {"id": artifact["id"], "digest": artifact["digest"]}}}

    def _by_id(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        artifact = self._of(variables["id"])
        entity, project, name = artifact["place"]
        of = {"__typename": "Project", "id": "p", "internalId": "p", "name": project, "entity": {"name": entity}}
        told = {
            "__typename": "Artifact",
            "id": artifact["id"],
            "artifactSequence": {"__typename": "ArtifactSequence", "name": name, "project": of},
            "versionIndex": artifact.get("version", 0),
            "artifactType": {"name": artifact["type"]},
            "description": artifact["description"],
            "metadata": artifact["metadata"],
            "ttlDurationSeconds": -1,
            "ttlIsInherited": True,
            "tags": [],
            "historyStep": None,
            "state": artifact["state"],
            "size": 0,
            "digest": artifact["digest"],
            "commitHash": None,
            "fileCount": len(artifact["files"]),
            "createdAt": NOW,
            "updatedAt": NOW,
            "aliases": [],
        }
        return {"artifact": told}

    def _of(self, id_: str) -> dict[str, Any]:
        return next(it for it in self._store.artifacts() if it["id"] == id_)

    def _newest(self, entity: str, project: str, name: str) -> dict[str, Any] | None:
        known = [it for it in self._store.artifacts() if it["place"] == [entity, project, name]]
        return next((it for it in reversed(known) if it["state"] == "COMMITTED"), None)
