"""What can be said of the files in deploy/ without deploying them: quick, and part of `make test`.

What needs a tool that is not here is skipped, and says which package has it.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidestep import __version__
from sidestepd.config import Config
from tests.support.workshop import DEPLOY, do, need

OVERLAYS = sorted(path.parent for path in DEPLOY.glob("kubernetes/overlays/*/kustomization.yaml"))
UNITS = {"--system": DEPLOY / "systemd/sidestep@.service", "--user": DEPLOY / "systemd/user/sidestep@.service"}
SCRIPTS = sorted([*DEPLOY.glob("**/*.sh")])
VERSIONS = ("1.28", "1.30", "1.32", "1.34", "1.36")
MADE_BY_KEYGEN = ("sidestep-keys", "sidestep-client")
MOST_EXPOSURE = 20
"""Tenths: 2.0."""


def documents(path: Path) -> list[Any]:
    """What a YAML file holds."""
    return [one for one in yaml.safe_load_all(path.read_text()) if one is not None]


@functools.cache
def built(overlay: Path) -> list[dict[str, Any]]:
    """All manifests of an overlay."""
    need("kubectl")
    return [one for one in yaml.safe_load_all(do("kubectl", "kustomize", overlay)) if one]


def pods(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pod templates among them."""
    return [one["spec"]["template"] for one in manifests if "template" in one.get("spec", {})]


def daemons(pod: dict[str, Any]) -> list[dict[str, Any]]:
    """The containers of a pod that run `sidestep serve`."""
    containers = [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]
    return [one for one in containers if "serve" in one.get("args", [])]


class TestUnits:
    @pytest.fixture(params=UNITS, ids=lambda manager: manager.strip("-"))
    def unit(self, request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
        """A unit whose program is here, and the manager it is for."""
        need("systemd-analyze")
        text = re.sub(r"^(ExecStart=)\S+", rf"\1{sys.executable}", UNITS[request.param].read_text(), flags=re.M)
        (tmp_path / "sidestep@.service").write_text(text)
        return request.param, tmp_path / "sidestep@.service"

    def test_are_verified_without_a_word(self, unit, tmp_path):
        manager, path = unit
        said = do("systemd-analyze", manager, "verify", path, env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)})

        assert "" == said

    def test_expose_little_with_gpus_in_reach(self, unit):
        manager, path = unit
        if manager == "--user":
            pytest.skip("what exposes a user's own service is that user")
        judged = do("systemd-analyze", "security", "--offline=true", f"--threshold={MOST_EXPOSURE}", path)

        assert "Overall exposure level" in judged
        assert "DeviceAllow=char-nvidia rw" in path.read_text()

    @pytest.mark.parametrize("path", UNITS.values(), ids=["system", "user"])
    def test_give_more_time_to_stop_than_the_daemon_takes(self, path):
        text = path.read_text()
        grace, stop = (int(re.search(rf"{name}=(\d+)", text)[1]) for name in ("GRACE_S", "TimeoutStopSec"))

        assert stop >= grace + 30

    def test_example_of_the_environment_is_understood(self):
        lines = [line.lstrip("#") for line in (DEPLOY / "systemd/sidestep.env").read_text().splitlines()]
        said = dict(line.split("=", 1) for line in lines if re.match(r"SIDESTEP_\w+=", line))
        del said["SIDESTEP_CONFIG"]  # a file that is not here

        assert "my-project" == Config.load(environ=said).run.project


class TestScripts:
    @pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
    def test_have_nothing_that_shellcheck_minds(self, path):
        need("shellcheck")

        assert "" == do("shellcheck", path)
        assert os.access(path, os.X_OK)


class TestDocker:
    def test_files_are_what_their_schema_says(self):
        need("check-jsonschema")
        files = sorted(DEPLOY.glob("docker/compose*.yaml"))

        do("check-jsonschema", "--builtin-schema", "vendor.compose-spec", *files)

    def test_dockerfile_has_nothing_that_hadolint_minds(self):
        need("hadolint")

        assert "" == do("hadolint", DEPLOY / "docker/Dockerfile")

    def test_compose_stops_the_daemon_later_than_its_grace(self):
        (compose,) = documents(DEPLOY / "docker/compose.yaml")
        words = re.findall(r"^CMD \[(.*)\]", (DEPLOY / "docker/Dockerfile").read_text(), flags=re.M)[-1]
        grace = int(shlex.split(words.replace(",", " "))[-1])

        assert "2m" == compose["services"]["daemon"]["stop_grace_period"]
        assert 120 >= grace + 30


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
class TestManifests:
    @pytest.mark.deploy  # a second for each
    @pytest.mark.parametrize("version", VERSIONS)
    def test_are_what_their_schemas_say(self, overlay, version, tmp_path):
        need("kubernetes-validate")
        (tmp_path / "all.yaml").write_text(yaml.safe_dump_all(built(overlay)))

        do("kubernetes-validate", "--strict", "-k", version, tmp_path / "all.yaml")

    def test_use_volumes_secrets_and_claims_that_are_there(self, overlay):
        manifests = built(overlay)
        made = {(one["kind"], one["metadata"]["name"]) for one in manifests}
        for pod in pods(manifests):
            volumes = {one["name"] for one in pod["spec"].get("volumes", [])}
            for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]:
                assert {one["name"] for one in container.get("volumeMounts", [])} <= volumes
                for source in container.get("envFrom", []):
                    assert ("ConfigMap", source["configMapRef"]["name"]) in made
            if overlay.name == "drain":
                continue  # what the sidecar overlay made
            for volume in pod["spec"].get("volumes", []):
                if "secret" in volume and volume["secret"]["secretName"] not in MADE_BY_KEYGEN:
                    assert ("Secret", volume["secret"]["secretName"]) in made
                if "persistentVolumeClaim" in volume:
                    assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in made

    def test_have_options_that_the_daemon_knows(self, overlay):
        for one in built(overlay):
            if one["kind"] == "ConfigMap":
                Config.load(environ=one["data"])

    def test_lock_up_every_daemon_and_give_it_time_to_end(self, overlay):
        for pod in pods(built(overlay)):
            for container in daemons(pod):
                words = container["args"]
                context = container["securityContext"]
                assert pod["spec"]["terminationGracePeriodSeconds"] >= int(words[words.index("--grace") + 1]) + 30
                assert (True, True, False) == (
                    context["runAsNonRoot"], context["readOnlyRootFilesystem"], context["allowPrivilegeEscalation"]
                )  # fmt: skip
                assert ["ALL"] == context["capabilities"]["drop"]
                assert "memory" in container["resources"]["limits"]
                assert ["sidestep", "ping"] == container["livenessProbe"]["exec"]["command"][:2]

    def test_select_pods_that_are_there(self, overlay):
        manifests = built(overlay)
        labels = [
            pod["metadata"]["labels"].items() for pod in pods(manifests) if "labels" in pod.get("metadata", {})
        ]
        labels += [one["metadata"].get("labels", {}).items() for one in manifests if one["kind"] == "Service"]
        for one in manifests:
            wanted = {
                "Service": lambda spec: spec["selector"],
                "NetworkPolicy": lambda spec: spec["podSelector"]["matchLabels"],
                "ServiceMonitor": lambda spec: spec["selector"]["matchLabels"],
            }.get(one["kind"])
            if wanted:
                assert any(wanted(one["spec"]).items() <= found for found in labels), one


class TestWhatIsWritten:
    def test_every_file_is_in_the_readme(self):
        told = (DEPLOY / "README.md").read_text()
        folders = {path.relative_to(DEPLOY).parts[0] for path in DEPLOY.rglob("*") if path.is_file()}

        assert [] == [folder for folder in sorted(folders) if folder not in told]

    def test_images_have_the_version_of_the_package(self):
        tags = {
            one["newTag"]
            for path in OVERLAYS
            for one in documents(path / "kustomization.yaml")[0].get("images", [])
        }
        labels = set(re.findall(r"^ARG VERSION=(.*)", (DEPLOY / "docker/Dockerfile").read_text(), flags=re.M))

        assert {__version__} == tags == labels

    def test_options_file_is_toml(self):
        tomllib.loads((DEPLOY / "sidestepd.toml").read_text())

    def test_python_in_examples_compiles(self):
        for path in DEPLOY.rglob("*.py"):
            compile(path.read_text(), str(path), "exec")
