"""Pods of Kubernetes by podman: what a kubelet makes of a manifest, as far as our overlays use it.

- init containers one after the other; native sidecars stay, and their startupProbe is waited for
- containers of a pod have one host name and one network, and pids of their own
- a root that is read-only has nothing to write but volumes; a directory of the host is root's when it is made, a
  claim and an emptyDir are the group's (`fsGroup`), a secret is root's and the group's behind links
- a pod ends as there: SIGTERM to the containers, and when they have ended to the sidecars, within one grace period

Anything in a manifest that is not known here is an error.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.images import Podman
from tests.support.waiting import eventually

WAIT_S = 120.0
Manifest = Mapping[str, Any]
_OF_A_POD = {
    "serviceAccountName", "automountServiceAccountToken", "restartPolicy", "terminationGracePeriodSeconds",
    "securityContext", "initContainers", "containers", "volumes", "priorityClassName", "nodeSelector",
    "tolerations", "runtimeClassName", "subdomain",
}  # fmt: skip
_OF_A_CONTAINER = {
    "name", "image", "command", "args", "env", "envFrom", "ports", "volumeMounts", "securityContext", "resources",
    "restartPolicy", "startupProbe", "livenessProbe", "readinessProbe",
}  # fmt: skip


class Cluster:
    """What was applied, and the disks of its nodes; `images` says what an image is called here."""

    def __init__(self, podman: Podman, folder: Path, images: Mapping[str, str]) -> None:
        self.podman, self.images = podman, images
        self.folder = folder
        folder.chmod(0o755)
        self._objects: dict[tuple[str, str], Manifest] = {}
        self.hosts = folder / "hosts"
        self.hosts.write_text("127.0.0.1 localhost\n")

    def apply(self, manifests: Sequence[Manifest]) -> None:
        """Remember what there is; nothing is started."""
        for one in manifests:
            self._objects[one["kind"], one["metadata"]["name"]] = one
            if one["kind"] == "Service":  # all pods of a test have one loopback
                self.hosts.write_text(f"{self.hosts.read_text()}127.0.0.1 {one['metadata']['name']}\n")

    def secret(self, name: str, **data: bytes) -> None:
        """As `kubectl create secret generic` makes it; a point in a name is a double underscore here."""
        encoded = {key.replace("__", "."): base64.b64encode(value).decode() for key, value in data.items()}
        self._objects["Secret", name] = {"data": encoded}

    def of(self, kind: str, name: str) -> Manifest:
        """What was applied by that name."""
        return self._objects[kind, name]

    def has(self, kind: str, name: str) -> bool:
        """Whether it was."""
        return (kind, name) in self._objects

    def claim(self, name: str) -> Path:
        """Where a claim's volume lies."""
        assert self.has("PersistentVolumeClaim", name), name
        return self._made(self.folder / "claims" / name, mode=0o755)

    def on_host(self, node: str, path: str) -> Path:
        """A directory of a node."""
        return self._made(self.folder / "nodes" / node / path.strip("/"), mode=0o755)

    def _made(self, path: Path, *, mode: int) -> Path:
        if not path.exists():
            path.mkdir(parents=True)
            path.chmod(mode)
        return path


class Pod:
    """One pod of a workload."""

    def __init__(
        self, cluster: Cluster, workload: Manifest, name: str, *, node: str, network: str = "none", index: str = ""
    ) -> None:
        self.cluster, self.name, self._node, self._network = cluster, name, node, network
        template = workload["spec"]["template"]
        self.spec = template["spec"]
        assert set(self.spec) <= _OF_A_POD, set(self.spec) - _OF_A_POD
        self._labels = dict(template.get("metadata", {}).get("labels", {}))
        if workload["kind"] == "Job":
            self._labels["batch.kubernetes.io/job-name"] = workload["metadata"]["name"]
        self._index = index
        if "subdomain" in self.spec:
            whole = f"{name}.{self.spec['subdomain']}"
            hosts = self.cluster.hosts.read_text()
            self.cluster.hosts.write_text(f"{hosts}127.0.0.1 {whole}.default.svc.cluster.local {whole} {name}\n")
        self._group = self.spec.get("securityContext", {}).get("fsGroup")
        inits = self.spec.get("initContainers", [])
        self.sidecars = [one["name"] for one in inits if one.get("restartPolicy") == "Always"]
        self._volumes = {one["name"]: self._volume(one) for one in self.spec.get("volumes", [])}

    # Life

    def start(self) -> None:
        """Its containers, in their order; each is up when its startupProbe says so."""
        for container in self.spec.get("initContainers", []):
            self.run(container["name"])
            if container["name"] not in self.sidecars:
                assert 0 == self.exit_code(container["name"]), self.logs(container["name"])
        for container in self.spec["containers"]:
            self.run(container["name"])

    def run(self, name: str) -> None:
        """Start a container, or another in its place."""
        self.cluster.podman.do("run", "--detach", "--replace", *self._words(self._container(name)))
        if "startupProbe" in self._container(name):
            eventually(lambda: self.probe(name, "startupProbe"), WAIT_S, lambda: self.logs(name))

    def probe(self, name: str, which: str) -> bool:
        """Whether it is well."""
        words = self._container(name)[which]["exec"]["command"]
        return self.cluster.podman.run("exec", self.called(name), *words).returncode == 0

    def kill(self, name: str) -> None:
        """As the kernel does where memory is short."""
        self.cluster.podman.do("kill", "--signal", "KILL", self.called(name))

    def end(self, within_s: int | None = None) -> None:
        """Delete it, or have it end since its containers have; `within_s` is what is left of its grace period."""
        grace = str(self.spec["terminationGracePeriodSeconds"] if within_s is None else within_s)
        mains = [one["name"] for one in self.spec["containers"]]
        for name in [*mains, *self.sidecars]:
            self.cluster.podman.do("stop", "--time", grace, self.called(name))

    def exit_code(self, name: str) -> int:
        """Of a container, once it has ended."""
        return self.cluster.podman.exit_code(self.called(name))

    def logs(self, name: str) -> str:
        """What a container said."""
        return self.cluster.podman.logs(self.called(name))

    def called(self, name: str) -> str:
        """A container's name here."""
        return f"{self.name}-{name}"

    def volume(self, name: str) -> Path:
        """Where one of its volumes lies."""
        return self._volumes[name]

    # What podman is told

    def _container(self, name: str) -> Manifest:
        found = [*self.spec.get("initContainers", []), *self.spec["containers"]]
        (one,) = (one for one in found if one["name"] == name)
        assert set(one) <= _OF_A_CONTAINER, set(one) - _OF_A_CONTAINER
        return one  # type: ignore[no-any-return]

    def _words(self, container: Manifest) -> list[str]:
        image = self.cluster.images[container["image"]]
        entry = [f"--entrypoint={json.dumps(container['command'])}"] if "command" in container else []
        mounts = [
            f"--volume={self._volumes[one['name']]}:{one['mountPath']}{':ro' if one.get('readOnly') else ''}"
            for one in container.get("volumeMounts", [])
            if one["name"] in self._volumes
        ]
        return [
            f"--name={self.called(container['name'])}", f"--network={self._network}", "--no-hosts",
            *([] if self._network.startswith("container:") else [f"--hostname={self.name}"]),
            f"--volume={self.cluster.hosts}:/etc/hosts:ro", *self._locks(container.get("securityContext", {})),
            *(f"--env={name}={value}" for name, value in self._environ(container).items()), *mounts, *entry,
            image, *container.get("args", []),
        ]  # fmt: skip

    def _locks(self, context: Manifest) -> list[str]:
        user, group = context.get("runAsUser"), context.get("runAsGroup")
        assert not context.get("runAsNonRoot") or user != 0
        words = [] if user is None else [f"--user={user}" if group is None else f"--user={user}:{group}"]
        words += [] if self._group is None else [f"--group-add={self._group}"]
        words += ["--read-only", "--read-only-tmpfs=false"] if context.get("readOnlyRootFilesystem") else []
        words += ["--security-opt=no-new-privileges"] if context.get("allowPrivilegeEscalation") is False else []
        words += [f"--cap-drop={one}" for one in context.get("capabilities", {}).get("drop", [])]
        return words + [f"--cap-add={one}" for one in context.get("capabilities", {}).get("add", [])]

    def _environ(self, container: Manifest) -> dict[str, str]:
        environ: dict[str, str] = {}
        for source in container.get("envFrom", []):
            environ |= self.cluster.of("ConfigMap", source["configMapRef"]["name"])["data"]
        for one in container.get("env", []):
            match one:
                case {"value": value}:
                    environ[one["name"]] = value
                case {"valueFrom": {"secretKeyRef": {"name": name, "key": key}}}:
                    environ[one["name"]] = base64.b64decode(self.cluster.of("Secret", name)["data"][key]).decode()
                case {"valueFrom": {"fieldRef": {"fieldPath": path}}}:
                    environ[one["name"]] = self._field(path)
        return environ | ({"JOB_COMPLETION_INDEX": self._index} if self._index else {})

    def _field(self, path: str) -> str:
        if path == "spec.nodeName":
            return self._node
        kind, _, name = path.removesuffix("']").partition("['")
        if (kind, name) == ("metadata.annotations", "batch.kubernetes.io/job-completion-index"):
            return self._index
        assert kind == "metadata.labels", path
        return str(self._labels[name])

    def _volume(self, volume: Manifest) -> Path:
        match volume:
            case {"emptyDir": _}:
                path = self.cluster.folder / "pods" / self.name / volume["name"]
                path.mkdir(parents=True)
                return self._grouped(path, 0o777)
            case {"persistentVolumeClaim": {"claimName": name}}:
                return self._grouped(self.cluster.claim(name), 0o775)
            case {"hostPath": {"path": where, "type": kind}}:
                there = (self.cluster.folder / "nodes" / self._node / where[1:]).is_dir()
                assert there or kind == "DirectoryOrCreate", f"no {where}: the pod would not start"
                return self.cluster.on_host(self._node, where)
            case {"secret": secret}:
                return self._secret(volume["name"], secret)
        raise AssertionError(f"a volume that is not known here: {volume}")

    def _grouped(self, path: Path, mode: int) -> Path:
        if self._group is not None:
            os.chown(path, -1, self._group)
            path.chmod(mode | 0o2000)
        else:
            path.chmod(mode)
        return path

    def _secret(self, name: str, secret: Manifest) -> Path:
        """Files of a version behind a link, and a link to each."""
        path = self.cluster.folder / "pods" / self.name / name
        (path / "..first").mkdir(parents=True)
        (path / "..data").symlink_to("..first")
        if not self.cluster.has("Secret", secret["secretName"]):
            assert secret.get("optional"), f"no secret {secret['secretName']}: the pod would not start"
            return path
        for key, value in self.cluster.of("Secret", secret["secretName"])["data"].items():
            file = path / "..first" / key
            file.write_bytes(base64.b64decode(value))
            file.chmod(secret["defaultMode"] | (0o040 if self._group is not None else 0))
            os.chown(file, 0, self._group or 0)
            (path / key).symlink_to(f"..data/{key}")
        return path
