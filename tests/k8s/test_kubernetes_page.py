"""docs/kubernetes.md: its figures are `manta plan`'s, its overlays and ports those of the manifests."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.config import load_config
from cluster.kubernetes.check.quantities import parse_quantity
from cluster.kubernetes.sizes import SHARED_MEMORY_MIB, pod_groups
from tests.k8s.overlays import OVERLAYS, REPOSITORY, needs_kubectl, the

README = (REPOSITORY / "docs" / "kubernetes.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in README.splitlines()
    if re.match(r"\| `[\w-]+` \| \d", line)
]


def _plan(overlay: str, options: str) -> dict[str, Any]:
    config = REPOSITORY / "k8s" / "overlays" / overlay / "manta.yaml"
    command = ["plan", "--config", str(config), *options.strip("`").split(), "--context", "4096", "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, f"{result.output} {result.exception}"
    plan: dict[str, Any] = json.loads(result.output)[0]
    return plan


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip("`"))
def test_figures_are_those_of_the_plan(row: list[str]) -> None:
    overlay, gpus, expert, coordinator, options = row
    overlay = overlay.strip("`")
    plan = _plan(overlay, options)
    config = load_config(REPOSITORY / "k8s" / "overlays" / overlay / "manta.yaml")
    assert f"--gpu {config.kubernetes.gpu_type} " in options
    assert int(gpus.split()[0].rstrip(",")) == plan["layout"]["gpus"]
    experts = [one for one in plan["processes"] if one["name"].startswith("expert")]
    [attention] = [one for one in plan["processes"] if one["name"].startswith("coordinator")]
    weights = attention["weight_bytes"]
    if expert == "in the coordinator":
        weights += sum(one["weight_bytes"] for one in experts)
    else:
        assert {f"{_gib(one['weight_bytes'])} GiB" for one in experts} == {expert}
    assert coordinator == f"{_gib(weights)} + {_gib(attention['cache_bytes'])} GiB"


def test_pods_with_gpus_are_as_many_as_the_plan_says() -> None:
    for row in ROWS:
        groups = pod_groups(load_config(REPOSITORY / "k8s" / "overlays" / row[0].strip("`") / "manta.yaml"))
        assert sum(group.min_pods * group.size.gpus for group in groups.values()) == int(row[1].split()[0].rstrip(","))
    autoscaling = load_config(REPOSITORY / "k8s/overlays/autoscaling/manta.yaml").models[0]
    most = 8 * autoscaling.experts.scaling.max_replicas + autoscaling.coordinators.max_replicas
    assert f"| `autoscaling` | 9 to {most} |" in README


def test_every_overlay_is_there() -> None:
    assert len(ROWS) == 4
    for overlay in OVERLAYS:
        assert f"`{overlay.name}`" in README or f"overlays/{overlay.name}" in README


def test_shared_memory() -> None:
    assert f"{SHARED_MEMORY_MIB} MiB of `/dev/shm`" in README


@needs_kubectl
def test_the_demo_fits_the_laptop() -> None:
    """Pods ask for what they may use. kind's own pods and the operator ask for a core and a GB together."""
    assert "eight cores and 16 GB of memory" in README
    cluster = the(REPOSITORY / "k8s" / "overlays" / "cpu-demo", "RayService")["spec"]["rayClusterConfig"]
    groups = [(cluster["headGroupSpec"], 1)] + [(one, one["minReplicas"]) for one in cluster["workerGroupSpecs"]]
    pods = [(group["template"]["spec"]["containers"][0]["resources"], number) for group, number in groups]
    pods.append((cluster["autoscalerOptions"]["resources"], 1))
    for resource, most, others in (("cpu", 8, 1.1), ("memory", 16e9, 1e9)):
        asked = [float(parse_quantity(sizes["requests"][resource]) or 0) * number for sizes, number in pods]
        assert 0.7 * most < sum(asked) + others < 0.98 * most, f"of {resource} {sum(asked)}"


@needs_kubectl
@pytest.mark.parametrize("overlay", ["mixtral-8x7b-8gpu", "gcs-fault-tolerance"])
def test_one_command_names_the_image(overlay: str, tmp_path: Path) -> None:
    """As it stands there, on a copy; what is then left to say is the image of Redis."""
    [command] = re.findall(r"^ *(sed -i.*)$", README, re.MULTILINE)
    shutil.copytree(REPOSITORY / "k8s", tmp_path / "k8s")
    digest = f"sha256:{'0' * 64}"
    subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, env={"IMAGE": "ghcr.io/acme/manta", "DIGEST": digest}, check=True
    )
    result = CliRunner().invoke(app, ["k8s", "check", str(tmp_path / "k8s" / "overlays" / overlay)])
    problems = [line for line in result.output.splitlines() if "image" in line]
    assert all("registry.example/redis" in problem for problem in problems), problems
    assert len(problems) == (overlay == "gcs-fault-tolerance")
    assert result.exit_code == len(problems)
    service = the(tmp_path / "k8s" / "overlays" / overlay, "RayService")
    containers = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert containers[0]["image"] == f"ghcr.io/acme/manta@{digest}"
