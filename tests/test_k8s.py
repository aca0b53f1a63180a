"""The Kubernetes manifests: valid, consistent with each other, and restricted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from typer.main import get_command

from apiary_client.cli.app import app
from apiary_server.settings import Settings

BASE = Path(__file__).parent.parent / "k8s" / "base"
KUSTOMIZATION: dict[str, Any] = yaml.safe_load((BASE / "kustomization.yaml").read_text())
VERSION = "1.34"  # the oldest minor release that its makers support

DOCUMENTS: dict[str, dict[str, Any]] = {
    document["kind"]: document
    for resource in KUSTOMIZATION["resources"]
    for document in yaml.safe_load_all((BASE / resource).read_text())
}


@pytest.fixture
def pod() -> dict[str, Any]:
    return DOCUMENTS["StatefulSet"]["spec"]["template"]


@pytest.fixture
def container(pod: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod["spec"]["containers"]
    return container


def serve_settings(arguments: list[str]) -> Settings:
    """The settings that `apiary ARGUMENTS` would serve with, by the command's own parser."""
    name, *flags = arguments
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    params = command.make_context(name, list(flags)).params
    return Settings.load(**{key: value for key, value in params.items() if key != "config"})


def test_every_manifest_belongs_to_the_kustomization() -> None:
    files = {path.name for path in BASE.iterdir()} - {"kustomization.yaml"}
    assert set(KUSTOMIZATION["resources"]) == files
    assert set(DOCUMENTS) == {"StatefulSet", "Service", "PodDisruptionBudget"}


@pytest.mark.parametrize("kind", DOCUMENTS)
@pytest.mark.parametrize("version", [VERSION, kubernetes_validate.latest_version()])
def test_kubernetes_accepts_it(kind: str, version: str) -> None:
    assert kubernetes_validate.validate(DOCUMENTS[kind], version, strict=True)


def test_the_validator_would_notice_a_typing_error() -> None:
    wrong = {**DOCUMENTS["Service"], "spec": {**DOCUMENTS["Service"]["spec"], "clusterIp": "None"}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSION, strict=True)


def test_selectors_find_the_pods(pod: dict[str, Any]) -> None:
    for selector in (
        DOCUMENTS["StatefulSet"]["spec"]["selector"]["matchLabels"],
        DOCUMENTS["Service"]["spec"]["selector"],
        DOCUMENTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector
        assert selector.items() <= pod["metadata"]["labels"].items()


def test_every_worker_has_a_name_of_its_own() -> None:
    stateful, service = DOCUMENTS["StatefulSet"], DOCUMENTS["Service"]
    assert stateful["spec"]["serviceName"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert stateful["spec"]["podManagementPolicy"] == "Parallel"


def test_a_disruption_takes_one_worker() -> None:
    assert DOCUMENTS["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1
    assert DOCUMENTS["StatefulSet"]["spec"]["replicas"] > 1


def test_the_arguments_are_settings_that_serve(container: dict[str, Any], pod: dict[str, Any]) -> None:
    settings = serve_settings(container["args"])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert settings.listen == f"0.0.0.0:{ports['grpc']}"
    assert settings.metrics_port == ports["metrics"]
    assert pod["spec"]["terminationGracePeriodSeconds"] > settings.drain_grace + 15


def test_ports_agree(container: dict[str, Any]) -> None:
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["grpc"] == 50051
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"] == {"port": ports["grpc"]}
    for port in DOCUMENTS["Service"]["spec"]["ports"]:
        assert port["targetPort"] == port["name"]
        assert port["port"] == ports[port["name"]]


def test_a_slow_start_is_not_killed(container: dict[str, Any]) -> None:
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 60


def test_memory_covers_the_budgets(container: dict[str, Any]) -> None:
    settings = serve_settings(container["args"])
    request, limit = (
        Settings.load(cache_budget=container["resources"][kind]["memory"] + "B").cache_budget
        for kind in ("requests", "limits")
    )
    weights = 600 * 2**20
    assert weights + settings.cache_budget + settings.parked_budget < request <= limit


def test_the_pod_meets_the_restricted_standard(pod: dict[str, Any], container: dict[str, Any]) -> None:
    security = pod["spec"]["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] > 0
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod["spec"].keys()
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"tmp": "/tmp", "state": "/state"}
    assert [volume["name"] for volume in pod["spec"]["volumes"] if "emptyDir" in volume] == ["tmp"]


def test_the_user_is_the_images(pod: dict[str, Any]) -> None:
    dockerfile = (BASE.parent.parent / "Dockerfile").read_text()
    security = pod["spec"]["securityContext"]
    assert f"USER {security['runAsUser']}:{security['runAsGroup']}\n" in dockerfile


def test_the_image_is_pinned(container: dict[str, Any]) -> None:
    (image,) = KUSTOMIZATION["images"]
    assert image["name"] == container["image"]
    assert image["newTag"] not in {"", "latest"}
