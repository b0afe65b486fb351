"""The manifests against the schemas of Kubernetes' API, as they are and as Kustomize renders them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
BASE = FOLDER / "base"
#: The oldest release that is looked at, and the newest whose schemas there are.
VERSIONS = ("1.30", kubernetes_validate.latest_version())
#: Of the Gateway API's inference extension, no part of Kubernetes.
EXTENSIONS = ("InferencePool",)


def resources(text: str) -> Iterator[dict[str, Any]]:
    yield from (one for one in yaml.safe_load_all(text) if one)


def base() -> dict[str, dict[str, Any]]:
    names = yaml.safe_load((BASE / "kustomization.yaml").read_text())["resources"]
    return {one["kind"]: one for name in names for one in resources((BASE / name).read_text())}


def check(resource: dict[str, Any], version: str) -> None:
    if resource["kind"] not in EXTENSIONS:
        kubernetes_validate.validate(resource, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_rendered(version: str) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("rendering needs kubectl")
    for overlay in ("base", "gateway", "gpu"):
        rendered = subprocess.run([kubectl, "kustomize", FOLDER / overlay], capture_output=True, text=True)
        assert rendered.returncode == 0, rendered.stderr
        found = {one["kind"]: one for one in resources(rendered.stdout)}
        assert found.keys() >= base().keys()
        for resource in found.values():
            check(resource, version)
        labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
        for selector in (
            found["Deployment"]["spec"]["selector"]["matchLabels"],
            found["Service"]["spec"]["selector"],
            found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
            found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        ):
            assert selector and selector.items() <= labels.items()
        [container] = found["Deployment"]["spec"]["template"]["spec"]["containers"]
        assert container["image"] == ("fastblt:cuda" if overlay == "gpu" else "fastblt:latest")
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (overlay == "gpu")


@pytest.mark.parametrize("version", VERSIONS)
def test_the_files_themselves(version: str) -> None:
    for resource in base().values():
        check(resource, version)


def test_a_misspelled_field_is_found() -> None:
    resource = base()["PodDisruptionBudget"]
    resource["spec"]["maxUnavailible"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        check(resource, VERSIONS[0])


def test_times_and_metrics_are_those_of_the_server() -> None:
    spec = base()["Deployment"]["spec"]["template"]["spec"]
    [container] = spec["containers"]
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    # docs/operations.md: --shutdown-timeout and 15 s.
    assert spec["terminationGracePeriodSeconds"] >= pause + 30 + 15
    assert "--vllm-metrics" in container["args"]
    source = "".join(path.read_text() for path in (ROOT / "server" / "api").glob("*.py"))
    for metric in base()["HorizontalPodAutoscaler"]["spec"]["metrics"]:
        assert f'"{metric["pods"]["metric"]["name"]}"' in source
    for probe, path in (("startupProbe", "/health"), ("livenessProbe", "/health"), ("readinessProbe", "/ready")):
        assert container[probe]["httpGet"] == {"path": path, "port": "http"}
        assert f'@router.get("{path}")' in source
