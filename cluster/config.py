"""The configuration: one frozen tree, read from YAML. Knows units and bounds; knows nothing of what is built from it.

    models:
      - name: mixtral
        path: /models/Mixtral-8x7B-Instruct-v0.1
        experts: {groups: [[0, 1], [2, 3], [4, 5], [6, 7]]}
    gateway: {http_port: 8000}

An unknown key is refused, with the nearest known one in the message.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from cluster.checkpoint.quantization.rounding import Parts, Rounding
from cluster.errors import ConfigError
from cluster.messages import ReasoningParser, ToolParser
from cluster.yaml_document import parse_yaml

Transport = Literal["auto", "lane", "object_store", "local"]
Quantization = Literal["none", "int8", "int4", "fp8"]
Switch = Annotated[
    Literal["auto", "on", "off"],
    BeforeValidator(lambda value: {True: "on", False: "off"}[value] if isinstance(value, bool) else value),  # YAML's on
]


def _absolute(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError:  # pathlib's
        raise ValueError(f"{path}: there is no such user's home directory") from None


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]  # other processes read it
AbsoluteName = Annotated[str, AfterValidator(lambda name: str(_absolute(Path(name))))]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class EngineConfig(_Frozen):
    """The coordinator's engine: scheduler, KV cache, numerics."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the model computes in. `auto`: the checkpoint's own, float16 as bfloat16."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: the GPU that the process was given, if any."""
    max_model_len: int | None = Field(None, ge=1)
    """Tokens of prompt and answer together. None: the checkpoint's context."""
    block_size: int = Field(16, ge=1, le=256)
    """Tokens in one block of the KV cache. Attention reads blocks in place where this is a multiple of 16 on a CPU, and
    always on a GPU.
    """
    num_kv_blocks: int | None = Field(None, ge=2)
    """Blocks of the KV cache. None: as many as `kv_cache_gib` holds."""
    kv_cache_dtype: Literal["auto", "int8"] = "auto"
    """What keys and values are kept in. `auto`: what the model computes in. `int8`, on a CPU: 8-bit integers with a
    scale for each token and head, so that the same memory holds nearly twice the tokens of bf16.
    """
    kv_cache_gib: float | None = Field(None, gt=0)
    """Size of the KV cache. None: what steps and neighbours leave of nine tenths of the GPU, or of a fifth of the
    memory that is free at start.
    """
    max_num_seqs: int = Field(64, ge=1)
    """Sequences in one step."""
    max_num_batched_tokens: int = Field(2048, ge=1)
    """Tokens in one step. Longer prompts are cut into chunks."""
    max_waiting: int = Field(256, ge=1)
    """Requests that wait in one coordinator. Past it those who hold most get 429."""
    prefix_caching: bool = True
    """Prompts of one key that begin alike share the blocks of their beginning."""
    grammar_timeout_s: float = Field(10.0, gt=0)
    """Time to compile a schema that may be costly, longer until it had a quarter of that as CPU time. Past it 400."""
    grammar_token_timeout_s: float = Field(1.0, gt=0)
    """CPU time to find which tokens may come next. Past it 400."""
    grammar_cache_mib: int = Field(256, ge=1)
    """Memory for compiled grammars. The least recently used leave first."""
    microbatches: Literal["auto"] | Annotated[int, Field(ge=1, le=3)] = "auto"
    """Parts of a step that take turns computing and waiting. `auto`: 1: more was measured to be faster
    nowhere yet.
    """
    async_scheduling: Switch = "auto"
    """Whether a step that only decodes is followed by the next before its tokens are read, so that a GPU does not wait
    for the host. The tokens are the same. `auto`: on a GPU. Grammars, penalties and `routed_experts` need each token
    at once, and have their steps read at once.
    """
    cuda_graphs: Switch = "auto"
    """Whether steps that only decode are replayed as CUDA graphs, for each of a few batch sizes, captured at start.
    With experts elsewhere each piece between two dispatches is one. `auto`: where attention can be captured and
    `microbatches` is 1. `on`: the same, and an error elsewhere.
    """
    kernels: Literal["auto", "dot", "fma", "onednn", "torch"] = "auto"
    """What multiplies bf16 on a CPU, in coordinators and shards. `dot`: our own, where it has AVX512-BF16. `fma`: our
    own, with the same bits on every CPU. `onednn` and `torch`: those libraries. `auto`: what `batch_invariant` leaves
    and is fastest here, measured at the first start.
    """
    batch_invariant: Switch = "auto"
    """Whether a sequence's matmuls in bf16 have the same bits whatever else is in the batch. `on`: by our own kernels.
    `off`: by whatever is fastest. `auto`: on, unless it costs more than 10 %. A model on machines with different CPUs
    needs `on` and `kernels: fma`. On a GPU `on` takes Triton kernels of ours for all matmuls, in fp32 too; else torch
    has those of attention and the head, as no card has shown what that costs. In fp32 on a CPU torch multiplies and
    rounds by the number of rows: the log warns of `on`, and `/v1/models` says what is.
    """
    quantization: Quantization = "none"
    """What matrices of a plain checkpoint are rounded to while they are read, to the nearest. Gate, norms and
    embeddings stay as they are. A checkpoint that is quantised already needs `none`.
    """
    quantization_group_size: int = Field(128, ge=16, le=1024, multiple_of=8)
    """Neighbouring inputs that share a scale of integers. FP8 has one for each output."""
    quantized_parts: Parts = "all"
    """Whose matrices: of `experts`, `attention`, both (`layers`), or the output head as well (`all`), in 8 bits where
    the others are integers, else as it is. A dense layer's feed-forward network counts as experts.
    """
    num_threads: int | None = Field(None, ge=1)
    """Threads of one operation in the coordinator, at most. None: one for each core that the process has, by its
    affinity and its container's quota.
    """
    openmp_spin_count: int = Field(200, ge=0)
    """How often a waiting OpenMP thread of the coordinator looks before it sleeps. OpenMP's own default, 300,000, keeps
    a core from the experts: with one other busy process on 2 cores, steps of the bench model took 39 ms with 200, 57
    ms with 5,000 and 134 ms with 30,000.
    """

    @property
    def rounding(self) -> Rounding | None:
        """What is done to matrices while they are read."""
        return _rounding(self.quantization, self.quantization_group_size, self.quantized_parts)

    @field_validator("kv_cache_dtype", mode="before")
    @classmethod
    def _no_kernel_takes_fp8(cls, value: object) -> object:
        if isinstance(value, str) and value.startswith("fp8"):
            raise ValueError(f"no kernel here takes keys and values in {value}; on a CPU int8 takes as little room")
        return value

    @model_validator(mode="after")
    def _a_library_is_not_batch_invariant(self) -> Self:
        if self.batch_invariant == "on" and self.kernels in ("onednn", "torch"):
            raise ValueError(f"batch_invariant: on needs kernels of our own, dot or fma, and not {self.kernels}")
        return self


def _rounding(quantization: Quantization, group_size: int, parts: Parts) -> Rounding | None:
    if quantization == "none":
        return None
    return Rounding.to(quantization, group_size, parts)


class ReplicaBounds(_Frozen):
    """How many replicas a deployment has, at least and at most, and how soon it follows its load."""

    min_replicas: int = Field(1, ge=1)
    """At least so many."""
    max_replicas: int = Field(1, ge=1)
    """At most so many."""
    upscale_delay_s: float = Field(10.0, ge=0)
    """The load has to ask for more replicas for so long."""
    downscale_delay_s: float = Field(120.0, ge=0)
    """The load has to ask for fewer replicas for so long."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas: must be at least min_replicas ({self.min_replicas})")
        return self


class ScalingConfig(ReplicaBounds):
    """How many replicas an expert group has, and what its load has to be for more or fewer.

    A replica's load is the part of the time that it computes; rows that wait for their turn count as well.
    """

    target_busy_fraction: float = Field(0.7, gt=0, le=1)
    """Part of the time that a replica computes. Above it more replicas, well below it fewer."""
    max_queue_s: float = Field(0.01, gt=0)
    """Mean time that a dispatch waits for its turn. Above it one replica more."""


class CoordinatorScalingConfig(ReplicaBounds):
    """How many coordinators a model has. Their load is what they have given away of their cache or batch."""

    target_used_fraction: float = Field(0.8, gt=0, le=1)
    """Of the KV blocks, or of `max_num_seqs` if that is more. Above it more coordinators."""
    max_waiting: float = Field(1.0, ge=0)
    """Sequences that wait in each coordinator. Above it one coordinator more."""


class GatewayScalingConfig(ReplicaBounds):
    """How many gateways there are, and what their load has to be for more or fewer."""

    target_requests: float = Field(64.0, gt=0)
    """Requests that one gateway answers. Above it more gateways."""


class TierScalingConfig(ScalingConfig):
    """How many replicas a group has on one tier, and what their load has to be for more or fewer."""

    min_replicas: int = Field(1, ge=0)
    """At least so many. 0, where the group has another tier: one comes when the tier before has as many as it may
    have, and needs more, or when it has lost all.
    """


class TierConfig(_Frozen):
    """Hardware that some of the expert groups are on, and what their numbers are there."""

    groups: tuple[int, ...] | None = None
    """These, by their position in `experts.groups`. None: those that no other tier names. A group that several tiers
    name has replicas on each of them; the first one is preferred where others begin with none.
    """
    device: Literal["cpu", "cuda"] = "cpu"
    """What their shards compute on."""
    gpus_per_shard: float | None = Field(None, ge=0)
    """GPUs, or a fraction of one, for each shard. None: 1 with `device: cuda`, else 0. What is given is reserved, also
    with `device: cpu`.
    """
    label_selector: dict[str, str] = {}
    """Ray's labels of the nodes that they may be on, beside those of `experts.label_selector`."""
    quantization: Literal["auto"] | Quantization = "auto"
    """What the matrices of experts are rounded to while shards of this tier read them. `auto`: as `engine` says."""
    quantization_group_size: int | None = Field(None, ge=16, le=1024, multiple_of=8)
    """Neighbouring inputs that share a scale. None: as `engine` says."""
    scaling: TierScalingConfig | None = None
    """Replicas of each of its groups on this tier. None: as `experts.scaling` and `experts.group_scaling` say."""

    @property
    def gpus(self) -> float:
        """Of each shard."""
        return float(self.device == "cuda") if self.gpus_per_shard is None else self.gpus_per_shard

    @model_validator(mode="after")
    def _cuda_needs_a_gpu(self) -> Self:
        if self.device == "cuda" and self.gpus == 0:
            raise ValueError("gpus_per_shard: a shard on cuda needs a part of a GPU")
        return self


class ExpertsConfig(_Frozen):
    """The expert groups of one model and how rows reach them."""

    groups: Literal["auto"] | tuple[tuple[int, ...], ...] = "auto"
    """The experts of each group, by index, the same in every layer. `auto`: one expert a group where there are GPUs for
    it.
    """
    scaling: ScalingConfig = ScalingConfig()
    """Replicas of every group."""
    group_scaling: dict[int, ScalingConfig] = {}
    """Replicas of single groups, by their position in `groups`."""
    tiers: tuple[TierConfig, ...] = ()
    """Which groups are on which hardware: busy ones on GPUs, the others in the memory of CPUs. Empty: all are on the
    coordinators' device.
    """
    mixed_replicas: bool = False
    """Replicas of one group may be on tiers with another device or another quantization. An answer may then hang on
    which of them computed it.
    """
    transport: Transport = "auto"
    """How rows travel. `auto`: through memory that a coordinator and the shards of its node share, over lanes to other
    nodes, and the object store to shards that have no lane.
    """
    rows_on_gpus: bool = True
    """With `auto`, between GPUs of one node: through memory of the shard's GPU, where the coordinator's reaches it.
    `false`: through the host's, which both read and write.
    """
    lane_secret_file: AbsoluteName | None = None
    """A file of mode 0600, the same on every node. None: `~/.manta/lane_secret`, made if it is missing."""
    gpus_per_shard: float | None = Field(None, ge=0)
    """GPUs, or a fraction of one, for each shard. None: 1 where the cluster has GPUs, else 0. What is given is
    reserved, also with `device: cpu`.
    """
    num_threads: int | None = Field(None, ge=1)
    """Threads of one operation in a shard. None: what was measured to be best."""
    spread_over_cores: bool = True
    """Where shards of one thread share few cores with their coordinator, it moves those that it asks at the same time
    to different cores.
    """
    label_selector: dict[str, str] = {}
    """Ray's labels of the nodes that shards may be on."""
    expert_timeout_s: float = Field(30.0, gt=0)
    """Time for one dispatch, with all its attempts. Past it the requests of that step fail."""
    load_timeout_s: float = Field(1800.0, gt=0)
    """Time for a shard to read its weights."""

    def tiers_of(self, group: int) -> dict[int, TierConfig]:
        """Those that the group at that position is on, by their own positions; none where there are no tiers."""
        tiers = dict(enumerate(self.tiers))
        named = {index: tier for index, tier in tiers.items() if tier.groups is not None and group in tier.groups}
        return named or {index: tier for index, tier in tiers.items() if tier.groups is None}

    def scaling_of(self, group: int, tier: TierConfig | None) -> ScalingConfig:
        """How many replicas a group has on a tier; None: where there are none."""
        if tier is not None and tier.scaling is not None:
            return tier.scaling
        return self.group_scaling.get(group, self.scaling)

    @model_validator(mode="after")
    def _each_group_is_on_a_tier(self) -> Self:
        if not self.tiers:
            return self
        if self.groups == "auto":
            raise ValueError("tiers: say which groups there are, in `groups`; tiers name them by their position")
        if self.gpus_per_shard is not None:
            raise ValueError("gpus_per_shard: each of the tiers has its own")
        if self.transport == "local":
            raise ValueError("transport: local leaves no shard to put on a tier")
        if [tier.groups for tier in self.tiers].count(None) > 1:
            raise ValueError("tiers: two of them have no `groups`; one at most is for all others")
        for tier in self.tiers:
            for group in tier.groups or ():
                if not 0 <= group < len(self.groups):
                    raise ValueError(f"tiers: there is no group {group}; groups are 0 to {len(self.groups) - 1}")
                if (times := (tier.groups or ()).count(group)) > 1:
                    raise ValueError(f"tiers: one of them names group {group} {times} times")
        for group in range(len(self.groups)):
            tiers = self.tiers_of(group)
            if not tiers:
                raise ValueError(f"tiers: group {group} is on none; a tier without `groups` has all others")
            if not self.scaling_of(group, next(iter(tiers.values()))).min_replicas:
                raise ValueError(f"tiers: group {group} begins without a replica; its first tier needs min_replicas: 1")
        return self


class ModelConfig(_Frozen):
    """One served model: a directory, and how it is laid out on the cluster."""

    name: str = Field(min_length=1, max_length=128)
    """What requests call it."""
    path: str
    """A directory, the id of a model on the hub, or an embedded model: `demo`, `demo-dense`."""
    revision: str | None = Field(None, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_./-]{0,127}$")
    """Commit, branch or tag of a model on the hub. None: main, as the local cache knows it, else as the hub does."""
    version: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.]{0,62}$")
    """Part of the Serve application's name, `<name>-<version>`. None: the first 8 digits of the checkpoint's
    fingerprint.
    """
    aliases: tuple[str, ...] = ()
    """Other names that requests may call it."""
    kind: Literal["chat", "embedding"] = "chat"
    """Whether it answers chats and completions, or makes embeddings."""
    pooling: Literal["mean", "last"] | None = None
    """Of kind `embedding`: the mean of all hidden states, or the last one. None: mean."""
    reasoning_parser: ReasoningParser = "auto"
    """What its reasoning is told from the answer by. `auto`: the tags that its chat template holds, if any. `qwen3`:
    `<think>`, `deepseek_r1`: the same, and an answer begins with reasoning also where nothing says so, `mistral`:
    `[THINK]`, `openai_gptoss`: the messages of harmony, `none`: nothing, and tags are text.
    """
    tool_parser: ToolParser = "auto"
    """How it writes calls of tools. `auto`: as its chat template does. `hermes`: in `<tool_call>`, Qwen's too,
    `llama3_json`: as JSON alone, `openai`: in messages of harmony, `mistral`: after `[TOOL_CALLS]`.
    """
    num_coordinators: int = Field(1, ge=1)
    """Coordinators, where `coordinator_scaling` does not say it."""
    coordinator_scaling: CoordinatorScalingConfig | None = None
    """Coordinators by load. None: `num_coordinators`, whatever the load."""
    model_impl: Literal["auto", "native", "transformers"] = "auto"
    """Whose code computes it. `native`: ours. `transformers`: that library's own model, of any family whose experts and
    attention can be replaced there, with plain weights. `auto`: ours where the family has some.
    """
    max_surge_percent: int = Field(100, ge=0, le=100)
    """Replicas that a rolling update may add for a while, of coordinators and of each group. With 0, for clusters that
    have no GPU to spare, an old one stops before its successor starts; steps wait for it meanwhile.
    """
    label_selector: dict[str, str] = {}
    """Ray's labels of the nodes that coordinators may be on."""
    engine: EngineConfig = EngineConfig()
    """Its coordinators' engine."""
    experts: ExpertsConfig = ExpertsConfig()
    """Its expert groups."""

    @property
    def coordinators(self) -> CoordinatorScalingConfig:
        """How many coordinators there are."""
        number = self.num_coordinators
        return self.coordinator_scaling or CoordinatorScalingConfig(min_replicas=number, max_replicas=number)

    def rounding_of(self, tier: TierConfig | None) -> Rounding | None:
        """What is done to matrices of experts while shards of a tier read them: the engine's where that is the same."""
        engine = self.engine
        of_all = engine.rounding
        if tier is None:
            return of_all
        as_all: Quantization = "none" if engine.quantized_parts == "attention" else engine.quantization
        size = engine.quantization_group_size
        quantization = as_all if tier.quantization == "auto" else tier.quantization
        own = _rounding(quantization, tier.quantization_group_size or size, "experts")
        return of_all if own == _rounding(as_all, size, "experts") else own

    @model_validator(mode="after")
    def _replicas_of_a_group_are_alike(self) -> Self:
        experts = self.experts
        for group in range(0 if experts.groups == "auto" else len(experts.groups)):
            kinds = {
                f"{self.rounding_of(tier) or 'as stored'} on {tier.device}" for tier in experts.tiers_of(group).values()
            }
            if len(kinds) > 1 and not experts.mixed_replicas:
                raise ValueError(
                    f"experts.tiers: replicas of group {group} are not alike ({'; '.join(sorted(kinds))}), and an "
                    "answer may hang on which of them computed it: experts.mixed_replicas: true says that it may"
                )
        return self

    @model_validator(mode="after")
    def _number_or_scaling(self) -> Self:
        if self.coordinator_scaling is not None and self.num_coordinators != 1:
            raise ValueError("num_coordinators: coordinator_scaling says it already, by min_replicas and max_replicas")
        return self

    @model_validator(mode="after")
    def _pooling_is_for_embeddings(self) -> Self:
        if self.pooling is not None and self.kind != "embedding":
            raise ValueError("pooling: only a model of `kind: embedding` pools")
        return self


class GatewayConfig(_Frozen):
    """The doors: where they listen and what they admit."""

    host: str = "127.0.0.1"
    """The address that both doors listen on."""
    http_port: int = Field(8000, ge=1, le=65535)
    """The port of HTTP."""
    grpc_port: int = Field(9000, ge=1, le=65535)
    """The port of gRPC."""
    num_replicas: int = Field(1, ge=1)
    """Gateways, where `scaling` does not say it."""
    scaling: GatewayScalingConfig | None = None
    """Gateways by load. None: `num_replicas`, whatever the load."""
    label_selector: dict[str, str] = {}
    """Ray's labels of the nodes that gateways may be on."""
    num_cpus: float = Field(0.0, ge=0)
    """Ray's CPUs that each gateway reserves. In pods it is half a gateway's pod: more gateways then make more pods."""
    request_timeout_s: float = Field(600.0, gt=0)
    """Deadline of a request that names none."""
    resume_timeout_s: float = Field(300.0, gt=0)
    """How long a request whose coordinator was lost waits for another one. Its deadline may come before."""
    max_body_bytes: int = Field(8 * 2**20, ge=1024)
    """Bytes of one request's body. Past it 413."""
    max_bytes_received: int = Field(256 * 2**20, ge=1024)
    """Bytes of bodies that wait for an answer, in each gateway. Past it those who hold most get 429."""
    body_timeout_s: float = Field(30.0, gt=0)
    """From the first byte of a request to the last of its body. Past it 408."""
    keepalive_s: float = Field(15.0, gt=0)
    """A stream without a token for so long gets a comment, so that no proxy takes it for dead. Over gRPC: HTTP/2 pings.
    """
    max_choices: int = Field(128, ge=1)
    """Choices of one request: `n` times its prompts."""
    max_embedding_inputs: int = Field(2048, ge=1)
    """Inputs of one request for embeddings."""
    max_embedding_tokens: int = Field(300_000, ge=1)
    """Tokens of all of them together."""
    max_ongoing_requests: int = Field(256, ge=1)
    """Requests in one gateway. Past it those who hold most get 429."""
    otlp_endpoint: str | None = None
    """Base URL of an OpenTelemetry collector, `http://collector:4318`. None: no traces."""
    log_format: Literal["text", "json"] = "text"
    """Of the one line that each request gets in the gateway's standard output."""
    accept_any_model: bool = False
    """An unknown model name means the first model, instead of 404."""
    cors_origins: tuple[str, ...] = ()
    """Whose web pages may call from a browser, `https://app.example`. `"*"`: any."""
    force_usage: bool = False
    """Every stream ends with the usage, whether or not it was asked for."""
    api_keys_file: AbsolutePath | None = None
    """Hashes of API keys. None: only clients on this machine are answered."""
    metrics_token_file: AbsolutePath | None = None
    """Its first line opens `/metrics`."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names besides localhost, `host` and IP addresses. `"*"`: any."""

    @property
    def replicas(self) -> GatewayScalingConfig:
        """How many gateways there are."""
        number = self.num_replicas
        return self.scaling or GatewayScalingConfig(min_replicas=number, max_replicas=number)

    @model_validator(mode="after")
    def _number_or_scaling(self) -> Self:
        if self.scaling is not None and self.num_replicas != 1:
            raise ValueError("num_replicas: scaling says it already, by min_replicas and max_replicas")
        return self


class KubernetesConfig(_Frozen):
    """The pods: only `manta k8s render` reads it. Memory follows from the models."""

    name: str = Field("manta", max_length=47, pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$")
    """Name of the RayService."""
    image: str = "manta"
    """Name of the image. kustomize's `images` says where it is; or a full name with its digest."""
    gpu_type: str | None = None
    """Ray's name of the GPUs, for example A100-40G. Each process has to fit one of them."""
    gpu_resource: str = "nvidia.com/gpu"
    """What a pod asks for to get a GPU."""
    gpu_node_selector: dict[str, str] = {}
    """Kubernetes' labels of the machines with those GPUs."""
    gpu_taints: dict[str, str] = {}
    """Taints of those machines, key and value, that keep other pods away; an empty value is any. That of `gpu_resource`
    is known."""
    head_cpus: int = Field(2, ge=1)
    """CPUs of the head's pod."""
    gateway_cpus: int = Field(2, ge=1)
    """CPUs of a gateway's pod."""
    coordinator_cpus: int = Field(4, ge=1)
    """CPUs of a coordinator's pod."""
    expert_cpus: int = Field(2, ge=1)
    """CPUs of an expert's pod."""
    cpu_expert_pods: int = Field(1, ge=1)
    """Pods for experts on CPUs. Each can hold all of those shards."""
    cpu_expert_cpus: int | None = Field(None, ge=1)
    """CPUs of such a pod, where other experts are on GPUs. None: `expert_cpus`."""
    cpu_expert_node_selector: dict[str, str] = {}
    """Kubernetes' labels of the machines for such pods, where other experts are on GPUs."""
    ephemeral_storage_gib: int = Field(10, ge=2)
    """Of the machine's disk for each pod: Ray's logs and sessions, and what Ray spills."""
    storage_class: str | None = None
    """Of the models' volume; it has to offer ReadWriteMany and ReadOnlyMany. None: the cluster's default."""
    model_volume_gib: int | None = Field(None, ge=1)
    """Size of that volume. None: what the models take, and a quarter more. A volume grows where its class lets it, and
    never shrinks: before a model is taken out, say what there is."""
    idle_timeout_s: int = Field(300, ge=1)
    """The autoscaler takes away a pod above the minimum once it was idle for so long."""


class MantaConfig(_Frozen):
    """The whole: models behind one gateway.

    Entries of one name are versions of one model: requests go to the first of them that is up.
    """

    models: tuple[ModelConfig, ...] = Field(min_length=1)
    """Entries of one name are versions of one model: requests go to the first of them that is up."""
    gateway: GatewayConfig = GatewayConfig()
    """The doors in front of all models."""
    kubernetes: KubernetesConfig = KubernetesConfig()
    """The pods; only `manta k8s render` reads it."""

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        owners: dict[str, str] = {}
        for model in self.models:
            names = (model.name, *model.aliases)
            for name in names:
                if names.count(name) > 1 or owners.setdefault(name, model.name) != model.name:
                    raise ValueError(f"the model name or alias {name!r} is used twice")
        versions = [(model.name, model.version) for model in self.models]
        for name, version in versions:
            if versions.count((name, version)) > 1:
                raise ValueError(
                    f"the model name {name!r} is used twice; two versions of a model need a `version` each"
                )
        return self


def load_config(path: Path) -> MantaConfig:
    """Read a YAML file. Raises ConfigError, which names the key and what was expected."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    document = parse_yaml(content, str(path)).value
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected a mapping with the keys {', '.join(MantaConfig.model_fields)}")
    return parse_config(document, source=str(path))


def parse_config(document: dict[str, Any], source: str = "config") -> MantaConfig:
    """Validate a mapping. Raises ConfigError for the first key that is wrong."""
    try:
        return MantaConfig.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{source}: {where}: {_explain(first)}") from error


def _explain(error: Any) -> str:
    """One sentence for a pydantic error; an unknown key gets the nearest known one."""
    if error["type"] != "extra_forbidden":
        return str(error["msg"])
    key = str(error["loc"][-1])
    known = sorted({name for model in _sections(_Frozen) for name in model.model_fields})
    near = difflib.get_close_matches(key, known, n=1)
    return f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _sections(root: type[BaseModel]) -> list[type[BaseModel]]:
    """The classes of the tree."""
    return [model for section in root.__subclasses__() for model in (section, *_sections(section))]
