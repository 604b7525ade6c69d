"""What crosses between gateway and coordinator. Plain frozen data; knows neither tensors, nor Ray, nor a wire format.

A request can be resumed on another coordinator at any token: `Request.output_token_ids` holds what the client already
has, every random number is keyed by (seed, choice_index, position), and penalties and grammar state are rebuilt from
those ids. So a `Request` plus the `TokenChunk`s that followed it are the whole state of a generation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal

from cluster.deadline import NEVER, Deadline

FinishReason = Literal["stop", "length"]
Kind = Literal["chat", "embedding"]
Pooling = Literal["mean", "last"]
Key = tuple[str, int]  # (request id, choice index)

MIN_REPETITION_PENALTY = 0.01  # logits are divided by it, and must stay finite in float32, over any temperature

HEARTBEAT_S = 1.0  # the longest pause between two items of a TokenStream


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. Validated at the door; a coordinator trusts it."""

    max_tokens: int  # tokens to generate, resumed ones included
    min_tokens: int = 0  # end-of-sequence and stop tokens are masked before this many
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # (0, 1]; 1: off
    top_k: int = 0  # 0: off
    min_p: float = 0.0  # [0, 1]; 0: off
    repetition_penalty: float = 1.0  # over prompt and output tokens; 1: off
    presence_penalty: float = 0.0  # over output tokens
    frequency_penalty: float = 0.0  # over output tokens
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    stop_token_ids: tuple[int, ...] = ()  # besides the model's own end-of-sequence ids
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; N ≥ 0: the chosen token's and the N most likely
    prompt_logprobs: int | None = None  # the same for the tokens of the prompt, which is computed whole: choice 0's
    routed_experts: bool = False  # tell which experts the row that each token was sampled from went to


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a model's authors chose for requests that do not say; the fields are those of SamplingParams."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """A JSON Schema within the bounds of the door that took it; whether it compiles, only the coordinator finds out."""

    text: str  # JSON
    param: str  # the client's field that an error names
    any_whitespace: bool = True  # between two elements, at most one; False: none


@dataclass(frozen=True, slots=True)
class TextGrammar:
    """All that an answer may be, as text, within the bounds of the door that took it."""

    kind: Literal["regex", "choice", "ebnf"]
    text: str  # an expression; a JSON list of texts; rules, one a line, that `gateway.request.ebnf` wrote
    param: str  # the client's field that an error names


Answer = JsonSchema | TextGrammar


ToolFormat = Literal["mistral", "hermes", "llama3_json", "openai"]
ToolParser = Literal["auto", "mistral", "hermes", "llama3_json", "openai"]


CALL_TAGS = ("<tool_call>", "</tool_call>")  # around each call of format hermes


@dataclass(frozen=True, slots=True)
class ToolTokens:
    """Ids of the special tokens that calls of tools are spelled with, as far as a model's vocabulary has them."""

    calls: int | None = None  # [TOOL_CALLS], <tool_call>, <|python_tag|>
    args: int | None = None  # [ARGS]
    call_id: int | None = None  # [CALL_ID]
    end: int | None = None  # </tool_call>
    format: ToolFormat = "mistral"  # what is spelled


@dataclass(frozen=True, slots=True)
class ToolCallGrammar:
    """Calls of tools, in the format of `tokens`.

    mistral        a marker, a space or none, then `[{"name": "f", "arguments": {…}}, …]` on one line; with
                   `tokens.args` every call by itself, `[TOOL_CALLS]f[ARGS]{…}`, and with `tokens.call_id` too,
                   `[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{…}`
    hermes         `<tool_call>`, `{"name": "f", "arguments": {…}}` and `</tool_call>`, each on a line
    llama3_json    `{"name": "f", "parameters": {…}}; …`
    openai         a message of harmony; in a HarmonyGrammar
    """

    tools: tuple[
        tuple[str, JsonSchema], ...
    ]  # (name, schema of the arguments) of those that may be called; may be none
    required: bool  # False: the model may answer with text instead
    parallel: bool = True  # more than one call
    answer: Answer | None = None  # what a text is held to, when calls are not required
    marker: str = "[TOOL_CALLS]"  # what calls begin with, where the vocabulary has no token for it
    tokens: ToolTokens = ToolTokens()


ReasoningParser = Literal["auto", "none", "qwen3", "deepseek_r1", "mistral", "openai_gptoss"]


@dataclass(frozen=True, slots=True)
class ReasoningTags:
    """What a model writes around its reasoning: words, or special tokens where the vocabulary has such."""

    begin: str
    end: str
    begin_id: int | None = None  # None: it is text
    end_id: int | None = None


@dataclass(frozen=True, slots=True)
class ReasonedGrammar:
    """Reasoning, which is any text, and after it the answer, which alone is held to something."""

    tags: ReasoningTags
    has_begun: bool  # in the prompt; False: the answer may begin with reasoning, or do without
    answer: Answer | ToolCallGrammar


@dataclass(frozen=True, slots=True)
class HarmonyTokens:
    """Ids of the special tokens between the messages of harmony, gpt-oss's format."""

    start: int
    channel: int
    message: int
    constrain: int
    end: int
    call: int


@dataclass(frozen=True, slots=True)
class HarmonyGrammar:
    """Messages of harmony: any that are thought or told before, and the one that is held to something, or a call."""

    tokens: HarmonyTokens
    answer: Answer | ToolCallGrammar


# A constraint on the output, compiled on the coordinator's side.
Grammar = Answer | ToolCallGrammar | ReasonedGrammar | HarmonyGrammar


@dataclass(frozen=True, slots=True)
class Request:
    """One choice of one client request. `n` choices are `n` Requests that differ in `choice_index`."""

    request_id: str  # unique; our own, never the client's
    prompt_token_ids: tuple[int, ...]  # at least one
    sampling: SamplingParams
    seed: int  # always set: the gateway draws one when the client gives none
    output_token_ids: tuple[int, ...] = ()  # already sent to the client, when resumed
    choice_index: int = 0
    deadline: Deadline = NEVER
    cache_salt: str = ""  # prefix-cache blocks are shared only within one salt
    priority: int = 0  # among those of its salt the lower is served earlier
    num_siblings: int = 0  # other choices or prompts of the client's request, which all fail if one does
    grammar: Grammar | None = None
    pooling: Pooling | None = None  # the prompt becomes one Embedding, and nothing is generated
    traceparent: str = ""  # W3C's, of the gateway's span; empty: not traced
    traces_layers: bool = False  # steps that it is in have a span for each group of layers
    failed_on: tuple[str, ...] = ()  # coordinators, a step of which failed with it; others are asked first

    @property
    def key(self) -> Key:
        """Identifies the sequence inside an engine."""
        return (self.request_id, self.choice_index)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities (natural, of the raw logits before temperature and penalties) at one output position."""

    token_logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """Consecutive new tokens of one choice. The last chunk of a choice, and only it, has a `finish_reason`.

    `token_ids` includes the end-of-sequence or stop token when one ended the sequence; `stop_token_id` names it then.
    A last chunk may have no tokens.
    """

    request_id: str
    choice_index: int
    first_position: int  # index of token_ids[0] among the output tokens, resumed ones counted
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None  # one per token when asked for
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None  # on the first chunk if asked for; [0] is None
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache
    queue_s: float = 0.0  # from its arrival at the coordinator to its first step
    routed_experts: bytes | None = field(default=None, repr=False)  # uint16 [tokens, layers, top_k] when asked for

    @property
    def key(self) -> Key:
        """Of the request that it answers."""
        return (self.request_id, self.choice_index)

    def __reduce__(self) -> tuple[Any, ...]:
        """One is pickled for every token: by the fields' values, half of the time that dataclasses take by name."""
        return TokenChunk, _chunk_values(self)


_chunk_values = attrgetter(*TokenChunk.__match_args__)


@dataclass(frozen=True, slots=True)
class TokenStream:
    """Names the one stream in which a coordinator sends all tokens that a gateway's requests get there.

    An item of it is a tuple of TokenChunks, at most one per choice: a step's, or those of several where the gateway is
    behind. Where there is nothing to send there is an empty one every HEARTBEAT_S, so that silence says something. The
    log-probabilities of a long prompt come in parts, in chunks without tokens before the first that has some.
    """

    gateway: str  # the inbox that requests are sent with
    coordinator: str  # Serve's id of the replica


@dataclass(frozen=True, slots=True)
class Embedding:
    """A prompt as one vector: its last hidden states, pooled."""

    request_id: str
    choice_index: int
    values: bytes = field(repr=False)  # float32 [hidden size]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of one coordinator, for /health, /metrics and `manta status`."""

    num_requests_running: int
    num_requests_waiting: int
    num_kv_blocks: int
    num_kv_blocks_used: int  # held by running sequences; blocks kept only by the prefix cache count as free
    prompt_tokens_total: int
    generation_tokens_total: int
    preemptions_total: int
    prefix_cache_hit_tokens_total: int
    steps_total: int
    rows_per_expert: tuple[int, ...]  # rows sent to each expert, summed over layers
    prefix_cache_query_tokens_total: int = 0  # looked up in the prefix cache
    failed_steps_total: int = 0  # steps that ended a sequence with an error
    missing_experts: tuple[str, ...] = ()  # deployments of groups no replica of which is believed to answer
    revision: str | None = None  # of the model, as in its ModelCard


@dataclass(frozen=True, slots=True)
class Parsers:
    """How a model's answers are read, by the names that vLLM has for it; `auto`: as its chat template writes them."""

    reasoning: ReasoningParser = "auto"
    tools: ToolParser = "auto"


AUTO = Parsers()


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a gateway needs to know of a model that it serves; made at start, from config and checkpoint headers."""

    name: str
    aliases: tuple[str, ...]
    application: str  # the Serve application that holds its coordinator
    directory: str  # where tokenizer and chat template are read from
    layout: Literal["huggingface", "mistral"]
    fingerprint: str
    max_model_len: int  # tokens, prompt plus output
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    created: int  # Unix time in seconds
    defaults: SamplingDefaults = SamplingDefaults()
    deployments: tuple[str, ...] = ()  # names in `application`, coordinator first
    num_layers: int = 0
    num_experts: int = 0  # of each layer; 0 in a dense model
    top_k: int = 0  # experts per token
    kind: Kind = "chat"
    pooling: Pooling = "mean"  # of kind embedding
    revision: str | None = None  # the hub's commit; None: a directory of the user's
    hidden_size: int = 0  # numbers in an embedding
    parsers: Parsers = AUTO

    @property
    def has_remote_experts(self) -> bool:
        """Whether its experts have processes of their own."""
        return len(self.deployments) > 1
