"""What `manta status` shows, as plain data. Knows nothing of Ray, nor of how it is drawn."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from cluster.expert_deployments import group_of
from cluster.messages import EngineStats
from cluster.telemetry.kernels import ModelKernels

COORDINATOR, GATEWAY, ROOT = "coordinator", "gateway", "root"
_MODEL_APPLICATION = re.compile(r"(.+)-([A-Za-z0-9_.]+)")


@dataclass(frozen=True, slots=True)
class DeploymentStatus:
    """One Serve deployment. `replicas` counts them by Serve's state, RUNNING for example."""

    name: str
    status: str
    replicas: dict[str, int]
    message: str = ""
    silent: int = 0  # of a group's running replicas: how many shards did not answer in time
    restarting: int = 0  # how many of them are being restarted

    @property
    def group(self) -> int | None:
        """The index of the expert group that this deployment has replicas of, if it has."""
        return group_of(self.name)

    @property
    def running(self) -> int:
        return self.replicas.get("RUNNING", 0)


@dataclass(frozen=True, slots=True)
class ApplicationStatus:
    """One Serve application. `coordinators` and `stats_error` are filled for a model's application only."""

    name: str
    status: str
    deployments: tuple[DeploymentStatus, ...]
    message: str = ""
    coordinators: tuple[EngineStats, ...] = ()  # one per coordinator replica that answered
    stats_error: str | None = None  # why some or all of them are missing
    kernels: ModelKernels | None = None  # of the processes that answered, where they were asked
    silent: int = 0  # of the gateway's running replicas: how many did not answer in time

    @property
    def model(self) -> tuple[str, str] | None:
        """(name, version) of the model that this application serves, if it does."""
        match = _MODEL_APPLICATION.fullmatch(self.name)
        has_coordinator = any(deployment.name == COORDINATOR for deployment in self.deployments)
        return (match[1], match[2]) if match and has_coordinator else None

    @property
    def revision(self) -> str | None:
        """The hub's commit of the model, as its coordinators say."""
        return next((stats.revision for stats in self.coordinators if stats.revision), None)

    @property
    def groups(self) -> tuple[int, ...]:
        """The indices of the expert groups."""
        return tuple(sorted({d.group for d in self.deployments if d.group is not None}))

    @property
    def rows_per_expert(self) -> tuple[int, ...]:
        """Rows sent to each expert, summed over layers and coordinators."""
        columns = zip(*(stats.rows_per_expert for stats in self.coordinators), strict=True)
        return tuple(sum(column) for column in columns)


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """One node of the Ray cluster."""

    address: str
    alive: bool
    cpus: float
    gpus: float
    disk: float | None = None  # used share of the one with Ray's session; None where nobody told it


@dataclass(frozen=True, slots=True)
class ProxyStatus:
    """What takes clients' connections on one node, as Serve's controller sees it."""

    address: str  # of the node
    status: str  # Serve's: STARTING, HEALTHY, UNHEALTHY, DRAINING, DRAINED
    answers: bool | None = None  # on HTTP, within seconds; None where it was not asked


@dataclass(frozen=True, slots=True)
class ClusterSnapshot:
    """A running cluster at one moment."""

    address: str  # of the Ray cluster
    nodes: tuple[NodeStatus, ...]
    applications: tuple[ApplicationStatus, ...]
    logs: str = ""  # the folder of its processes' logs on the machine that looked
    proxies: tuple[ProxyStatus, ...] = ()
    controller_answers: bool = True  # Serve's; without it nothing is known of applications and proxies

    @property
    def gone(self) -> tuple[str, ...]:
        """Addresses of dead nodes, but of those that came back: Ray lists the dead one beside the new one."""
        alive = {node.address for node in self.nodes if node.alive}
        return tuple(dict.fromkeys(node.address for node in self.nodes if node.address not in alive))

    def document(self) -> dict[str, Any]:
        """For JSON. Models and groups are spelled out, so that a reader need not parse names."""
        document = dataclasses.asdict(self)
        for application, fields in zip(self.applications, document["applications"], strict=True):
            fields["model"], fields["fingerprint"] = application.model or (None, None)
            fields["revision"] = application.revision
            fields["rows_per_expert"] = list(application.rows_per_expert)
            fields["kernels"] = None if application.kernels is None else _kernels_document(application.kernels)
            for deployment, entry in zip(application.deployments, fields["deployments"], strict=True):
                entry["group"] = deployment.group
        return document


def _kernels_document(kernels: ModelKernels) -> dict[str, Any]:
    """By deployment, one entry a replica, with the seconds that were measured by kernel."""
    return {
        "batch_invariant": kernels.batch_invariant,
        "mixed": list(kernels.mixed),
        "deployments": {
            name: [{**dataclasses.asdict(one), "speeds": dict(one.speeds)} for one in replicas]
            for name, replicas in kernels.deployments.items()
        },
    }
