"""The Ray actor that holds the weights of one expert group and runs them. Knows nothing of Serve or of other groups.

Its constructor loads, so an actor that Ray restarts comes back loaded, or not at all. One thread runs its calls in
turn, `stats` among them: a shard that is stuck does not look alive.

Weights come from the checkpoint, which a node keeps in its page cache once a shard there has read it. From a living
replica they would take longer: 48 ms for a group of the demo model, where reading takes 20.

Torch is imported in the actor's own process only: the Serve replica that starts it stays small.
"""

from __future__ import annotations

import logging
import os
import pickle
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import psutil
import ray
import ray.util

from cluster.checkpoint.quantization.rounding import Rounding
from cluster.errors import CheckpointError, ConfigError, ExpertUnavailable
from cluster.expert_deployments import expert_deployment_name
from cluster.telemetry.process_logs import log_to_standard_error

if TYPE_CHECKING:
    from torch import Tensor

    from cluster.checkpoint.checkpoint import ModelImpl
    from cluster.telemetry.kernels import ProcessKernels
    from experts_service.kernels.swiglu import Prepared
    from experts_service.loaded_experts import LoadedExperts
    from experts_service.shard.server import LaneServer
    from experts_service.wire.address import LaneAddress

logger = logging.getLogger(__name__)

DEVICE_IS_GONE = 3  # the exit code of a process that ends for it


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """Everything a shard needs to start, anywhere."""

    application: str
    directory: str  # of the checkpoint
    fingerprint: str
    group: int
    experts: tuple[int, ...]
    num_groups: int
    dtype: Literal["float32", "bfloat16"]
    device: Literal["cpu", "cuda"] = "cpu"
    num_threads: int | None = None  # None: the process's cores shared among the groups
    kernels: str = "auto"  # as in EngineConfig
    batch_invariant: str = "auto"  # the same
    rounding: Rounding | None = None
    model_impl: ModelImpl = "native"
    deployment: str | None = None  # the Serve deployment's name, where the group has several
    gpus: float = 0.0
    load_timeout_s: float = 1800.0
    lane_secret_file: str | None = None  # None: no lanes

    @property
    def name(self) -> str:
        """Of the Serve deployment."""
        return self.deployment or expert_deployment_name(self.group)


@dataclass(frozen=True, slots=True)
class ShardStats:
    """A snapshot of one shard."""

    incarnation: str  # differs after each restart
    group: int
    rows_per_expert: tuple[int, ...]  # in the group's order, over all layers
    calls: int
    busy_s: float  # time spent computing
    loaded_s: float  # time it took to load
    kernels: ProcessKernels
    resident_bytes: int = 0  # of its process
    lane_connections: int = 0  # now
    lane_frames: int = 0
    lane_queue_s: float = 0.0  # from a frame's arrival to its turn, summed
    lane_late: int = 0  # frames whose deadline passed before their turn
    lane_refused: int = 0  # peers whose handshake or frames were wrong


class ExpertShard:
    """The weights of one group, all layers."""

    def __init__(self, spec: ShardSpec) -> None:
        log_to_standard_error()
        self._spec = spec
        self._incarnation = uuid.uuid4().hex
        self._rows = [0] * len(spec.experts)
        self._calls = 0
        self._busy_s = 0.0
        self._one_at_a_time = threading.Lock()  # the actor's calls and the thread of the lanes share the weights
        started = time.monotonic()
        self._experts = self._load()
        self._loaded_s = time.monotonic() - started
        self._lanes = self._open_lanes()

    def lane_address(self) -> LaneAddress:
        """Where this incarnation listens. Raises ExpertUnavailable when it has no lanes."""
        from experts_service.wire.address import LaneAddress

        if self._lanes is None:
            raise ExpertUnavailable(f"the shard of expert group {self._spec.group} has no lanes")
        node_id = ray.get_runtime_context().get_node_id()
        thread_id = self._lanes.thread_id if self._computes_on_one_thread() else 0
        return LaneAddress(str(self._lanes.path), self._host, self._lanes.port, node_id, self._incarnation, thread_id)

    def drain(self, timeout_s: float) -> bool:
        """Refuse rows on lanes from now on; whether those in flight were answered before the timeout."""
        return self._lanes is None or self._lanes.drain(timeout_s)

    def run(
        self,
        fingerprint: str,
        layer: int,
        counts: tuple[int, ...],
        batch: np.ndarray[Any, Any],
        row_indices: np.ndarray[Any, Any],
    ) -> np.ndarray[Any, Any]:
        """The rows `row_indices` [R] of `batch` [T, D], by expert, to answers [R, D]. bf16 travels as uint16."""
        import torch

        rows = torch.from_numpy(batch.take(row_indices, axis=0)).view(self._experts.dtype)  # [R, D]
        y = self._compute(fingerprint, layer, counts, rows)
        answer: np.ndarray[Any, Any] = (y.view(torch.uint16) if y.dtype is torch.bfloat16 else y).numpy()
        return answer

    def run_inline(self, call: bytes) -> bytes:
        """The same for few rows: all arguments in one pickle, rows [R, D] as their bytes, and so the answer.

        Ray treats bytes a third faster than the same in arrays and arguments of their own.
        """
        import torch

        fingerprint, layer, counts, data = pickle.loads(call)
        rows = torch.frombuffer(bytearray(data), dtype=self._experts.dtype).view(sum(counts), -1)  # [R, D]
        y = self._compute(fingerprint, layer, counts, rows)
        answer: bytes = y.view(torch.uint8).numpy().tobytes()
        return answer

    def _compute(self, fingerprint: str, layer: int, counts: tuple[int, ...], rows: Tensor) -> Tensor:
        if fingerprint != self._spec.fingerprint:
            raise ExpertUnavailable(
                f"expert group {self._spec.group} serves the checkpoint {self._spec.fingerprint[:8]}, "
                f"and was asked for {fingerprint[:8]}: experts of two versions never mix"
            )
        return self._run(layer, rows, counts)

    def _run(self, layer: int, rows: Tensor, counts: Sequence[int], answers: Tensor | None = None) -> Tensor:
        """Rows [R, D] on the host → answers [R, D] there; `answers` may be written, and returned.

        A shard on a GPU takes rows there as well, with `answers` beside them.
        """
        with self._one_at_a_time:
            started = time.perf_counter()
            try:
                if self._experts.device.type == "cpu":
                    answer = self._experts(layer, rows, counts, answers)  # [R, D]
                else:
                    answer = self._run_on_gpu(layer, rows, counts, answers)
            except Exception:
                self._end_without_a_device()
                raise
            self._rows = [total + count for total, count in zip(self._rows, counts, strict=True)]
            self._calls += 1
            self._busy_s += time.perf_counter() - started
        return answer

    def _prepare(self, layer: int, rows: Tensor, counts: Sequence[int], answers: Tensor) -> Prepared | None:
        """The same without Python, and beside the actor's calls: they share no memory but the weights."""
        return self._experts.prepared(layer, rows, counts, answers) if self._experts.device.type == "cpu" else None

    def _run_on_gpu(self, layer: int, rows: Tensor, counts: Sequence[int], answers: Tensor | None) -> Tensor:
        from experts_service.device import on_host, wait_for_queue

        # The rows stay where they are until the answer is there.
        rows = rows.to(self._experts.device, non_blocking=True)
        if answers is not None and not answers.is_cpu:
            self._experts(layer, rows, counts, answers)
            wait_for_queue(answers.device)  # it is told of next
            return answers
        answer = self._experts(layer, rows, counts)
        return on_host(answer) if answers is None else answers.copy_(answer)

    def _end_without_a_device(self) -> None:
        """After an error: end the process where its device does not work any more.

        A CUDA context that has failed once fails for ever. Ray starts the process again, and coordinators see their
        connections close; a shard that only said that it failed would be asked again and again.
        """
        from experts_service.device import check_device

        try:
            check_device(self._experts.device)
        except Exception:
            logger.critical("%s ends: its device is gone", self._spec.name, exc_info=True)
            logging.shutdown()
            os._exit(DEVICE_IS_GONE)

    def _open_lanes(self) -> LaneServer | None:
        """Serve lanes, unless this node has no secret for them: object_store works without."""
        import torch

        from experts_service.shard.server import LaneServer
        from experts_service.wire.frame import LaneShape
        from experts_service.wire.secret import read_lane_secret

        spec = self._spec
        if spec.lane_secret_file is None:
            return None
        try:
            secret = read_lane_secret(Path(spec.lane_secret_file))
        except ConfigError as error:
            logger.warning("%s has no lanes: %s", spec.name, error)
            return None
        self._host = ray.util.get_node_ip_address()
        shape = LaneShape(self._experts.num_layers, len(spec.experts), self._experts.hidden, getattr(torch, spec.dtype))
        server = LaneServer(
            partial(ExpertShard._run, self),  # Ray wraps what an actor's own class has, for traces
            shape,
            secret=secret,
            fingerprint=spec.fingerprint,
            host=self._host,
            pinned=spec.device == "cuda",
            device=self._experts.device if spec.device == "cuda" else None,
            prepare=partial(ExpertShard._prepare, self),
        )
        server.start()
        return server

    def _computes_on_one_thread(self) -> bool:
        import torch

        return self._spec.device == "cpu" and torch.get_num_threads() == 1

    def stats(self) -> ShardStats:
        """Also the sign of life that its ExpertService asks for. Raises ExpertUnavailable when its lanes are dead."""
        lanes = None if self._lanes is None else self._lanes.stats()
        rows, calls, busy_s = tuple(self._rows), self._calls, self._busy_s
        if lanes is not None and lanes.compiled.frames:
            rows = tuple(map(add, rows, lanes.compiled.rows))
            calls, busy_s = calls + lanes.compiled.frames, busy_s + lanes.compiled.ran_s
        return ShardStats(
            incarnation=self._incarnation,
            group=self._spec.group,
            rows_per_expert=rows,
            calls=calls,
            busy_s=busy_s,
            loaded_s=self._loaded_s,
            kernels=self._kernels,
            resident_bytes=psutil.Process().memory_info().rss,
            lane_connections=lanes.connections if lanes else 0,
            lane_frames=lanes.frames if lanes else 0,
            lane_queue_s=lanes.queue_s if lanes else 0.0,
            lane_late=lanes.late if lanes else 0,
            lane_refused=lanes.refused if lanes else 0,
        )

    def _load(self) -> LoadedExperts:
        import torch

        from cluster.checkpoint.checkpoint import open_checkpoint
        from cluster.telemetry.progress import LoadingProgress
        from experts_service.device import give_back_unused
        from experts_service.kernels.cores import cores
        from experts_service.kernels.selection import select
        from experts_service.loaded_experts import load_experts

        spec = self._spec
        torch.set_num_threads(spec.num_threads or max(1, cores() // spec.num_groups))
        dtype, device = getattr(torch, spec.dtype), torch.device(spec.device)
        selection = select(dtype, device, kernels=spec.kernels, batch_invariant=spec.batch_invariant)
        rounded = spec.rounding is not None and spec.rounding.has("experts")
        self._kernels = selection.told(dtype, device, weights=str(spec.rounding) if rounded else "")
        logger.info("%s: %s", spec.name, selection)
        checkpoint = open_checkpoint(spec.directory, spec.model_impl).rounded(spec.rounding)
        if checkpoint.fingerprint != spec.fingerprint:
            raise CheckpointError(f"{spec.directory} changed since the server started; restart it to serve the new one")
        if checkpoint.widened:
            logger.info("%s: %s", spec.name, checkpoint.widening(spec.dtype))
        total = checkpoint.expert_bytes(spec.experts)
        experts = load_experts(
            checkpoint,
            spec.experts,
            dtype=dtype,
            device=device,
            kernel=selection.kernel,
            on_bytes=LoadingProgress(spec.application, spec.name, total),
        )
        give_back_unused(device)
        return experts


def start_shard(spec: ShardSpec, name: str, **options: Any) -> Any:
    """Start the actor; returns its handle before it has loaded. `options` are Ray's, placement for one."""
    return (
        ray.remote(ExpertShard)
        .options(
            name=name,
            num_cpus=options.pop("num_cpus", 0),
            num_gpus=spec.gpus,
            max_restarts=-1,
            max_task_retries=0,  # the transport re-sends, with a deadline
            enable_task_events=False,  # two a layer would drown the dashboard, and cost time
            **options,
        )
        .remote(spec)
    )
