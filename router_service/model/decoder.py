"""The family's decoder without its experts: embeddings, norms, rotary attention, gate, output head. Knows no sequence.

The forward pass is a generator that yields wherever it waits for experts, so that a runner can drive several at once.
A dense model has no gate: its feed-forward networks are here, and it waits for nobody.

Shapes: T tokens, D hidden size, N query heads, G key-value heads, H head_dim, K experts per token, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing

import torch
import torch.nn.functional as F

from cluster.checkpoint.architecture import Architecture, feed_forward_tensors
from cluster.telemetry.layer_times import LayerPass, LayerTimes
from experts_service.kernels.kernel import Kernel, kernel_for
from experts_service.kernels.linear import Linear
from experts_service.kernels.swiglu import Chained, SwiGLU
from experts_service.quantization.weight import Weight, dense, stacked
from router_service.attention.backend import AttentionPlan
from router_service.attention.kv_cache import KVCache
from router_service.dispatcher import Dispatch, Dispatcher
from router_service.model.decode_chains import KEPT, MOST_ROWS, DecodeChains, Layer, are_served
from router_service.model.gate import Gate
from router_service.model.rotary import Rotary
from router_service.model.step_threads import StepThreads
from router_service.rows import norm, rotate, warm_up


class Decoder:
    """All layers of one model, bound to the dispatcher that reaches its experts, none if it is dense."""

    chains_attention = True  # False: attention is a call of its own, for whoever measures it
    runs_chains = True  # False: each layer's parts are calls of their own, for whoever looks into them

    def __init__(
        self,
        architecture: Architecture,
        weights: Mapping[str, Weight],
        dispatcher: Dispatcher,
        kernel: Kernel | None = None,
    ) -> None:
        """`weights` by their names in `architecture.coordinator_tensors`, all of one dtype and device.

        `kernel` multiplies bf16 on a CPU; None: the first that this CPU can run.
        """
        self.architecture = architecture
        self.dispatcher = dispatcher
        self._multipliers = architecture.multipliers
        scores = self._multipliers.attention
        # Attention divides by sqrt(head_dim). A power of two, as released models have it, rounds nothing.
        self._query_factor = None if scores is None else scores * math.sqrt(architecture.head_dim)
        self.embeddings = dense(weights["model.embed_tokens.weight"])  # [V, D]
        self.norm = dense(weights["model.norm.weight"])  # [D]
        head = self.embeddings if architecture.tie_word_embeddings else weights["lm_head.weight"]  # [V, D]
        self.kernel = kernel_for(self.dtype, self.device, kernel)
        self.head = Linear(head, self.kernel)  # D → V
        self.layers = [_layer(weights, index, architecture, self.kernel) for index in range(architecture.num_layers)]
        # Of the attention of one layer and one token.
        self._multiplications = (
            architecture.head_dim
            * architecture.hidden_size
            * (2 * architecture.num_heads + 2 * architecture.num_kv_heads)
        )
        warm_up(self.dtype, self.device)
        self._has_chains = are_served(self.layers, architecture, self.embeddings)
        self._chains: list[DecodeChains] = []  # that nobody uses now, the last used at last
        self._experts: list[Chained] | None = None  # those of each layer, where chains run them
        if self._has_chains:
            here = [dispatcher.chained(layer) for layer in range(architecture.num_layers)]
            if all(here):
                self._experts = [experts for experts in here if experts is not None]
        self._threads = StepThreads(choose=not self.kernel.is_own)
        self._rotary = Rotary(architecture, self.dtype, self.device)
        self.layer_times = LayerTimes()

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return self.embeddings.dtype

    @property
    def device(self) -> torch.device:
        """Where weights and activations are."""
        return self.embeddings.device

    def forward(
        self,
        token_ids: torch.Tensor,  # [T]
        positions: torch.Tensor,  # [T]
        attention: AttentionPlan,
        kv_cache: KVCache,
        routed: list[torch.Tensor] | None = None,  # gets each layer's experts [T, K]
        num_real: torch.Tensor | None = None,  # [1] to be captured; rows from here on are padding, for no expert
    ) -> Generator[Dispatch, None, torch.Tensor]:
        """Run all layers; yields once a layer after its rows were sent to experts, or, where the step is captured with
        experts elsewhere, left to be sent. Returns what they add up to [T, D].

        A row of it is finite only if all that was computed for it is, in every layer, what the cache holds of it and
        what it saw of earlier tokens included: it is a sum, each token sees itself, and NaN stays NaN.
        """
        num_rows = token_ids.shape[0]
        times = self.layer_times.begin()
        rotary = self._rotary(positions)
        x = F.embedding(token_ids, self.embeddings)  # [T, D]
        if self._multipliers.embedding != 1:
            x = x * self._multipliers.embedding
        if self._has_chains and self.runs_chains and 0 < num_rows <= MOST_ROWS:
            return (yield from self._decode(x, rotary, attention, kv_cache, routed, times))
        work = num_rows * self._multiplications
        delta = None  # [T, D]; what the feed-forward before adds to x
        for index, layer in enumerate(self.layers):
            with self._threads.for_work(work):
                rows = self.norm_rows(x, layer.input_norm, delta)
                delta = self._attend(index, layer, rows, rotary, attention, kv_cache)
                rows = self.norm_rows(x, layer.post_attention_norm, delta)
                if layer.gate is not None:
                    weights, experts = layer.gate(rows)  # [T, K], [T, K]
            if layer.gate is None:
                assert layer.dense is not None, "a layer has a feed-forward"
                delta = self._scaled(layer.dense(rows))
                if times is not None:
                    times.layer()
                continue
            if routed is not None:
                routed.append(experts)
            if times is not None:
                times.sent()
            with closing(self.dispatcher.dispatch(index, rows, experts, num_real)) as dispatch:
                shared = _shared_expert(layer, rows)  # while rows are under way
                yield dispatch
                delta = self.dispatcher.combine(dispatch, weights)
            delta = self._scaled(delta if shared is None else delta.add_(shared))
            if times is not None:
                times.combined()
                times.layer()
        self.dispatcher.end_step()
        return x if delta is None else x.add_(delta)

    def _decode(
        self,
        x: torch.Tensor,  # [T, D]
        rotary: tuple[torch.Tensor, torch.Tensor],
        attention: AttentionPlan,
        kv_cache: KVCache,
        routed: list[torch.Tensor] | None,
        times: LayerPass | None,
    ) -> Generator[Dispatch, None, torch.Tensor]:
        """The same in chains, with the same bits. It waits for nobody where the experts are here."""
        num_rows = x.shape[0]
        alike = (one for one in self._chains if one.num_rows == num_rows and one.kv_cache is kv_cache)
        chains = next(alike, None)
        if chains is None:
            chained = attention if self.chains_attention else None
            route = None
            if self._experts is None and not self.architecture.is_dense:
                route = self.dispatcher.route(num_rows, self.architecture.top_k, self.architecture.hidden_size)
            chains = DecodeChains(self.layers, self.architecture, num_rows, chained, kv_cache, self._experts, route)
        else:
            self._chains.remove(chains)
        chains.x.copy_(x)
        chains.cosines.copy_(rotary[0])
        chains.sines.copy_(rotary[1])
        chains.set_attention(attention)
        if chains.has_attention and chains.has_experts and times is None:
            chains.run()
        else:
            yield from self._decode_by_layers(chains, attention, times)
        if chains.has_experts:
            self.dispatcher.count(chains.counts)
        if routed is not None:
            routed += (choice.experts.clone() for choice in chains.choices)
        x = chains.x + chains.delta
        self._chains = [*self._chains, chains][-KEPT:]
        return x

    def _decode_by_layers(
        self, chains: DecodeChains, attention: AttentionPlan, times: LayerPass | None
    ) -> Generator[Dispatch, None, None]:
        """Where attention or the experts are calls of their own, or each layer is timed."""
        for index, layer in enumerate(self.layers):
            if not chains.has_attention:
                chains.project(index)
                attended = attention.attend(index, chains.queries, chains.keys, chains.values, chains.kv_cache)
                chains.attended.copy_(attended.flatten(1))
            if chains.has_experts:
                chains.feed_forward(index)
                if times is not None:
                    times.layer()
                continue
            chains.choose_experts(index)
            if layer.dense is not None:
                chains.delta.copy_(layer.dense(chains.rows))
            else:
                if times is not None:
                    times.sent()
                with closing(self._dispatch(index, chains)) as dispatch:
                    yield dispatch
                    self.dispatcher.combine_into(chains.combining[index], dispatch)
                if times is not None:
                    times.combined()
            if times is not None:
                times.layer()

    def _dispatch(self, index: int, chains: DecodeChains) -> Dispatch:
        if chains.route is not None:
            return self.dispatcher.dispatch_routed(index, chains.rows, chains.route)
        return self.dispatcher.dispatch(index, chains.rows, chains.choices[index].experts)

    def hidden_states(self, x: torch.Tensor) -> torch.Tensor:
        """The last hidden states [R, D] of rows of what `forward` returned [R, D]."""
        return self.norm_rows(x, self.norm)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [R, V] in fp32 of hidden states [R, D]."""
        logits = self.head(hidden)
        if self._multipliers.logits_divisor != 1:
            logits /= self._multipliers.logits_divisor
        return logits.float()

    def _attend(
        self,
        index: int,
        layer: Layer,
        rows: torch.Tensor,  # [T, D]
        rotary: tuple[torch.Tensor, torch.Tensor],
        attention: AttentionPlan,
        kv_cache: KVCache,
    ) -> torch.Tensor:
        """Self-attention of one layer [T, D]."""
        query_heads, kv_heads = self.architecture.num_heads, self.architecture.num_kv_heads
        qkv = layer.qkv(rows)  # [T, (N + 2G)·H]
        if not (layer.is_plain and self._query_factor is None):
            self._adjust(layer, qkv)
        qkv = qkv.view(-1, query_heads + 2 * kv_heads, self.architecture.head_dim)
        rotated = rotate(qkv[:, : query_heads + kv_heads], *rotary)
        queries, keys = rotated.split([query_heads, kv_heads], dim=1)  # [T, N, H], [T, G, H]
        attended = attention.attend(index, queries, keys, qkv[:, query_heads + kv_heads :], kv_cache)
        return self._scaled(layer.o(attended.flatten(1)))

    def _adjust(self, layer: Layer, qkv: torch.Tensor) -> None:
        """Bias, norms and bounds of queries, keys and values [T, (N + 2G)·H], and the scale of scores, in place."""
        if layer.qkv_bias is not None:
            qkv += layer.qkv_bias
        if layer.qk_norms is not None:
            self._norm_heads(qkv, layer.qk_norms)
        if layer.clip_qkv is not None:
            qkv.clamp_(-layer.clip_qkv, layer.clip_qkv)
        if self._query_factor is not None:
            qkv[:, : self.architecture.num_heads * self.architecture.head_dim] *= self._query_factor

    def _norm_heads(self, qkv: torch.Tensor, weights: Sequence[torch.Tensor]) -> None:
        """Queries and keys of `qkv`, in place."""
        sizes = [self.architecture.head_dim * n for n in (self.architecture.num_heads, self.architecture.num_kv_heads)]
        for weight, part in zip(weights, qkv[:, : sum(sizes)].split(sizes, dim=1), strict=True):
            heads = part.contiguous().view(-1, len(weight))
            part.copy_(self.norm_rows(heads, weight).view(part.shape))

    def _scaled(self, delta: torch.Tensor) -> torch.Tensor:
        """What is added to the residual stream [T, D], in place."""
        return delta if self._multipliers.residual == 1 else delta.mul_(self._multipliers.residual)

    def norm_rows(self, x: torch.Tensor, weight: torch.Tensor, delta: torch.Tensor | None = None) -> torch.Tensor:
        """Of `x` [T, D], to which `delta` [T, D] is added in place before."""
        return norm(x, weight, self.architecture.rms_norm_eps, delta)


def _layer(weights: Mapping[str, Weight], index: int, architecture: Architecture, kernel: Kernel) -> Layer:
    prefix, spec = f"model.layers.{index}", architecture.layers[index]
    gate, dense_network = None, None

    def vectors(of: str, kind: str) -> list[torch.Tensor]:
        return [dense(weights[f"{prefix}.self_attn.{name}_{kind}"]) for name in of]

    if spec.has_experts:
        gate = Gate(weights[f"{prefix}.block_sparse_moe.gate.weight"], architecture.top_k, kernel, spec.gate)
    if spec.dense_size:
        w1, w2, w3 = (weights[name] for name in feed_forward_tensors(architecture, index))
        dense_network = SwiGLU(w1, w2, w3, fused=True, kernel=kernel)
    return Layer(
        input_norm=dense(weights[f"{prefix}.input_layernorm.weight"]),
        qkv=Linear(stacked([weights[f"{prefix}.self_attn.{name}_proj.weight"] for name in ("q", "k", "v")]), kernel),
        o=Linear(weights[f"{prefix}.self_attn.o_proj.weight"], kernel),
        qkv_bias=torch.cat(vectors("qkv", "proj.bias")) if spec.has_qkv_bias else None,
        qk_norms=vectors("qk", "norm.weight") if spec.qk_norm else None,
        clip_qkv=spec.clip_qkv,
        post_attention_norm=dense(weights[f"{prefix}.post_attention_layernorm.weight"]),
        gate=gate,
        dense=dense_network,
        dense_gate=dense(weights[f"{prefix}.mlp.shared_expert_gate.weight"]).float() if spec.dense_is_gated else None,
    )


def _shared_expert(layer: Layer, rows: torch.Tensor) -> torch.Tensor | None:
    """What the network for every token says of `rows` [T, D] beside experts."""
    if layer.dense is None:
        return None
    said = layer.dense(rows)
    if layer.dense_gate is None:
        return said
    return said.mul_(shared_expert_scores(layer, rows).sigmoid())


def shared_expert_scores(layer: Layer, rows: torch.Tensor) -> torch.Tensor:
    """What the gate of the network for every token says of `rows` [T, D]: [T, 1]."""
    assert layer.dense_gate is not None, "its network has a gate"
    # A row's product is one sum: a matmul of one output would add in an order that depends on the number of rows.
    return (rows.float() * layer.dense_gate).sum(dim=-1, keepdim=True).to(rows.dtype)
