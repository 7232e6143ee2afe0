"""What can be said of the files in deploy/ without deploying them: quick, and part of `make test`.

What needs a tool that is not here is skipped, and says which package has it.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidestep import __version__
from sidestepd.config import Config
from tests.support.workshop import DEPLOY, blocks, do, kustomized, need

OVERLAYS = sorted(path.parent for path in DEPLOY.glob("kubernetes/overlays/*/kustomization.yaml"))
UNITS = {"--system": DEPLOY / "systemd/sidestep@.service", "--user": DEPLOY / "systemd/user/sidestep@.service"}
SCRIPTS = sorted([*DEPLOY.glob("**/*.sh")])
VERSIONS = ("1.28", "1.30", "1.32", "1.34", "1.37")
MADE_BY_KEYGEN = ("sidestep-keys", "sidestep-client")
MONITORS = Path(__file__).parents[1] / "data/deploy/servicemonitor.schema.json"
"""A schema of ours: that of a ServiceMonitor comes with its operator, and not with Kubernetes."""
MOST_EXPOSURE = 20
"""Tenths: 2.0."""


def documents(path: Path) -> list[Any]:
    """What a YAML file holds."""
    return [one for one in yaml.safe_load_all(path.read_text()) if one is not None]


@functools.cache
def built(overlay: Path) -> list[dict[str, Any]]:
    """All manifests of an overlay."""
    return kustomized(overlay)


def pods(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pod templates among them."""
    return [one["spec"]["template"] for one in manifests if "template" in one.get("spec", {})]


def selected(manifests: list[dict[str, Any]], labels: dict[str, str]) -> list[dict[str, Any]]:
    """The pods that a selector finds; at least one."""
    found = [pod for pod in pods(manifests) if labels.items() <= pod["metadata"].get("labels", {}).items()]
    assert found, labels
    return found


def ports(found: list[dict[str, Any]]) -> dict[str, int]:
    """The ports of pods by their names."""
    containers = [container for pod in found for container in pod["spec"]["containers"]]
    return {port["name"]: port["containerPort"] for one in containers for port in one.get("ports", ())}


def judge(manifests: list[dict[str, Any]], version: str, path: Path) -> None:
    """Every manifest by a schema; AssertionError also for one of which there is none. `path`: a file to write."""
    monitors = [one for one in manifests if one["kind"] == "ServiceMonitor"]
    path.write_text(yaml.safe_dump_all([one for one in manifests if one not in monitors]))
    said = do("kubernetes-validate", "--strict", "-k", version, path)
    assert "WARN" not in said, said
    for one in monitors:
        path.write_text(yaml.safe_dump(one))
        do("check-jsonschema", "--schemafile", MONITORS, path)


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

    @pytest.mark.deploy
    def test_gpus_are_added_to_what_is_there(self, tmp_path):
        """The two files together, as compose merges them."""
        need("podman-compose", "check-jsonschema")
        files = [DEPLOY / "docker" / name for name in ("compose.yaml", "compose.gpu.yaml")]
        environ = os.environ | {"TRAIN_IMAGE": "training"}
        merged = do("podman-compose", "-f", files[0], "-f", files[1], "config", env=environ)
        (tmp_path / "merged.yaml").write_text(merged)

        do("check-jsonschema", "--builtin-schema", "vendor.compose-spec", tmp_path / "merged.yaml")

        services = yaml.safe_load(merged)["services"]
        for name, wanted in (("daemon", "utility"), ("train", "gpu")):
            (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
            assert wanted in device["capabilities"]
        assert (True, "ipc:///run/sidestep/daemon.sock") == (
            services["daemon"]["read_only"], services["train"]["environment"]["SIDESTEP_ADDRESS"]
        )  # fmt: skip

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
        need("kubernetes-validate", "check-jsonschema")

        judge(built(overlay), version, tmp_path / "all.yaml")

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
                if "secret" in volume and not volume["secret"].get("optional"):
                    assert volume["secret"]["secretName"] in MADE_BY_KEYGEN
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

    def test_select_pods_that_are_there_at_ports_that_they_have(self, overlay):
        manifests = built(overlay)
        for one in manifests:
            spec = one.get("spec", {})
            if one["kind"] == "Service":
                targets = {port["targetPort"] for port in spec["ports"]}
                assert targets <= ports(selected(manifests, spec["selector"])).keys(), one
            if one["kind"] == "NetworkPolicy":
                numbers = {port["port"] for rule in spec["ingress"] for port in rule.get("ports", ())}
                if overlay.name == "indexed":
                    numbers = {7711}  # and every other
                assert numbers == set(ports(selected(manifests, spec["podSelector"]["matchLabels"])).values()), one
            if one["kind"] == "ServiceMonitor":
                services = [
                    it for it in manifests
                    if it["kind"] == "Service"
                    and spec["selector"]["matchLabels"].items() <= it["metadata"].get("labels", {}).items()
                ]  # fmt: skip
                names = {port["name"] for it in services for port in it["spec"]["ports"]}
                assert {point["port"] for point in spec["endpoints"]} == names, one

    def test_show_secrets_to_the_daemon_alone(self, overlay):
        for pod in pods(built(overlay)):
            secrets = {one["name"]: one["secret"] for one in pod["spec"]["volumes"] if "secret" in one}
            assert {0o440} >= {secret["defaultMode"] for secret in secrets.values()}
            assert pod["spec"]["securityContext"]["fsGroup"] == 10001  # who may read them then
            for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]:
                mounted = {one["name"] for one in container.get("volumeMounts", [])} & set(secrets)
                runs = container.get("command", [])[:2] == ["sidestep", "run"]
                assert not mounted or container in daemons(pod) or container["name"] == "drain" or runs
                assert "WANDB_API_KEY" not in str(container)


class TestASchema:
    def test_judges(self, tmp_path):
        """A cluster without native sidecars refuses that overlay, and each one a word that it does not know."""
        need("kubernetes-validate")
        sidecar = yaml.safe_dump_all(built(DEPLOY / "kubernetes/overlays/sidecar"))
        (tmp_path / "sidecar.yaml").write_text(sidecar)
        (tmp_path / "misspelt.yaml").write_text(sidecar.replace("podReplacementPolicy", "podReplacementpolicy"))

        with pytest.raises(AssertionError, match="restartPolicy"):
            do("kubernetes-validate", "--strict", "-k", "1.27", tmp_path / "sidecar.yaml")
        with pytest.raises(AssertionError, match="podReplacementpolicy"):
            do("kubernetes-validate", "--strict", "-k", VERSIONS[-1], tmp_path / "misspelt.yaml")

    @pytest.mark.deploy
    def test_is_there_for_all_that_is_judged(self, tmp_path):
        """A kind that Kubernetes does not have is a fault, and not a warning."""
        need("kubernetes-validate", "check-jsonschema")
        manifests = [*built(DEPLOY / "kubernetes/overlays/head"), {"apiVersion": "v2", "kind": "Servicer"}]

        with pytest.raises(AssertionError, match="Couldn't find schema for kind Servicer"):
            judge(manifests, VERSIONS[-1], tmp_path / "all.yaml")

    @pytest.mark.deploy
    @pytest.mark.parametrize(
        ("right", "wrong"), [("endpoints", "endpointz"), ("interval", "intervall"), ("30s", "30 seconds")]
    )
    def test_judges_a_monitor(self, right, wrong, tmp_path):
        need("kubernetes-validate", "check-jsonschema")
        said = yaml.safe_dump_all(built(DEPLOY / "kubernetes/overlays/node-with-metrics"))
        assert right in said
        manifests = list(yaml.safe_load_all(said.replace(right, wrong)))

        with pytest.raises(AssertionError, match=f"{wrong}|does not match"):
            judge(manifests, VERSIONS[-1], tmp_path / "all.yaml")


class TestTogether:
    """Overlays that are meant to be applied to one namespace."""

    def test_head_and_relay_speak_of_one_port_and_one_name(self):
        head, relay = (built(DEPLOY / "kubernetes/overlays" / name) for name in ("head", "relay"))
        (service,) = (one for one in head if one["kind"] == "Service")
        (daemon,) = daemons(pods(relay)[0])
        (above,) = (one["value"] for one in daemon["env"] if one["name"] == "SIDESTEP_UPSTREAM_ADDRESS")
        (policy,) = (one["spec"] for one in head if one["kind"] == "NetworkPolicy")
        (way,) = (rule for one in relay if one["kind"] == "NetworkPolicy" for rule in one["spec"]["egress"][1:])
        let_in = [one["podSelector"]["matchLabels"].items() for one in policy["ingress"][0]["from"]]

        assert f"tcp://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}" == above
        assert any(one <= pods(relay)[0]["metadata"]["labels"].items() for one in let_in)
        assert selected(head, way["to"][0]["podSelector"]["matchLabels"])
        assert [{"protocol": "TCP", "port": 7711}] == way["ports"]

    def test_only_the_head_has_the_key_and_speaks_to_the_world(self):
        relay = built(DEPLOY / "kubernetes/overlays/relay")

        assert "credentials" not in str(relay).lower()
        assert "443" not in str([one for one in relay if one["kind"] == "NetworkPolicy"])

    def test_nothing_that_is_applied_empties_a_secret(self):
        """What `kubectl create secret` made is there afterwards."""
        assert [] == [one for overlay in OVERLAYS for one in built(overlay) if one["kind"] == "Secret"]

    def test_metrics_can_be_had_of_each_daemon_with_a_pod_of_its_own(self, tmp_path):
        shutil.copytree(DEPLOY / "kubernetes", tmp_path / "kubernetes")
        for name in ("head", "relay", "node"):
            folder = tmp_path / "kubernetes/overlays" / f"my-{name}"
            folder.mkdir()
            (folder / "kustomization.yaml").write_text(
                f"resources: [../{name}]\ncomponents: [../../components/monitoring]\n"
            )
            manifests = kustomized(folder)
            assert 9464 in ports(pods(manifests)).values()
            (policy,) = (one["spec"] for one in manifests if one["kind"] == "NetworkPolicy")
            assert 9464 in {port["port"] for rule in policy["ingress"] for port in rule["ports"]}


class TestWhatIsWritten:
    def test_overlay_of_your_own_is_one(self, tmp_path):
        """That of the README, as it is there, beside deploy/."""
        shutil.copytree(DEPLOY / "kubernetes", tmp_path / "deploy/kubernetes")
        (tmp_path / "deploy/kubernetes/components/key/wandb_api_key").write_text("a-key")
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine/kustomization.yaml").write_text(blocks(DEPLOY / "README.md", "## Kubernetes")[1])

        manifests = kustomized(tmp_path / "mine")

        (job,) = (one for one in manifests if one["kind"] == "Job")
        (options,) = (one["data"] for one in manifests if one["kind"] == "ConfigMap")
        (secret,) = (one for one in manifests if one["kind"] == "Secret")
        assert f"registry.example.com/sidestep:{__version__}" == daemons(job["spec"]["template"])[0]["image"]
        assert ("my-project", "online") == (options["SIDESTEP_RUN_PROJECT"], options["SIDESTEP_RUN_MODE"])
        assert ("sidestep", {"wandb_api_key": "YS1rZXk="}) == (secret["metadata"]["name"], secret["data"])
        train = job["spec"]["template"]["spec"]["containers"][0]
        assert ("registry.example.com/my-training:7", ["python", "train.py"]) == (train["image"], train["command"])

    def test_every_file_is_in_the_readme(self):
        """By its name, or as one of an overlay or a component."""
        told = (DEPLOY / "README.md").read_text()
        files = [path for path in DEPLOY.rglob("*") if path.is_file()]

        assert [] == [path for path in files if path.name not in told and path.parent.name not in told]

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
