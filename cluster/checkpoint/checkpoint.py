"""Opens a model directory: which files, which layout, is everything there. Reads headers, never whole tensors.

Every process that needs weights opens the directory again (milliseconds) and compares fingerprints.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cluster.checkpoint.architecture import Architecture, StoredDtype, coordinator_tensors, expert_tensors
from cluster.checkpoint.configuration.any_architecture import Divided, any_architecture, divided, stored_tensors
from cluster.checkpoint.configuration.end_of_tokenizer import end_of_tokenizer
from cluster.checkpoint.configuration.generation_config import GenerationConfig, read_generation_config
from cluster.checkpoint.configuration.hyperparameters import (
    architecture_from_config,
    architecture_from_params,
    is_native,
)
from cluster.checkpoint.json_document import JsonDocument
from cluster.checkpoint.layouts import Layout, Ref, locate_tensors
from cluster.checkpoint.quantization.any_matrix import Mxfp4Ref
from cluster.checkpoint.quantization.config import read_quantization
from cluster.checkpoint.quantization.contents import check_contents
from cluster.checkpoint.quantization.quantized_ref import QuantizedRef
from cluster.checkpoint.quantization.rounding import RoundedRef, Rounding
from cluster.checkpoint.safetensors_header import StoredTensor
from cluster.checkpoint.tensor_ref import TensorRef
from cluster.checkpoint.weight_files import find_layout, read_headers
from cluster.errors import CheckpointError, ConfigError

__all__ = ["Checkpoint", "ModelImpl", "TensorRef", "open_checkpoint"]

ModelImpl = Literal["native", "transformers"]  # whose code computes the model

SAMPLE_BYTES = 4096  # of each end of each tensor, for the fingerprint

_BASE = "model."  # what names begin with, but in the files of a model that was saved without its head: Qwen3-Embedding
_EMBEDDINGS = "model.embed_tokens.weight"
_SNAPSHOT = re.compile(r"/models--[^/]+/snapshots/([0-9a-f]{40})$")
_DTYPES: Mapping[str, StoredDtype] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Checkpoint:
    """A model directory that was found whole. `tensors` is keyed by the hub's names."""

    directory: Path
    layout: Layout
    architecture: Architecture
    tensors: Mapping[str, Ref | RoundedRef]
    fingerprint: str  # hex; the same weights at another path have the same; empty where the files are not here
    generation: GenerationConfig
    model_impl: ModelImpl = "native"  # `transformers`: `tensors` is keyed by the names that they are stored by
    has_head: bool = True  # else there are hidden states to be had and no logits

    @property
    def revision(self) -> str | None:
        """The hub's commit, where the directory is one of the hub's cache."""
        snapshot = _SNAPSHOT.search(self.directory.as_posix())
        return None if snapshot is None else snapshot[1]

    def check_head(self) -> None:
        """Raises CheckpointError where there are no tokens to be had."""
        if not self.has_head:
            raise CheckpointError(
                f"{self.directory} was saved without its output head: it makes embeddings, and there are no tokens to "
                "compare"
            )

    def coordinator_bytes(self) -> int:
        """What a coordinator reads, without experts."""
        if self.model_impl == "transformers":
            return self._divided().own
        return sum(self.tensors[name].nbytes for name in coordinator_tensors(self.architecture))

    def expert_bytes(self, experts: Sequence[int]) -> int:
        """What who holds these experts reads."""
        a = self.architecture
        if self.model_impl == "transformers":
            sizes = self._divided()
            return sizes.expert * len(experts) + sizes.shared
        return sum(
            self.tensors[name].nbytes
            for layer in range(a.num_layers)
            for expert in experts
            for name in expert_tensors(a, layer, expert)
        )

    def _divided(self) -> Divided:
        sizes = {name: (ref.shape, ref.nbytes) for name, ref in self.tensors.items()}
        return divided(sizes, self.architecture)

    @property
    def widened(self) -> tuple[str, ...]:
        """How matrices are stored that are widened while they are read, whatever device computes with them."""
        if self.model_impl == "native":
            return ()
        refs = (ref for ref in self.tensors.values() if isinstance(ref, QuantizedRef | Mxfp4Ref))
        return tuple(dict.fromkeys(str(ref.scheme if isinstance(ref, QuantizedRef) else ref) for ref in refs))

    def widening(self, dtype: str) -> str:
        """The same, for a log."""
        return f"weights in {'; '.join(self.widened)} are widened to {dtype} while they are read"

    def rounded(self, rounding: Rounding | None, key: str = "engine.quantization") -> Checkpoint:
        """The same, some of its matrices rounded while they are read, with a fingerprint of its own.

        What an earlier call said of them is forgotten. Raises ConfigError, which names `key`, where they are small
        numbers already.
        """
        if rounding is not None and self.model_impl == "transformers":
            raise ConfigError(f"{key}: the transformers backend rounds no weights; leave it out for {self.directory}")
        tensors: dict[str, Ref | RoundedRef] = {
            name: ref.plain if isinstance(ref, RoundedRef) else ref for name, ref in self.tensors.items()
        }
        for name, ref in tensors.items():
            of_name = None if rounding is None else rounding.of(name)
            if of_name is None:
                continue
            if not isinstance(ref, TensorRef):
                raise ConfigError(f"{key}: {self.directory} is quantised already; leave it out")
            tensors[name] = RoundedRef(ref, of_name)
        if tensors == self.tensors:
            return self
        known = fingerprint(self.architecture, tensors) if self.fingerprint else ""
        return replace(self, tensors=tensors, fingerprint=known)


def open_checkpoint(directory: Path | str, model_impl: Literal["auto"] | ModelImpl = "auto") -> Checkpoint:
    """Find and check everything but the numbers themselves. Raises CheckpointError, which names file and tensor.

    `model_impl`: whose code is to compute it; `auto` is ours where a family has some.
    """
    directory = Path(directory)
    layout = find_layout(directory)
    if model_impl != "native" and layout == "huggingface":
        config = JsonDocument.read(directory / "config.json")
        if model_impl == "transformers" or not is_native(config):
            return _open_for_transformers(directory, config)
    elif model_impl == "transformers":
        raise CheckpointError(f"{directory} is in Mistral's own layout, which the transformers backend does not read.")
    quantization, is_base = None, False
    if layout == "huggingface":
        config = JsonDocument.read(directory / "config.json")
        if not is_native(config):
            raise config.error(
                "model_type",
                f"is {config.values['model_type']!r}, of which Manta has no code of its own; without `model_impl: "
                "native` it is computed by that of transformers",
            )
        architecture_from_config(config)  # what is not supported is said before weights are looked at
        quantization = read_quantization(config)
        stored = read_headers(directory, layout)
        is_base = _EMBEDDINGS.removeprefix(_BASE) in stored
        if is_base:
            stored = {name if name == "lm_head.weight" else _BASE + name: tensor for name, tensor in stored.items()}
        architecture = architecture_from_config(config, _stored_dtype(stored, _EMBEDDINGS))
        head = "lm_head.weight"
    else:
        params = JsonDocument.read(directory / "params.json")
        architecture_from_params(params)
        stored = read_headers(directory, layout)
        architecture = architecture_from_params(params, _stored_dtype(stored, "tok_embeddings.weight"))
        head = "output.weight"
    if head in stored:  # transformers uses it, whatever `tie_word_embeddings` says
        architecture = replace(architecture, tie_word_embeddings=False)
    has_head = not is_base or architecture.tie_word_embeddings or head in stored
    if not has_head:
        architecture = replace(architecture, tie_word_embeddings=True)  # nobody is to ask for logits
    tensors = locate_tensors(architecture, layout, stored, directory, quantization)
    if quantization is not None:
        check_contents(tensors)
    generation = read_generation_config(directory, architecture.vocab_size)
    architecture = _with_ends(architecture, generation, directory)
    known = fingerprint(architecture, tensors)
    return Checkpoint(directory, layout, architecture, tensors, known, generation, has_head=has_head)


def check_config(config: JsonDocument) -> None:
    """Raises CheckpointError where a model could be served by nobody's code, as far as its config.json tells."""
    if is_native(config):
        architecture_from_config(config)
    else:
        any_architecture(config)


def _open_for_transformers(directory: Path, config: JsonDocument) -> Checkpoint:
    """Of any family: what it is made of is known when transformers has built it."""
    any_architecture(config)  # what is not supported is said before weights are looked at
    tensors = stored_tensors(read_headers(directory, "huggingface"), config)
    architecture = any_architecture(config, _most_common_dtype(tensors.values()))
    generation = read_generation_config(directory, architecture.vocab_size)
    architecture = _with_ends(architecture, generation, directory)
    # What a model computes is in all of its config.json: there are more keys than sizes.
    of_config = json.dumps(config.values, sort_keys=True)
    known = hashlib.sha256(f"{fingerprint(architecture, tensors)} {of_config}".encode()).hexdigest()
    return Checkpoint(directory, "huggingface", architecture, tensors, known, generation, "transformers")


def _with_ends(architecture: Architecture, generation: GenerationConfig, directory: Path) -> Architecture:
    """The tokens that end an answer: both files' of the model, the tokenizer's where neither has any."""
    ends = tuple(dict.fromkeys(architecture.eos_token_ids + generation.eos_token_ids))
    return replace(architecture, eos_token_ids=ends or end_of_tokenizer(directory, architecture.vocab_size))


def fingerprint(architecture: Architecture, tensors: Mapping[str, Ref | RoundedRef]) -> str:
    """SHA-256 of sizes, names, dtypes, shapes, quantisation, and both ends of every tensor's bytes."""
    digest = hashlib.sha256(json.dumps(_sizes(architecture), sort_keys=True).encode())
    descriptors: dict[Path, int] = {}
    try:
        for name in sorted(tensors):
            of_name = tensors[name]
            if isinstance(of_name, QuantizedRef):
                digest.update(repr((of_name.scheme, *of_name.parts)).encode())
            if isinstance(of_name, RoundedRef):
                digest.update(repr(of_name.rounding).encode())
            for ref in of_name.stored:
                digest.update(repr((name, ref.dtype, ref.shape, ref.interleaved_heads, ref.transposed)).encode())
                if ref.file not in descriptors:
                    descriptors[ref.file] = os.open(ref.file, os.O_RDONLY)
                for offset in (ref.offset, ref.offset + max(0, ref.nbytes - SAMPLE_BYTES)):
                    digest.update(os.pread(descriptors[ref.file], min(SAMPLE_BYTES, ref.nbytes), offset))
    except OSError as error:
        raise CheckpointError(f"{error.filename or ref.file} cannot be read: {error.strerror}.") from error
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    return digest.hexdigest()


def _sizes(architecture: Architecture) -> dict[str, Any]:
    """What is as it usually is is left out: a field that Manta has more than before changes no model's fingerprint."""
    told: dict[str, Any] = _unusual(architecture) | {"num_layers": architecture.num_layers}
    if architecture.is_plain and len(set(architecture.layers)) == 1:
        del told["layers"]
    return told


def _unusual(of: Any) -> Any:
    """Fields of a dataclass that are not its defaults, by name, and so on into them."""
    if isinstance(of, tuple):
        return [_unusual(one) for one in of]
    if not is_dataclass(of):
        return of
    return {
        field.name: _unusual(getattr(of, field.name))
        for field in fields(of)
        if getattr(of, field.name) != field.default
    }


def _stored_dtype(stored: Mapping[str, StoredTensor], name: str) -> StoredDtype:
    return _DTYPES.get(stored[name].dtype, "float32") if name in stored else "float32"


def _most_common_dtype(refs: Iterable[Ref]) -> StoredDtype:
    """Of the tensors that are not quantised."""
    counts = Counter(ref.dtype for ref in refs if isinstance(ref, TensorRef))
    return _DTYPES.get(counts.most_common(1)[0][0], "float32") if counts else "float32"
