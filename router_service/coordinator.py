"""The Serve deployment around an engine: loads, connects to the experts, streams tokens. Knows no door and no maths."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import torch
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.schema import LoggingConfig

from cluster.checkpoint.checkpoint import ModelImpl, open_checkpoint
from cluster.config import CoordinatorScalingConfig, EngineConfig, ExpertsConfig
from cluster.errors import CheckpointError, CoordinatorLost, ExpertUnavailable, MantaError, StepFailed
from cluster.messages import Embedding, EngineStats, Key, Request, TokenChunk, TokenStream
from cluster.planning.placement import DeviceShare, ExpertGroup, as_one
from cluster.planning.scaling_policy import LOAD, WAITING, replica_options
from cluster.telemetry.kernels import ProcessKernels
from cluster.telemetry.metrics import ProcessFigures
from cluster.telemetry.process_logs import log_where_serve_does
from cluster.telemetry.progress import LoadingProgress
from cluster.telemetry.traces import Traces
from cluster.termination import Termination
from experts_service.carriers.local import LocalTransport
from experts_service.client import ExpertPool
from experts_service.loaded_experts import load_experts
from experts_service.transport import Transport
from router_service.adjustments import Adjustments, has_adjustments
from router_service.assembly import build_engine, process_kernels, resolve_device, select_kernel
from router_service.dispatcher import Dispatcher
from router_service.engine import Event
from router_service.grammar.compiler import GrammarCompiler
from router_service.grammar.vocabulary import GrammarVocabulary
from router_service.pending_embedding import PendingEmbedding
from router_service.scheduling.scheduler import Batch
from router_service.step_failures import told
from router_service.telemetry.engine_metrics import EngineMetrics
from router_service.telemetry.engine_traces import EngineTraces
from router_service.token_outbox import OutgoingTokens, TokenOutboxes

logger = logging.getLogger(__name__)

DEPLOYMENT = "coordinator"
LAST_WORDS_S = 0.5  # of a process whose engine has died: its requests are told that they may go on elsewhere
EMBEDDINGS_AT_ONCE = 32  # of one call are queued, so that others get their turn
OTLP_ENDPOINT = "MANTA_OTLP_ENDPOINT"  # the environment's variable with the collector's URL
CPUS = 0.01  # its threads are set by config; Ray is not to count them against the experts'


class Coordinator:
    """One replica: attention, gate and KV cache of a model, and the way to its experts."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        directory: str,
        fingerprint: str,
        model_impl: ModelImpl,
        engine: EngineConfig,
        experts: ExpertsConfig,
        groups: tuple[ExpertGroup, ...],
        of_tiers: Mapping[str, str],
        shares: tuple[DeviceShare, ...],
        *handles: Any,
    ) -> None:
        """Returns once it can serve; Serve calls the replica ready then. Raises SetupError or ExpertUnavailable.

        `handles` are those of the groups' deployments; none with the transport `local`. `of_tiers` has fingerprints of
        those that round the checkpoint otherwise than this process. `engine.dtype` is resolved: the shards were told
        the same. `shares` says who may be on the same device.
        """
        log_where_serve_does()
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[Key, OutgoingTokens | PendingEmbedding] = {}
        self._outboxes = TokenOutboxes()
        context = serve.get_replica_context()
        self._replica = replica = context.replica_id.unique_id
        self._termination = Termination(context._deployment_config.graceful_shutdown_timeout_s)
        self._pool = ExpertPool(handles, coordinator=replica)
        self._traces = EngineTraces(Traces("manta-coordinator", os.environ.get(OTLP_ENDPOINT)))
        self._metrics = EngineMetrics(replica, groups, self._pool.latency)
        await asyncio.to_thread(
            self._load, directory, fingerprint, model_impl, engine, experts, groups, of_tiers, shares
        )

    def _load(
        self,
        directory: str,
        fingerprint: str,
        model_impl: ModelImpl,
        engine: EngineConfig,
        experts: ExpertsConfig,
        groups: tuple[ExpertGroup, ...],
        of_tiers: Mapping[str, str],
        shares: tuple[DeviceShare, ...],
    ) -> None:
        checkpoint = open_checkpoint(directory, model_impl).rounded(engine.rounding)
        if checkpoint.fingerprint != fingerprint:
            raise CheckpointError(f"{directory} changed since the server started; restart it to serve the new one")
        self._revision = checkpoint.revision
        local = experts.transport == "local"
        device, dtype = resolve_device(engine), getattr(torch, engine.dtype)
        progress = LoadingProgress(
            serve.get_replica_context().app_name,
            DEPLOYMENT,
            checkpoint.coordinator_bytes() + sum(checkpoint.expert_bytes(group.experts) for group in groups if local),
        )
        selection = select_kernel(engine, dtype, device)
        transport: Transport
        if local and device.type == "cuda":
            groups = as_one(groups)  # whose rows nobody on the host has to count
        if local:
            transport = LocalTransport(
                {
                    group.index: load_experts(
                        checkpoint,
                        group.experts,
                        dtype=dtype,
                        device=device,
                        kernel=selection.kernel,
                        on_bytes=progress,
                    )
                    for group in groups
                }
            )
        else:
            self._pool.connect(experts.load_timeout_s)
            transport = self._pool.transport(
                fingerprint,
                experts.expert_timeout_s,
                name=experts.transport,
                of_tiers=of_tiers,
                lane_secret_file=experts.lane_secret_file,
                spread_over_cores=experts.spread_over_cores,
                device=device if device.type == "cuda" and experts.rows_on_gpus else None,
            )
        dispatcher = Dispatcher(groups, transport)
        self._engine = build_engine(
            checkpoint,
            engine,
            dispatcher,
            self._deliver,
            on_bytes=progress,
            observe_step=self._observe_step,
            on_death=self._end_process,
            shares=shares,
            local_experts=local,
            selection=selection,
        )
        rounds = engine.rounding is not None and (local or engine.rounding.has("attention"))
        self._engine.model_runner.decoder.layer_times = self._traces.layer_times
        self._kernels = process_kernels(self._engine, selection, str(engine.rounding) if rounds else "")
        blocks = self._engine.scheduler.block_manager
        cache = {
            "block_size": blocks.block_size,
            "num_gpu_blocks": blocks.num_blocks,
            "enable_prefix_caching": blocks.prefix_caching,
        }
        self._metrics.watch(self._engine.stats, cache, self._kernels)
        architecture = checkpoint.architecture
        self._vocab_size = architecture.vocab_size
        self._grammars = GrammarCompiler(
            GrammarVocabulary(directory, checkpoint.layout, architecture.vocab_size, architecture.eos_token_ids),
            timeout_s=engine.grammar_timeout_s,
            token_timeout_s=engine.grammar_token_timeout_s,
            cache_bytes=engine.grammar_cache_mib * 2**20,
        )
        self._engine.start()

    async def generate(self, request: Request, gateway: str) -> MantaError | None:
        """Return once the tokens of one choice are on their way in that gateway's stream, or the error that ended them.

        It is returned because Serve logs what is raised through it as its own failure, with the client's words in the
        traceback. Cancelling aborts the sequence.
        """
        try:
            await self._generate(request, gateway)
        except MantaError as error:
            return error
        return None

    async def _generate(self, request: Request, gateway: str) -> None:
        self._check_unique(request)
        span, failure = self._traces.begin(request), None
        with self._outboxes.of(gateway).outgoing(request.key) as outgoing:
            self._waiting[request.key] = outgoing
            try:
                if request.grammar is not None or has_adjustments(request.sampling):
                    self._engine.check_admission(request)  # work is done only for who will be served
                self._engine.submit(request, await self._grammars.state(request), await self._adjustments(request))
                await outgoing.sent()
            except Exception as error:
                failure = error
                if isinstance(error, StepFailed | ExpertUnavailable):
                    error.coordinator = self._replica
                raise
            finally:
                del self._waiting[request.key]
                self._engine.abort(request.key)
                self._traces.end(request, span, outgoing.num_tokens, failure)

    async def _adjustments(self, request: Request) -> Adjustments | None:
        """Made off the event loop and off the engine's thread: their cost grows with the prompt."""
        if not has_adjustments(request.sampling):
            return None
        return await asyncio.to_thread(Adjustments, request, self._vocab_size)

    async def token_stream(self, stream: TokenStream) -> AsyncIterator[tuple[TokenChunk, ...]]:
        """The tokens of all requests that a gateway has here, step by step, until it closes the stream.

        Raises CoordinatorLost when another replica was meant.
        """
        if stream.coordinator != self._replica:
            raise CoordinatorLost("Serve has sent this to another coordinator")
        async with aclosing(self._outboxes.of(stream.gateway).items()) as items:
            async for item in items:
                yield item

    async def embed(self, requests: tuple[Request, ...]) -> tuple[Embedding, ...] | MantaError:
        """The embedding of each prompt, in order, or the error of the first that fails. Cancelling aborts all."""
        try:
            return await self._embed(requests)
        except MantaError as error:
            return error

    async def _embed(self, requests: tuple[Request, ...]) -> tuple[Embedding, ...]:
        embeddings: list[Embedding] = []
        for start in range(0, len(requests), EMBEDDINGS_AT_ONCE):
            asked = requests[start : start + EMBEDDINGS_AT_ONCE]
            for request in asked:
                self._check_unique(request)
            part = {request.key: PendingEmbedding() for request in asked}
            self._waiting |= part
            try:
                for request in asked:
                    self._engine.submit(request)
                embeddings += await asyncio.gather(*(pending.get() for pending in part.values()))
            except (StepFailed, ExpertUnavailable) as error:
                error.coordinator = self._replica
                raise
            finally:
                for key in part:
                    del self._waiting[key]
                    self._engine.abort(key)
        return tuple(embeddings)

    async def stats(self) -> EngineStats:
        """A snapshot of the engine, and whom it misses."""
        return replace(self._engine.stats(), missing_experts=tuple(self._pool.missing()), revision=self._revision)

    async def kernels(self) -> ProcessKernels:
        """What computes here; a gateway and `manta status` ask."""
        return self._kernels

    async def metrics(self) -> ProcessFigures:
        """What this process counted, for the gateway's /metrics."""
        return self._metrics.figures()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the scaling policy decides by: how full the cache or the batch is, and who waits for a place."""
        stats, max_num_seqs = self._engine.stats(), self._engine.scheduler.max_num_seqs
        used = max(stats.num_kv_blocks_used / stats.num_kv_blocks, stats.num_requests_running / max_num_seqs)
        return {LOAD: used, WAITING: float(stats.num_requests_waiting)}

    async def check_health(self) -> None:
        """Called by Serve; raises EngineDead when only a new process can help, Unavailable after SIGTERM."""
        self._metrics.loop.start()
        self._termination.check()
        self._engine.check_alive()

    def __del__(self) -> None:
        """Serve calls this when the replica stops, after its streams have ended."""
        if engine := self.__dict__.pop("_engine", None):
            engine.stop()
            self._grammars.close()
            engine.model_runner.decoder.dispatcher.close()
            self._pool.close()
            self._traces.close()

    def _check_unique(self, request: Request) -> None:
        """Serve may send a call twice. Raises CoordinatorLost: the gateway asks again, under another id."""
        if request.key in self._waiting:
            raise CoordinatorLost(f"{request.request_id} is being answered already")

    def _end_process(self) -> None:
        """On the engine's thread: only a new process can help, and Serve starts one as soon as this one is gone."""
        logger.critical("the engine has died; the process ends, so that Serve replaces it")
        threading.Timer(LAST_WORDS_S, os._exit, (1,)).start()

    def _observe_step(self, seconds: float, batch: Batch) -> None:
        """On the engine's thread."""
        self._metrics.observe_step(seconds, sum(scheduled.num_tokens for scheduled in batch))
        self._metrics.observe_requests(batch)
        self._traces.observe_step(seconds, batch)

    def _deliver(self, events: list[Event]) -> None:
        """On the engine's thread, once a step: hand its results to the event loop in one call."""
        self._loop.call_soon_threadsafe(self._hand_out, events)

    def _hand_out(self, events: list[Event]) -> None:
        for key, item in events:
            waiting = self._waiting.get(key)
            if waiting is None:  # who waited has just left
                continue
            try:
                waiting.put(item)  # type: ignore[arg-type]  # chunks are for requests only, embeddings for the others
            except Exception as error:  # the others' items are still to be handed out
                logger.exception("%s could not be given what a step made", key)
                waiting.put(item if isinstance(item, MantaError) else told(error))


def coordinator_deployment(
    *arguments: Any,
    scaling: CoordinatorScalingConfig,
    code_version: str,
    max_surge_percent: int,
    gpus: float,
    label_selector: Mapping[str, str],
    openmp_spin_count: int,
    otlp_endpoint: str | None,
    request_timeout_s: float,
    max_ongoing_requests: int,
    request_router: str,
) -> serve.Application:
    """The bound Serve deployment `coordinator`; `arguments` are those of Coordinator.

    `request_router` is where the class is that chooses a replica in the processes that call it. Serve restarts no
    replica where all but the numbers of `scaling` and the `code_version` stays the same.
    """
    environment = {"GOMP_SPINCOUNT": str(openmp_spin_count)}  # read when torch is imported
    if otlp_endpoint is not None:
        environment[OTLP_ENDPOINT] = otlp_endpoint
    deployment = serve.deployment(Coordinator).options(
        name=DEPLOYMENT,
        **replica_options(scaling),
        ray_actor_options={"num_cpus": CPUS, "num_gpus": gpus, "runtime_env": {"env_vars": environment}}
        | ({"label_selector": dict(label_selector)} if label_selector else {}),
        max_ongoing_requests=max_ongoing_requests,
        request_router_config=RequestRouterConfig(request_router_class=request_router),
        health_check_period_s=1.0,
        health_check_timeout_s=10.0,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=request_timeout_s + 10.0,  # the longest stream ends by itself before
        max_surge_percent=max_surge_percent,
        logging_config=LoggingConfig(enable_access_log=False),
    )
    deployment = deployment.options(version=code_version, _internal=True)  # Serve would make one up each time
    return deployment.bind(*arguments)
