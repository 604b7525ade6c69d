"""Reads a process's own tensors into a model of transformers, by its own mapping of stored names. Knows no maths.

    stored      model.layers.1.mlp.experts.7.gate_proj.weight  [F, D], and up_proj's
    in memory   model.layers.1.mlp.experts.gate_up_proj        [E, 2F, D]

transformers renames, stacks, joins and transposes; here is decided what it is given: the coordinator's tensors, or
those of some experts, of which only their bytes are read. Experts stored in one tensor are its first dimension. What
is stored in fewer bits it is given widened, under the name that it would have in bf16, so it knows of none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from cluster.checkpoint.checkpoint import Checkpoint
from cluster.checkpoint.layouts import Ref
from cluster.checkpoint.quantization.any_matrix import Mxfp4Ref
from cluster.checkpoint.quantization.rounding import RoundedRef
from cluster.checkpoint.tensor_ref import TensorRef
from cluster.errors import CheckpointError
from experts_service.transformers_backend.meta_model import MetaModel
from experts_service.weights import read_widened

OnBytes = Callable[[int], None]

_EXPERT = re.compile(r"\.(\d+)\.")
_THINKER = "thinker."  # of Qwen3-Omni, whose talker is not built
_TEXT_MODEL = re.compile(r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?")


class _Stored:
    """A stored tensor, or some experts' part of it, that is read when transformers asks for it, widened to `dtype`."""

    def __init__(
        self, ref: Ref, dtype: torch.dtype, on_bytes: OnBytes | None, experts: Sequence[int] | None = None
    ) -> None:
        self._ref, self._dtype, self._on_bytes, self._experts = ref, dtype, on_bytes, experts

    def __getitem__(self, _: Any) -> torch.Tensor:
        ref = self._ref
        if self._experts is None:
            return read_widened(ref, self._dtype, self._on_bytes)
        parts = (read_widened(_of_expert(ref, expert), self._dtype, self._on_bytes) for expert in self._experts)
        first = next(parts)
        whole = first.new_empty(len(self._experts), *ref.shape[1:])
        whole[:1] = first
        for place, part in enumerate(parts, 1):
            whole[place : place + 1] = part
        return whole


def _of_expert(ref: Ref, expert: int) -> Ref:
    """Of a tensor that has all experts of a layer."""
    if isinstance(ref, Mxfp4Ref):
        return ref.of_expert(expert)
    assert isinstance(ref, TensorRef), "no other format has all experts in a tensor"
    nbytes = ref.nbytes // ref.shape[0]
    return replace(ref, shape=(1, *ref.shape[1:]), offset=ref.offset + expert * nbytes, nbytes=nbytes)


class _Names:
    """Which of the model's parameters a stored tensor becomes, or becomes a part of."""

    def __init__(self, meta: MetaModel) -> None:
        self.mapping = get_model_conversion_mapping(meta.model)
        self._renamings = [entry for entry in self.mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in self.mapping if isinstance(entry, WeightConverter)]
        self._prefix = meta.model.base_model_prefix
        self._parameters = meta.model.state_dict()
        self._experts = tuple(f"{name}." for name, _ in meta.experts)

    def __call__(self, name: str) -> tuple[str, str] | None:
        """The name to give to transformers, without the prefix of a text model in a larger one, and the parameter's."""
        name = name.removeprefix(_THINKER)
        without = (_TEXT_MODEL.sub("model.", name), _TEXT_MODEL.sub("", name))
        for candidate in dict.fromkeys((name, *without)):
            target, _ = rename_source_key(candidate, self._renamings, self._converters, self._prefix, self._parameters)
            for parameter in (target, candidate):
                if parameter in self._parameters:
                    return candidate, parameter
        return None

    def dtype(self, parameter: str) -> torch.dtype:
        """In which the model has it."""
        dtype: torch.dtype = self._parameters[parameter].dtype
        return dtype

    def is_of_experts(self, parameter: str) -> bool:
        return parameter.startswith(self._experts)


def load_own(
    meta: MetaModel, checkpoint: Checkpoint, device: torch.device, on_bytes: OnBytes | None = None
) -> Callable[[], None]:
    """What reads all but the experts, which the caller replaces before calling it. Raises CheckpointError."""
    names = _Names(meta)
    own: dict[str, Any] = {}
    for name, ref in _refs(checkpoint):
        of_name = names(name)
        if of_name is not None and not names.is_of_experts(of_name[1]):
            own[of_name[0]] = _Stored(ref, names.dtype(of_name[1]), on_bytes)

    def load() -> None:
        config = _config(meta, names, device)
        info, _ = convert_and_load_state_dict_in_model(meta.model, own, config)
        missing = set(info.missing_keys) - set(meta.model.all_tied_weights_keys)
        _check(meta, info, missing)
        meta.model._finalize_model_loading(meta.model, config, info)

    return load


def load_experts(
    meta: MetaModel,
    checkpoint: Checkpoint,
    experts: Sequence[int],
    device: torch.device,
    on_bytes: OnBytes | None = None,
) -> list[nn.Module]:
    """The experts' modules of each layer that has some, with these experts only. Raises CheckpointError."""
    names = _Names(meta)
    place = {expert: index for index, expert in enumerate(experts)}
    own: dict[str, Any] = {}
    shapes = {name: parameter.shape for name, parameter in meta.model.state_dict().items()}
    for name, ref in _refs(checkpoint):
        of_name = names(name)
        if of_name is None or not names.is_of_experts(of_name[1]):
            continue
        key, parameter = of_name
        number = _EXPERT.search(key, key.index("experts") if "experts" in key else len(key))
        if number is not None:
            kind, expert = divmod(int(number[1]), checkpoint.architecture.num_experts)  # ERNIE 4.5 VL has two kinds
            if expert in place:  # numbered anew: transformers stacks them in this order
                key = f"{key[: number.start(1)]}{kind * len(experts) + place[expert]}{key[number.end(1) :]}"
                own[key] = _Stored(ref, names.dtype(parameter), on_bytes)
        elif shapes[parameter][0] != checkpoint.architecture.num_experts:
            own[key] = _Stored(ref, names.dtype(parameter), on_bytes)  # all experts of the layer share it
        elif ref.shape[0] == checkpoint.architecture.num_experts:
            own[key] = _Stored(ref, names.dtype(parameter), on_bytes, experts)
        else:
            raise meta.error(f"the tensor {name!r} of {list(ref.shape)} cannot be divided among experts")
    for _, module in meta.experts:
        for attribute, whole in list(module.named_parameters(recurse=False)):
            if whole.shape[0] == module.num_experts:
                part = whole.new_empty(len(experts), *whole.shape[1:])
                setattr(module, attribute, nn.Parameter(part, requires_grad=False))
        module.num_experts = len(experts)  # type: ignore[assignment]
    info, _ = convert_and_load_state_dict_in_model(meta.model, own, _config(meta, names, device))
    _check(meta, info, {name for name in info.missing_keys if names.is_of_experts(name)})
    return [module for _, module in meta.experts]


def _refs(checkpoint: Checkpoint) -> Iterator[tuple[str, Ref]]:
    for name, ref in checkpoint.tensors.items():
        assert not isinstance(ref, RoundedRef), "nothing is rounded here"
        yield name, ref


def _config(meta: MetaModel, names: _Names, device: torch.device) -> LoadStateDictConfig:
    dtype = meta.model.dtype
    return LoadStateDictConfig(
        device_map={"": device},
        dtype=dtype,
        dtype_plan=meta.model._get_dtype_plan(dtype),
        weight_mapping=names.mapping,
    )


def _check(meta: MetaModel, info: Any, missing: set[str]) -> None:
    """Raises CheckpointError where what was read is not what the model is made of."""
    if info.conversion_errors:
        name, error = next(iter(info.conversion_errors.items()))
        raise meta.error(f"{name} could not be made of what is stored: {error.strip().splitlines()[-1]}")
    if info.mismatched_keys:
        name, stored, wanted = sorted(info.mismatched_keys)[0]
        raise meta.error(f"{name} is {list(stored)}; expected {list(wanted)}")
    if missing:
        first = sorted(missing)[0]
        raise CheckpointError(f"{meta.directory} lacks {len(missing)} tensors of {meta.model_type}, {first!r} for one.")
