"""Which kernels compute in a model's processes, as those say it. Knows names; knows neither torch nor what one does.

They decide the last bits of what a model computes, and so now and then a token. Replicas of one deployment are to have
the same ones, or a token hangs on who computed it. So it does where a group has replicas on tiers that are not alike.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily

from cluster.expert_deployments import first_deployment

OWN = ("dot", "fma")  # whose bits hang on no CPU


@dataclass(frozen=True, slots=True)
class ProcessKernels:
    """Those of one process, chosen when it started."""

    dtype: str
    matmuls: str  # as in `engine.kernels`
    batch_invariant: bool  # a sequence's bits do not hang on what else is in the batch
    device: str  # the CPU by LLVM's name, or the GPU
    vectors: str = ""  # what torch uses of a CPU, AVX2 for example
    attention: str = ""  # none in a shard
    sampling: str = ""  # the same
    speeds: tuple[tuple[str, tuple[float, ...]], ...] = ()  # what was measured: seconds of a matmul, for each of `rows`
    rows: tuple[int, ...] = ()
    weights: str = ""  # what its matrices were rounded to while they were read; none: they are as they are stored

    @property
    def format(self) -> str:
        """What its numbers are."""
        return self.weights or self.dtype

    @property
    def names(self) -> dict[str, str]:
        """Of what computes, and on what, by what it is for."""
        return {
            "matmuls": self.matmuls,
            "attention": self.attention,
            "sampling": self.sampling,
            "dtype": self.dtype,
            "device": self.device,
            "weights": self.weights,
        }

    @property
    def identity(self) -> tuple[str, ...]:
        """What decides bits. A library multiplies in a way of its own on each kind of CPU; ours do not."""
        device = "" if self.matmuls in OWN else self.device
        rounded = (self.weights,) if self.weights else ()
        return (self.dtype, self.matmuls, self.attention, self.sampling, self.vectors, device, *rounded)


@dataclass(frozen=True, slots=True)
class ModelKernels:
    """Those of all processes of a model that answered, by deployment."""

    deployments: Mapping[str, tuple[ProcessKernels, ...]]

    @property
    def batch_invariant(self) -> bool:
        """Whether all of them are, those of every deployment, and no bit hangs on which replica computed it."""
        told = self.deployments.values()
        return all(told) and all(one.batch_invariant for kernels in told for one in kernels) and not self.mixed

    @property
    def mixed(self) -> tuple[str, ...]:
        """Deployments whose replicas compute by different kernels; those of a group on several tiers count as one."""
        identities: dict[str, set[tuple[str, ...]]] = {}
        for name, told in self.deployments.items():
            identities.setdefault(first_deployment(name), set()).update(one.identity for one in told)
        return tuple(name for name, kinds in identities.items() if len(kinds) > 1)

    @property
    def digest(self) -> str:
        """Eight digits: the same for the same kernels, however many replicas there are and whoever answers."""
        identities = {name: [one.identity for one in self.distinct(name)] for name in self.deployments}
        return hashlib.sha256(json.dumps(identities, sort_keys=True).encode()).hexdigest()[:8]

    def distinct(self, deployment: str) -> list[ProcessKernels]:
        """One of each kind that its replicas have, in the order of what decides bits."""
        kinds = {one.identity: one for one in self.deployments[deployment]}
        return [kinds[identity] for identity in sorted(kinds)]

    def formats(self, deployment: str) -> tuple[str, ...]:
        """What the numbers of a deployment's replicas are, on all tiers of its group."""
        told = [one for name, told in self.deployments.items() if first_deployment(name) == deployment for one in told]
        return tuple(sorted({one.format for one in told}))


def kernels_family(kernels: ProcessKernels) -> Metric:
    """Those of one process, in labels; where they differ between the replicas of a deployment tokens may."""
    labels = {**kernels.names, "batch_invariant": str(kernels.batch_invariant).lower()}
    family = GaugeMetricFamily("manta_kernels_info", "What computes in this process; always 1.", labels=list(labels))
    family.add_metric(list(labels.values()), 1)
    return family
