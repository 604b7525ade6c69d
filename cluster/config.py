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

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster.errors import ConfigError
from cluster.yaml_document import parse_yaml

Transport = Literal["auto", "lane", "object_store", "local"]
AbsolutePath = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]  # other processes read it


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EngineConfig(_Frozen):
    """The coordinator's engine: scheduler, KV cache, numerics."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: the checkpoint's own; float16 runs as bfloat16
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU that the process was given, if any
    max_model_len: int | None = Field(None, ge=1)  # tokens; None: the checkpoint's context
    block_size: int = Field(16, ge=1, le=256)  # tokens per KV block
    num_kv_blocks: int | None = Field(None, ge=2)  # None: from kv_cache_gib
    # None: what steps and neighbours leave of nine tenths of the GPU, or of a fifth of the memory that is free at start
    kv_cache_gib: float | None = Field(None, gt=0)
    max_num_seqs: int = Field(64, ge=1)  # sequences in one step
    max_num_batched_tokens: int = Field(2048, ge=1)  # tokens in one step; longer prompts are chunked
    max_waiting: int = Field(256, ge=1)  # requests queued in one coordinator; past it 429 to those who hold most
    prefix_caching: bool = True
    grammar_timeout_s: float = Field(10.0, gt=0)  # to compile a schema that may be costly; past it 400
    grammar_token_timeout_s: float = Field(1.0, gt=0)  # CPU time to find which tokens may come next; past it 400
    grammar_cache_mib: int = Field(256, ge=1)  # compiled grammars kept, the least recently used leave first
    # Parts of a step that take turns computing and waiting. auto: 2 where every process has a GPU of its own, else 1.
    microbatches: Literal["auto"] | Annotated[int, Field(ge=1, le=3)] = "auto"
    num_threads: int | None = Field(None, ge=1)  # intra-op threads of the coordinator; None: one per core
    # How often a waiting OpenMP thread of the coordinator looks before it sleeps. OpenMP's own default, 300,000, keeps
    # a core from the experts: with one other busy process on 2 cores, steps of the bench model took 39 ms with 200,
    # 57 ms with 5,000 and 134 ms with 30,000.
    openmp_spin_count: int = Field(200, ge=0)


class ReplicaBounds(_Frozen):
    """How many replicas a deployment has, at least and at most, and how soon it follows its load."""

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    upscale_delay_s: float = Field(10.0, ge=0)  # for so long the load has to ask for more
    downscale_delay_s: float = Field(120.0, ge=0)

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas: must be at least min_replicas ({self.min_replicas})")
        return self


class ScalingConfig(ReplicaBounds):
    """How many replicas an expert group has, and what its load has to be for more or fewer.

    A replica's load is the part of the time that it computes; rows that wait for their turn count as well.
    """

    target_busy_fraction: float = Field(0.7, gt=0, le=1)  # of a replica; more replicas above, fewer well below
    max_queue_s: float = Field(0.01, gt=0)  # mean wait of a dispatch for its turn; above, one replica more


class CoordinatorScalingConfig(ReplicaBounds):
    """The same for the coordinators of a model, whose load is what they have given away of their cache or batch."""

    target_used_fraction: float = Field(0.8, gt=0, le=1)  # of the KV blocks, or of max_num_seqs if that is more
    max_waiting: float = Field(1.0, ge=0)  # sequences that wait, per coordinator; above, one coordinator more


class GatewayScalingConfig(ReplicaBounds):
    """The same for gateways."""

    target_requests: float = Field(64.0, gt=0)  # that one of them is answering


class ExpertsConfig(_Frozen):
    """The expert groups of one model and how rows reach them."""

    groups: Literal["auto"] | tuple[tuple[int, ...], ...] = "auto"  # expert indices per group, the same in every layer
    scaling: ScalingConfig = ScalingConfig()  # of every group
    group_scaling: dict[int, ScalingConfig] = {}  # of single groups, by their position in `groups`
    transport: Transport = "auto"  # auto: lanes, and the object store to shards that have none
    lane_secret_file: str | None = (
        None  # mode 0600, the same on every node; None: ~/.manta/lane_secret, made if missing
    )
    # None: 1 where the cluster has GPUs, else 0. What is given is reserved, also with `device: cpu`.
    gpus_per_shard: float | None = Field(None, ge=0)
    num_threads: int | None = Field(None, ge=1)  # intra-op threads of a shard; None: measured default
    # Where shards of one thread share a machine's few cores with their coordinator: it moves those that it asks at the
    # same time to different ones.
    spread_over_cores: bool = True
    label_selector: dict[str, str] = {}  # Ray's labels of the nodes that shards may be on
    expert_timeout_s: float = Field(30.0, gt=0)  # for one dispatch
    load_timeout_s: float = Field(1800.0, gt=0)  # for a shard to read its weights


class ModelConfig(_Frozen):
    """One served model: a directory, and how it is laid out on the cluster."""

    name: str = Field(min_length=1, max_length=128)
    path: str  # a directory, a hub id, or one of the embedded models: demo, demo-dense
    # Of a hub id: a commit, a branch or a tag. None: main, as the local cache knows it, else as the hub does.
    revision: str | None = Field(None, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_./-]{0,127}$")
    # Names the Serve application, <name>-<version>. None: the first 8 digits of the checkpoint's fingerprint.
    version: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.]{0,62}$")
    aliases: tuple[str, ...] = ()
    kind: Literal["chat", "embedding"] = "chat"
    pooling: Literal["mean", "last"] | None = None  # of kind embedding: over all hidden states, or the last; None: mean
    num_coordinators: int = Field(1, ge=1)
    coordinator_scaling: CoordinatorScalingConfig | None = None  # None: num_coordinators, whatever the load
    # Replicas that a rolling update may add for a while, of coordinators and of each group. With 0, for clusters that
    # have no GPU to spare, an old one stops before its successor starts; steps wait for it meanwhile.
    max_surge_percent: int = Field(100, ge=0, le=100)
    label_selector: dict[str, str] = {}  # Ray's labels of the nodes that coordinators may be on
    engine: EngineConfig = EngineConfig()
    experts: ExpertsConfig = ExpertsConfig()

    @property
    def coordinators(self) -> CoordinatorScalingConfig:
        """How many coordinators there are."""
        number = self.num_coordinators
        return self.coordinator_scaling or CoordinatorScalingConfig(min_replicas=number, max_replicas=number)

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
    http_port: int = Field(8000, ge=1, le=65535)
    grpc_port: int = Field(9000, ge=1, le=65535)
    num_replicas: int = Field(1, ge=1)
    scaling: GatewayScalingConfig | None = None  # None: num_replicas, whatever the load
    label_selector: dict[str, str] = {}  # Ray's labels of the nodes that gateways may be on
    request_timeout_s: float = Field(600.0, gt=0)  # deadline of a request that names none
    # How long a request whose coordinator was lost waits for one that goes on with it; its deadline may come before.
    resume_timeout_s: float = Field(300.0, gt=0)
    max_body_bytes: int = Field(8 * 2**20, ge=1024)
    max_bytes_received: int = Field(256 * 2**20, ge=1024)  # of bodies without an answer; past it 429 to who has most
    body_timeout_s: float = Field(30.0, gt=0)  # from the first byte of a request to the last of its body; then 408
    # A stream without a token for so long gets a comment, so that no proxy takes it for dead. Over gRPC: HTTP/2 pings.
    keepalive_s: float = Field(15.0, gt=0)
    max_choices: int = Field(16, ge=1)  # n × prompts of one request
    max_embedding_inputs: int = Field(256, ge=1)  # of one request
    max_ongoing_requests: int = Field(256, ge=1)  # per gateway replica; past it 429 to those who hold most
    otlp_endpoint: str | None = None  # a collector's base URL, http://collector:4318; None: no traces
    log_format: Literal["text", "json"] = "text"  # one line per request, in the replica's standard output
    accept_any_model: bool = False  # an unknown model name means the first model, instead of 404
    cors_origins: tuple[str, ...] = ()  # whose pages may call from a browser, https://app.example; "*": any
    force_usage: bool = False  # every stream ends with the usage, asked for or not
    api_keys_file: AbsolutePath | None = None  # hashes of keys; None: only clients on this machine are answered
    metrics_token_file: AbsolutePath | None = None  # its first line opens /metrics
    allowed_hosts: tuple[str, ...] = ()  # Host names besides localhost, `host` and IP addresses; "*": any

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

    name: str = Field("manta", max_length=47, pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$")  # of the RayService
    image: str = "manta"  # kustomize's `images` says where it is; or a full name with its digest
    gpu_type: str | None = None  # Ray's name of the GPUs, A100-40G for one: each process has to fit one of them
    gpu_resource: str = "nvidia.com/gpu"  # what a pod asks for
    gpu_node_selector: dict[str, str] = {}  # Kubernetes' labels of the machines with those GPUs
    head_cpus: int = Field(2, ge=1)
    gateway_cpus: int = Field(2, ge=1)
    coordinator_cpus: int = Field(4, ge=1)
    expert_cpus: int = Field(2, ge=1)
    cpu_expert_pods: int = Field(1, ge=1)  # without GPUs; each can hold all shards
    storage_class: str | None = (
        None  # of the models' volume: ReadWriteMany and ReadOnlyMany; None: the cluster's default
    )
    idle_timeout_s: int = Field(300, ge=1)  # then the autoscaler takes away a pod above the minimum


class MantaConfig(_Frozen):
    """The whole: models behind one gateway.

    Entries of one name are versions of one model: requests go to the first of them that is up.
    """

    models: tuple[ModelConfig, ...] = Field(min_length=1)
    gateway: GatewayConfig = GatewayConfig()
    kubernetes: KubernetesConfig = KubernetesConfig()

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
