"""Writes random tiny models in every layout that Manta reads, beside the transformers model to compare with."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.utils import logging

from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.errors import CheckpointError

Layout = Literal["huggingface", "fused", "mistral", "mistral_early"]
CausalLM = MixtralForCausalLM | MistralForCausalLM

TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,  # not hidden_size / heads
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # large enough that greedy tokens vary
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}

ModelT = TypeVar("ModelT", MixtralForCausalLM, MistralForCausalLM)

logging.disable_progress_bar()


def random_mixtral(*, seed: int = 0, **config_overrides: Any) -> MixtralForCausalLM:
    """A random fp32 Mixtral in eval mode. Norm weights are not all one, so that a forgotten norm shows."""
    torch.manual_seed(seed)
    return _with_uneven_norms(MixtralForCausalLM(MixtralConfig(**{**TINY, **config_overrides})))


def random_mistral(*, seed: int = 0, **config_overrides: Any) -> MistralForCausalLM:
    """The same without experts: one feed-forward network a layer."""
    torch.manual_seed(seed)
    sizes = {key: value for key, value in TINY.items() if key not in ("num_local_experts", "num_experts_per_tok")}
    return _with_uneven_norms(
        MistralForCausalLM(MistralConfig(**{**sizes, "sliding_window": None, **config_overrides}))
    )


def _with_uneven_norms(model: ModelT) -> ModelT:
    model = model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def write_checkpoint(
    directory: Path,
    *,
    layout: Layout = "huggingface",
    dense: bool = False,
    shards: int = 1,
    seed: int = 0,
    **config_overrides: Any,
) -> CausalLM:
    """Write a random Mixtral, or a Mistral with `dense`, to `directory` and return it.

    `huggingface` has the hub's names, `fused` those that transformers 5 has in memory, `mistral` is params.json and
    consolidated*.safetensors, and `mistral_early` the same with the experts of a layer in one tensor.
    """
    model = (random_mistral if dense else random_mixtral)(seed=seed, **config_overrides)
    directory.mkdir(parents=True, exist_ok=True)
    if layout in ("mistral", "mistral_early"):
        _write_mistral(model, directory, shards, early=layout == "mistral_early")
        return model
    model.save_pretrained(directory, save_original_format=layout == "huggingface")
    if shards > 1:
        _split(directory / "model.safetensors", shards)
    return model


def bias_gates(directory: Path) -> None:
    """Make the gates of a checkpoint in one file see only whose half of the vocabulary a token is in.

    Tokens of the lower half go to the first two experts in every layer, those of the upper half to the next two: one
    dimension of the hidden states says which, and nothing ever writes to it.
    """
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("embed_tokens.weight"):
            half = len(tensor) // 2
            tensor[:half, 0], tensor[half:, 0] = 4.0, -4.0
        elif name.endswith("lm_head.weight"):
            tensor[:, 0] = 0.0
        elif name.endswith(("o_proj.weight", "w2.weight")):
            tensor[0] = 0.0
        elif name.endswith("gate.weight"):
            tensor[:2, 0], tensor[2:4, 0] = 10.0, -10.0
    save_file(tensors, file, metadata={"format": "pt"})


def hub_state_dict(model: CausalLM) -> dict[str, torch.Tensor]:
    """The model's tensors under the hub's names, cut out of the fused ones."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if isinstance(model, MixtralForCausalLM):
            name = name.replace(".mlp.", ".block_sparse_moe.")
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(tensor):
                w1, w3 = both.chunk(2)
                tensors[name.replace("gate_up_proj", f"{expert}.w1.weight")] = w1.contiguous()
                tensors[name.replace("gate_up_proj", f"{expert}.w3.weight")] = w3.contiguous()
        elif name.endswith("experts.down_proj"):
            for expert, w2 in enumerate(tensor):
                tensors[name.replace("down_proj", f"{expert}.w2.weight")] = w2.contiguous()
        else:
            tensors[name] = tensor.contiguous()
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return tensors


def read_header(file: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return dict(json.loads(content[8 : 8 + length]))


def rewrite_header(file: Path, header: dict[str, Any] | bytes) -> None:
    """Replace the header and keep the data, as a damaged or unusual writer would."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    new = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :])


def _split(file: Path, shards: int) -> None:
    """One file into `shards`, with an index; neighbouring tensors land in different files."""
    tensors = load_file(file)
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        part = f"{file.stem}-{shard + 1:05d}-of-{shards:05d}.safetensors"
        weight_map |= dict.fromkeys(names[shard::shards], part)
        save_file({name: tensors[name] for name in names[shard::shards]}, file.parent / part)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (file.parent / f"{file.name}.index.json").write_text(json.dumps(index))
    file.unlink()


def _write_mistral(model: CausalLM, directory: Path, shards: int, *, early: bool) -> None:
    config = model.config
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "head_dim": head_dim,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_parameters["rope_theta"],
        "max_position_embeddings": config.max_position_embeddings,
    }
    if isinstance(model, MixtralForCausalLM):
        params["moe"] = {"num_experts": config.num_local_experts, "num_experts_per_tok": config.num_experts_per_tok}
    if config.sliding_window is not None:
        params["sliding_window"] = config.sliding_window
    if config.tie_word_embeddings:
        params["tied_embeddings"] = True
    (directory / "params.json").write_text(json.dumps(params))
    tensors = {_mistral_name(name): tensor for name, tensor in hub_state_dict(model).items()}
    for name in tensors:
        if name.endswith(("wq.weight", "wk.weight")):
            tensors[name] = interleave_rows(tensors[name], head_dim)
    if early:
        tensors = _stack_experts(tensors, config.num_hidden_layers, config.num_local_experts)
    save_file(tensors, directory / "consolidated.safetensors")
    if shards > 1:
        _split(directory / "consolidated.safetensors", shards)


def interleave_rows(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """From half-split rotary rows to Mistral's pairs: row 2i of a head is its row i, row 2i+1 its row i + half."""
    rows = []
    for head in weight.split(head_dim):
        for i in range(head_dim // 2):
            rows += [head[i], head[i + head_dim // 2]]
    return torch.stack(rows)


def _mistral_name(name: str) -> str:
    for hub, mistral in (
        ("model.embed_tokens", "tok_embeddings"),
        ("lm_head", "output"),
        ("post_attention_layernorm", "ffn_norm"),
        ("input_layernorm", "attention_norm"),
        ("block_sparse_moe", "feed_forward"),
        ("mlp.gate_proj", "feed_forward.w1"),
        ("mlp.down_proj", "feed_forward.w2"),
        ("mlp.up_proj", "feed_forward.w3"),
        *((f"self_attn.{x}_proj", f"attention.w{x}") for x in "qkvo"),
    ):
        name = name.replace(hub, mistral)
    return name.removeprefix("model.")


def _stack_experts(tensors: dict[str, torch.Tensor], num_layers: int, num_experts: int) -> dict[str, torch.Tensor]:
    """The first release's way: [E·F, D] for w1, w3 and the transpose of w2."""
    for layer in range(num_layers):
        old, new = f"layers.{layer}.feed_forward", f"layers.{layer}.block_sparse_moe"
        tensors[f"{new}.gate.weight"] = tensors.pop(f"{old}.gate.weight")
        for matrix in ("w1", "w2", "w3"):
            parts = [tensors.pop(f"{old}.experts.{expert}.{matrix}.weight") for expert in range(num_experts)]
            tensors[f"{new}.{matrix}"] = torch.cat([part.t() if matrix == "w2" else part for part in parts])
    return tensors


def refusal(directory: Path) -> str:
    """What is said of a checkpoint that cannot be opened: a sentence, also after a journey between processes."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(directory)
    assert pickle.loads(pickle.dumps(caught.value)).message == caught.value.message
    assert caught.value.message.endswith(".")
    return caught.value.message
