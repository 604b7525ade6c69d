"""Runs a model once without numbers, on the meta device, and tells what its layers ask for. Reads no weight.

What a layer hands to attention is known only by its code. What our cache and our attention cannot do is refused here
by name, before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import AttentionMaskInterface

from cluster.errors import CheckpointError
from experts_service.transformers_backend.layer_attention import LayerAttention, Sight

ATTENTION = "manta"  # the name of our attention function in transformers' registry
# The caches of transformers that are keys and values; the last of a layer that is handed those of another one.
KEPT = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")
INDEXED = "DynamicIndexedLayer"  # the same, and keys of an indexer
INDEXER = ("hidden_states", "position_embeddings", "attention_mask", "position_ids", "past_key_values")
INDEXED_BY = "q_resid"  # and by this, mostly
MEANINGLESS = ("dropout", "is_causal", "output_attentions", "use_cache", "position_ids", "output_router_logits")
MEANT = ("scaling", "sliding_window", "s_aux", "indices")
STATE = "a running state (linear attention, a state space or a convolution)"
KEPT_OTHERWISE = {  # in words, by transformers' caches
    "LinearAttentionLayer": STATE,
    "LinearAttentionAndFullAttentionLayer": f"{STATE} beside keys and values",
    "LinearAttentionAndSlidingWindowAttentionLayer": f"{STATE} beside keys and values",
    "DeepseekV4CSACache": "keys that stand for several tokens each",
    "DeepseekV4HCACache": "keys that stand for several tokens each",
    INDEXED: "keys of an indexer that is asked in a way of its own",
    "MiniMaxM3VLSparseCacheLayer": "choices of whole blocks of keys",
    "UnlimitedOcrDynamicReferenceSlidingWindowLayer": "a window in which a picture's tokens stay",
}
NAMED = 4  # layers, in a message
LENGTH_ROPES = ("dynamic", "longrope")
PROBED = 2  # tokens
# What transformers raises where a config.json makes no sense to it.
NO_MODEL = (
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, NotImplementedError, ImportError),
    *(OSError, ArithmeticError, StrictDataclassError),
)

Refuse = Callable[[str], CheckpointError]  # of what is wrong


def is_experts(module: nn.Module) -> bool:
    """Whether it is the experts of a layer, called with rows, indices and weights; Llama 4's with rows only.

    Step 3.7's are not behind the experts interface, and are made as if they were.
    """
    return (hasattr(module, "has_gate") and hasattr(module, "is_transposed")) or (
        type(module).__name__ in ("Llama4TextExperts", "Step3p7Experts")
    )


def indexers(model: nn.Module) -> list[nn.Module]:
    """What chooses, in each layer that has one, which tokens are seen: those of DeepSeek-V3.2 and of its like."""
    return [module for module in model.modules() if type(module).__name__.endswith("Indexer")]


def probe(
    model: Any, config: Any, layers: Any, head: Any, refuse: Refuse
) -> tuple[tuple[LayerAttention, ...], tuple[nn.Linear, ...]]:
    """What attention is in each layer, by index; and the matrices that only multiply rows, which can be packed.

    Raises CheckpointError, which names what cannot be served.
    """
    check_caches(config, refuse, indexers(model))
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d):
            raise refuse(f"{name} is a convolution over tokens, and what it keeps is not in the cache")
    seen = _Seen(refuse)
    for indexer in indexers(model):
        indexer.forward = seen.index_of(indexer)
    for module in model.modules():
        module.manta_attention = seen
        if is_experts(module):
            module.forward = _same_shape
        elif type(module).__name__.endswith("RotaryEmbedding") and _by_length(config):
            module.forward = _OnCpu(module)  # which looks at the numbers of positions
    ids = torch.zeros(1, PROBED, dtype=torch.int64, device="meta")
    positions = torch.arange(PROBED, device="meta")[None]
    AttentionMaskInterface.register(ATTENTION, _tagged_mask)
    uses = _Uses()
    try:
        with torch.inference_mode(), uses:
            # The mask is not looked at; without one positions would be, and there are none.
            output = layers(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                position_ids=positions,
                use_cache=False,
                return_dict=True,
            )
            head(inputs_embeds=output.last_hidden_state, use_cache=False, return_dict=True)
    except NO_MODEL as error:
        raise refuse(f"its code does not run without numbers ({first_line(error)})") from error
    finally:
        del AttentionMaskInterface._global_mapping[ATTENTION]  # so that no mask is made for steps
        for module in model.modules():
            module.__dict__.pop("forward", None)
    if missing := sorted(set(range(config.num_hidden_layers)) - set(seen.layers)):
        names = sorted({type(module).__name__ for module in _mixers(layers, missing)})
        raise refuse(
            f"it has no softmax attention in {_listed(missing)} ({', '.join(names)}), and Manta keeps the keys and "
            "values of that"
        )
    linears = [module for module in model.modules() if type(module) is nn.Linear and uses.is_matrix(module.weight)]
    return tuple(seen.layers[index] for index in range(max(seen.layers) + 1)), tuple(linears)


def first_line(error: Exception) -> str:
    """What an error of transformers says, for a message: its first line, and one more that this announces."""
    if isinstance(error, KeyError):
        return f"its code finds no {error}"
    lines = [line.strip().rstrip(".") for line in str(error).strip().splitlines()[:2]]
    if not lines:
        return type(error).__name__
    return " ".join(lines) if lines[0].endswith(":") else lines[0]


class _Uses(TorchFunctionMode):
    """What weights are used for meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self._of_linear: set[int] = set()  # ids of tensors
        self._of_others: set[int] = set()

    def is_matrix(self, weight: torch.Tensor) -> bool:
        """Whether rows were multiplied with it, and it was used for nothing else, its dtype being asked included."""
        return id(weight) in self._of_linear - self._of_others

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [*args, *(kwargs or {}).values()]
        if function is F.linear and len(args) > 1:
            self._of_linear.add(id(given.pop(1)))
        self._of_others.update(id(one) for one in tree_leaves(given) if isinstance(one, nn.Parameter))
        return function(*args, **(kwargs or {}))


class _Seen:
    """The attention function of the probe."""

    def __init__(self, refuse: Refuse) -> None:
        self._refuse = refuse
        self.layers: dict[int, LayerAttention] = {}
        self._index_keys: dict[int, tuple[int, int]] = {}  # by layer: their width, and the indexer's heads

    def index_of(self, indexer: Any) -> Callable[..., torch.Tensor]:
        """In place of an indexer's forward: notes how wide its keys are."""
        forward = indexer.forward

        def noted(*args: Any, past_key_values: Any = None, **kwargs: Any) -> torch.Tensor:  # noqa: ARG001
            chosen: torch.Tensor = forward(*args, past_key_values=_IndexKeys(self._index_keys, indexer), **kwargs)
            return chosen

        return noted

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,  # [1, N, T, H]
        key: torch.Tensor,  # [1, G, T, H]
        value: torch.Tensor,  # [1, G, T, W]
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        layer = getattr(module, "layer_idx", None)
        what = type(module).__name__
        if not isinstance(layer, int) or layer in self.layers:
            raise self._refuse(f"{what} does not say which of the cache's layers it is")
        what = f"attention of layer {layer} ({what})"
        sight = getattr(attention_mask, "manta_sight", None)
        if sight is None:
            raise self._refuse(f"{what} masks keys in a way of its own")
        if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
            raise self._refuse(f"{what} sees tokens that come after")
        for name, argument in kwargs.items():
            if argument is not None and name not in MEANT and name not in MEANINGLESS:
                raise self._refuse(f"{what} hands {name} to attention, which is not honoured")
        if key.shape[2] != PROBED or value.shape[2] != PROBED:
            raise self._refuse(f"{what} has keys that are not those of its tokens")
        if query.shape[1] % key.shape[1]:
            raise self._refuse(
                f"{what} has {query.shape[1]} heads, and keys of {key.shape[1]}, which do not divide them"
            )
        scaling = kwargs.get("scaling")
        self.layers[layer] = LayerAttention(
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            key_dim=key.shape[3],
            value_dim=value.shape[3],
            scaling=float(query.shape[3] ** -0.5 if scaling is None else scaling),
            sight=sight,
            has_sinks=kwargs.get("s_aux") is not None,
            index_dim=self._index_keys.get(layer, (0, 0))[0],
            index_heads=self._index_keys.get(layer, (0, 0))[1],
        )
        return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3]), None


class _IndexKeys:
    """In place of a cache, for an indexer."""

    def __init__(self, widths: dict[int, tuple[int, int]], indexer: Any) -> None:
        self._widths, self._heads = widths, indexer.n_heads

    def update_indexer(self, keys: torch.Tensor, layer: int) -> torch.Tensor:
        """`keys` [1, T, width]."""
        self._widths[layer] = keys.shape[-1], self._heads
        return keys


def _tagged_mask(
    q_length: int, kv_length: int, mask_function: Any, config: Any, local_size: int | None = None, **_: Any
) -> torch.Tensor:
    """A mask without numbers that says what it would show: transformers asks for one for each kind of layer."""
    mask = torch.empty(1, 1, q_length, kv_length, dtype=torch.bool, device="meta")
    mask.manta_sight = _sight(mask_function, local_size, getattr(config, "attention_chunk_size", None))  # type: ignore[attr-defined]
    return mask


def _sight(shows: Any, size: int | None, chunk: int | None) -> Sight | None:
    """How far tokens see of whom `shows(batch, head, query, key)` tells it; None: in another way than ours."""
    possible = [Sight()] if size is None else [Sight(window=size), Sight(chunk=size)]
    size = size or PROBED
    zero = torch.tensor(0)
    try:
        for sight in possible:
            queries = (0, 1, size - 1, size, size + 1, 2 * size, 3 * size + 1)
            keys = [torch.arange(query + 2) for query in queries]
            firsts = sight.first(np.array(queries))
            if all(
                torch.equal(
                    torch.as_tensor(shows(zero, zero, torch.tensor(query), of_query)).expand(len(of_query)),
                    (of_query >= int(first)) & (of_query <= query),
                )
                for query, of_query, first in zip(queries, keys, firsts, strict=True)
            ):
                return sight
    except (RuntimeError, NotImplementedError):  # chunks are told by a tensor that has no numbers here
        return Sight(chunk=chunk) if chunk is not None and chunk == size else None
    return None


def check_caches(config: Any, refuse: Refuse, of_model: Sequence[nn.Module] | None = None) -> None:
    """Whether layers keep keys and values, and those of indexers `of_model`, which are not looked at if there is none.

    Raises CheckpointError.
    """
    try:
        caches = DynamicCache(config=config).layers
    except NO_MODEL as error:
        raise refuse(f"transformers makes no cache for its layers ({first_line(error)})") from error
    is_known = of_model is None or (bool(of_model) and all(map(_is_known, of_model)))
    kept = (*KEPT, INDEXED) if is_known else KEPT
    others: dict[str, list[int]] = {}  # what is kept otherwise → by which layers
    for layer, cache in enumerate(caches):
        if (name := type(cache).__name__) not in kept:
            others.setdefault(KEPT_OTHERWISE.get(name, f"what transformers keeps in {name}"), []).append(layer)
    if others:
        told = " and ".join(f"{what} in {_listed(layers)}" for what, layers in others.items())
        raise refuse(f"it keeps {told}; Manta keeps only keys and values of softmax attention")


def _listed(layers: Sequence[int]) -> str:
    named = ", ".join([*map(str, layers[:NAMED]), *(["…"] if len(layers) > NAMED else [])])
    return f"layer {named}" if len(layers) == 1 else f"layers {named}"


def _is_known(indexer: nn.Module) -> bool:
    """Whether it is called as DeepSeek-V3.2's is, so that it can be called for one sequence after the other."""
    given = [name for name in signature(indexer.forward).parameters if name != INDEXED_BY]
    return given == list(INDEXER) and hasattr(indexer, "n_heads")


def check_rope(config: Any, max_model_len: int, refuse: Refuse) -> None:
    """Those that change with a sequence's length are as they are below it. Raises CheckpointError beyond it."""
    for parameters in _by_length(config):
        below = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        if max_model_len > below:
            raise refuse(
                f"its rotary embedding ({parameters['rope_type']}) changes with a sequence's length beyond {below} "
                f"tokens; with engine.max_model_len: {below} it can be served"
            )


def _by_length(config: Any) -> list[dict[str, Any]]:
    """The rotary embeddings that change with a sequence's length, of one or of each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    of_kinds = [one for one in rope.values() if isinstance(one, dict)]
    return [one for one in of_kinds or [rope] if one.get("rope_type") in LENGTH_ROPES]


class _OnCpu:
    """A rotary embedding with numbers, in place of one without."""

    def __init__(self, module: nn.Module) -> None:
        with torch.device("cpu"):
            self._real = type(module)(module.config)

    def __call__(self, x: torch.Tensor, position_ids: torch.Tensor, **keywords: Any) -> tuple[torch.Tensor, ...]:
        positions = torch.arange(position_ids.shape[1])[None]
        return tuple(one.to("meta") for one in self._real(x.new_empty(x.shape, device="cpu"), positions, **keywords))


def _same_shape(rows: torch.Tensor, *_: Any) -> torch.Tensor:
    """Experts without numbers."""
    return torch.empty_like(rows)


def _mixers(decoder: Any, missing: list[int]) -> list[nn.Module]:
    """What stands in place of attention in these layers."""
    layers = getattr(decoder, "layers", [])
    of_layers = [module for index in missing if index < len(layers) for module in layers[index].children()]
    named = [module for module in of_layers if any(one in type(module).__name__ for one in ("Mixer", "Mamba", "Conv"))]
    return named or of_layers[:1]
