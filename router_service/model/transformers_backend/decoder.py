"""A decoder whose layers are a model of transformers. Has the calls of `model.decoder.Decoder`; knows no family.

Shapes: T tokens, D hidden size, N query heads, G key-value heads, K experts per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cluster.checkpoint.checkpoint import Checkpoint
from cluster.telemetry.layer_times import LayerPass, LayerTimes
from experts_service.kernels.kernel import Kernel, kernel_for
from experts_service.kernels.linear import Linear
from experts_service.memory import give_back_freed
from experts_service.transformers_backend.loading import load_own
from experts_service.transformers_backend.meta_model import COUNTS_ROWS, SCALED_BEFORE, build
from experts_service.transformers_backend.probe import check_rope, indexers
from router_service.attention.backend import AttentionPlan
from router_service.attention.kv_cache import KVCache
from router_service.dispatcher import Dispatch, Dispatcher
from router_service.model.transformers_backend.attention import Chosen, Index, SdpaPlan
from router_service.model.transformers_backend.pages import PagedLayersPlan

SHARED = ("shared_experts", "shared_expert", "shared_mlp")  # what a block calls its own
PER_TOKEN = ("hidden_states", "q_resid", "position_ids")  # of what an indexer is given: [1, T, …]


@dataclass(slots=True)
class _Step:
    """What a forward pass is of."""

    attention: SdpaPlan | PagedLayersPlan
    kv_cache: KVCache
    routed: list[torch.Tensor] | None
    times: LayerPass | None

    def end_layer(self) -> None:
        if self.times is not None:
            self.times.layer()


class TransformersDecoder:
    """One model, bound to the dispatcher that reaches its experts, none if it is dense."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dispatcher: Dispatcher,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_model_len: int,
        kernel: Kernel,
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        """Raises CheckpointError: what cannot be served, by name, before weights are read.

        `kernel` multiplies where a layer is nothing but a product, and is ours; torch does the rest.
        """
        self.architecture = checkpoint.architecture
        self.dispatcher = dispatcher
        self.dtype, self.device = dtype, device
        self._step: _Step | None = None
        self.layer_times = LayerTimes()
        meta = build(checkpoint.directory, checkpoint.architecture, dtype)
        check_rope(meta.config, max_model_len, meta.error)
        load = load_own(meta, checkpoint, device, on_bytes)
        self.model = meta.model
        self._shared: dict[int, _Shared] = {}  # by layer, as the dispatcher calls it
        for index, (name, _) in enumerate(meta.experts):
            moe_name, _, attribute = name.rpartition(".")
            moe = self.model.get_submodule(moe_name)
            setattr(moe, attribute, DispatchedExperts(self, index))
            moe._is_hf_initialized = True  # some blocks would give random numbers to experts that are not there
            if type(moe).__name__ == SCALED_BEFORE:
                moe.forward = _ScaledBefore(moe)
            shared = next((getattr(moe, one) for one in SHARED if hasattr(moe, one)), None)
            if shared is not None:
                shared.forward = self._shared[index] = _Shared(shared)
        self.attention = meta.attention
        self._layers, self._head = meta.layers, meta.head
        self._counts_rows = any(type(module).__name__ == COUNTS_ROWS for module in meta.layers.modules())
        load()
        self.kernel = kernel_for(dtype, device, kernel)  # what multiplies
        if self.kernel.is_own:
            for linear in meta.linears:
                if linear.weight.dtype is dtype:
                    linear.forward = _Packed(linear, self.kernel)  # type: ignore[method-assign, assignment]
            give_back_freed()
        # Whoever has an indexer takes a part of a mask for it, which its layers would otherwise not need.
        self._mask = torch.empty(1, 1, 1, 1, device=device) if indexers(self.model) else None
        for indexer in indexers(self.model):
            indexer.forward = _Indexer(self, indexer)
        for module in self.model.modules():
            module.manta_attention = self._attend

    def forward(
        self,
        token_ids: torch.Tensor,  # [T]
        positions: torch.Tensor,  # [T]
        attention: AttentionPlan,
        kv_cache: KVCache,
        routed: list[torch.Tensor] | None = None,  # gets the experts [T, K] of each layer that has some
        num_real: torch.Tensor | None = None,  # noqa: ARG002  # rows are padded where steps are captured: never here
    ) -> Generator[Dispatch, None, torch.Tensor]:
        """Run all layers without yielding. Returns the last hidden states [T, D]; NaN stays NaN."""
        yield from ()
        assert isinstance(attention, SdpaPlan | PagedLayersPlan)
        with self._of(_Step(attention, kv_cache, routed, self.layer_times.begin())) as step:
            output = self._layers(
                input_ids=token_ids[None],
                attention_mask=self._mask,
                position_ids=positions[None],
                past_key_values=_Before(positions) if self._counts_rows else None,
                use_cache=False,
                return_dict=True,
            )
            step.end_layer()
        self.dispatcher.end_step()
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def hidden_states(self, x: torch.Tensor) -> torch.Tensor:
        """The last hidden states [R, D] of rows of what `forward` returned [R, D]: the same."""
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [R, V] in fp32 of hidden states [R, D]."""
        logits: torch.Tensor = self._head(inputs_embeds=hidden[None], use_cache=False, return_dict=True).logits[0]
        return logits.float()

    @contextmanager
    def _of(self, step: _Step) -> Generator[_Step]:
        self._step = step
        try:
            yield step
        finally:
            self._step = None

    def _attend(
        self,
        module: Any,
        query: torch.Tensor,  # [1, N, T, H]
        key: torch.Tensor,  # [1, G, T, H]
        value: torch.Tensor,  # [1, G, T, W]
        attention_mask: torch.Tensor | None,  # noqa: ARG002  # the probe saw that there is none
        s_aux: torch.Tensor | None = None,
        indices: Chosen | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """The attention function: returns [1, T, N, W]."""
        assert self._step is not None
        if module.layer_idx:
            self._step.end_layer()  # the one before
        queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))
        plan, kv_cache = self._step.attention, self._step.kv_cache
        plan.write(module.layer_idx, keys, values, kv_cache)
        if isinstance(plan, SdpaPlan):
            return plan.read(module.layer_idx, queries, kv_cache, s_aux, indices)[None], None
        return plan.read(module.layer_idx, queries, kv_cache, s_aux)[None], None

    def choose(self, layer: int, indexer: Index, *per_token: torch.Tensor) -> Chosen:
        """Which tokens those of the step see, by what an indexer makes of tensors [1, T, …]."""
        assert self._step is not None
        assert isinstance(self._step.attention, SdpaPlan), "layers with an indexer are not computed in place"
        return self._step.attention.choose(layer, indexer, per_token, self._step.kv_cache)

    def ask_experts(
        self,
        layer: int,
        rows: torch.Tensor,  # [T, D]
        experts: torch.Tensor,  # [T, K]
        weights: torch.Tensor,  # [T, K]
    ) -> torch.Tensor:
        """What the chosen experts of a layer say, weighed and added up [T, D]. Waits for them."""
        assert self._step is not None
        if self._step.routed is not None:
            self._step.routed.append(experts)
        times = self._step.times
        if times is not None:
            times.sent()
        with closing(self.dispatcher.dispatch(layer, rows.contiguous(), experts.contiguous())) as dispatch:
            if layer in self._shared:
                self._shared[layer].begin(rows)
            combined = self.dispatcher.combine(dispatch, weights.float().contiguous())  # some families' are in bf16
        if times is not None:
            times.combined()
        return combined


class _Before:
    """In place of a cache, for layers that count rows: what is to be added to a row's number to make its position."""

    def __init__(self, positions: torch.Tensor) -> None:
        """`positions` [T]."""
        self._before = positions - torch.arange(len(positions), device=positions.device)

    def get_seq_length(self, layer: int = 0) -> torch.Tensor:  # noqa: ARG002
        """Of each row [T], where transformers' own tells one number."""
        return self._before

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ARG002
        """Those of this step: the attention function keeps them."""
        return keys, values


class _Packed:
    """In place of a linear layer's forward: the same product by a kernel of ours. The layer has its weight no more."""

    def __init__(self, linear: nn.Linear, kernel: Kernel) -> None:
        self._product, self._bias = Linear(linear.weight.detach(), kernel), linear.bias
        linear.weight = None  # type: ignore[assignment]

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """`rows` [..., in] → [..., out]."""
        assert rows.dtype is self._product.dtype, "torch multiplies no others either"
        product = self._product(rows.flatten(0, -2))
        if self._bias is not None:
            product += self._bias
        return product.view(*rows.shape[:-1], product.shape[-1])  # also of no row


class DispatchedExperts(nn.Module):
    """In place of a layer's experts."""

    def __init__(self, decoder: TransformersDecoder, layer: int) -> None:
        super().__init__()
        self.ask, self.layer = decoder.ask_experts, layer

    def forward(self, rows: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The experts interface: rows [T, D], experts [T, K], weights [T, K]."""
        return self.ask(self.layer, rows, experts, weights)


class _Shared:
    """In place of a shared expert's forward: it computes rows that are sent to others while these are under way.

    Where a block asks it before the others (Qwen2-MoE), or about other rows, it computes them when it is asked.
    """

    def __init__(self, shared: Any) -> None:
        self._forward = shared.forward
        self._is_ahead = True
        # Of which rows, and what: they are kept, so that no others lie at their address.
        self._made: tuple[torch.Tensor, torch.Tensor] | None = None

    def begin(self, rows: torch.Tensor) -> None:
        """Of `rows` [T, D] that others were sent."""
        if self._is_ahead:
            self._made = rows, self._forward(rows)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """`rows` [..., D] → the same."""
        if self._made is not None:
            (of_rows, made), self._made = self._made, None
            if of_rows.data_ptr() == rows.data_ptr() and of_rows.numel() == rows.numel():
                return made.view(rows.shape)
        self._is_ahead = False
        output: torch.Tensor = self._forward(rows)
        return output


class _Indexer:
    """In place of an indexer's forward: it is asked for each sequence of the step by itself, over our pages."""

    def __init__(self, decoder: TransformersDecoder, indexer: Any) -> None:
        self._decoder, self._indexer, self._forward = decoder, indexer, indexer.forward
        self._signature = signature(indexer.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Chosen:
        """What it chose, as `_attend` is given it: by this layer's attention, and by others that have no indexer."""
        given = self._signature.bind(*args, **kwargs).arguments
        cos, sin = given["position_embeddings"]  # [1, T, R] each
        # Of hidden states, of what queries are made of, and of positions, as far as it is given them.
        per_token = {name: given[name] for name in PER_TOKEN if given.get(name) is not None}

        def choose(part: tuple[torch.Tensor, ...], mask: torch.Tensor, keys: Any) -> torch.Tensor:
            cos, sin, *rows = part
            of_part = given | dict(zip(per_token, rows, strict=True))
            of_part |= {"position_embeddings": (cos, sin), "attention_mask": mask, "past_key_values": keys}
            with FirstOfEqual():
                chosen: torch.Tensor = self._forward(**of_part)
            return chosen

        return self._decoder.choose(self._indexer.layer_idx, choose, cos, sin, *per_token.values())


class FirstOfEqual(TorchFunctionMode):
    """Of equal scores `topk(k, dim=-1)` takes the first meanwhile. By itself it takes any, by how many there are.

    Scores of an indexer are often zero. With this a token sees the same keys in any batch and any chunk.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is not torch.Tensor.topk:
            return function(*args, **(kwargs or {}))
        scores, count = args
        assert kwargs == {"dim": -1}
        ordered, indices = scores.sort(dim=-1, descending=True, stable=True)
        return torch.return_types.topk((ordered[..., :count], indices[..., :count]))


class _ScaledBefore:
    """The layer of Llama 4: a row is weighed before an expert computes it, and the shared expert is added."""

    def __init__(self, moe: Any) -> None:
        self._moe = moe

    def __call__(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        moe = self._moe
        rows = hidden_states.reshape(-1, moe.hidden_dim)  # [T, D]
        scores, logits = moe.router(rows)  # [T, E], [T, E]
        experts = logits.topk(moe.top_k, dim=1).indices  # [T, K]
        weighed = rows[:, None] * scores.gather(1, experts)[..., None]  # [T, K, D]
        each = moe.experts(
            weighed.flatten(0, 1), experts.view(-1, 1), torch.ones_like(scores[:, :1]).repeat(moe.top_k, 1)
        )
        return moe.shared_expert(rows) + each.view(weighed.shape).sum(1), logits
