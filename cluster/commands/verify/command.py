"""`manta verify MODEL`: does this machine compute a model as transformers does? Text or JSON, and an exit code.

Both sides get the same prompts and compute in the same dtype. A token of ours is good where transformers finds no
other one likelier by more than rounding may make it. Where one is not, or its likelihood is off, the layers of that
prompt are compared, and the first that differ are named. In any case each part of the model is compared by itself, all
experts and the embeddings of all tokens among them, and those that compute something else are named: that is what a
report of a bug begins with.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from cluster.checkpoint.architecture import ComputeDtype, compute_dtype
from cluster.checkpoint.checkpoint import Checkpoint, ModelImpl, open_checkpoint
from cluster.checkpoint.hub import resolve_model
from cluster.commands.bench.machine import this_machine
from cluster.commands.verify.parts import OFF, PartDifference, part_lines
from cluster.commands.verify.sides import Layers, Reference, Said, ours
from cluster.config import EngineConfig
from cluster.errors import CheckpointError
from router_service.assembly import resolve_device

TEXTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village between two rivers, there lived a clockmaker who",
)
# Of a token's log-probability. In fp32 only the order of sums differs. In bf16 each layer rounds on both sides: the
# bound is a judgement, no model of the hub has been measured.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
MOST_LAYERS = 8  # that are shown of a prompt
MOST_PARTS = 16


@dataclass(frozen=True, slots=True)
class LayerDifference:
    """Of one layer and prompt."""

    layer: int
    what: Literal["attention", "gate"]
    off: float  # attention: the largest difference, relative to the largest number; gate: part of the tokens


@dataclass(frozen=True, slots=True)
class PromptResult:
    """Of one prompt."""

    prompt_tokens: int
    output_tokens: int
    other_tokens: int  # for which transformers has a likelier one, by more than the tolerance
    first_other: int | None  # its position
    largest_difference: float  # of a token's log-probability
    near_ties: int  # of a token and layer, where transformers' code was sent to the experts of ours
    layers: tuple[LayerDifference, ...]  # that differ by more than rounding; none where tokens are good
    error: str  # why there are no tokens

    def is_good(self, tolerance: float) -> bool:
        """NaN is not."""
        return self.other_tokens == 0 and self.output_tokens > 0 and self.largest_difference <= tolerance


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of one model, both ways."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: str
    prompts: tuple[PromptResult, ...]
    parts: tuple[PartDifference, ...]  # that differ

    @property
    def is_good(self) -> bool:
        """Whether nothing differs."""
        return not self.parts and all(prompt.is_good(TOLERANCE[self.dtype]) for prompt in self.prompts)


def run(
    model: str,
    revision: str | None,
    model_impl: Literal["auto"] | ModelImpl,
    dtype: Literal["auto"] | ComputeDtype,
    tokens: int,
    *,
    as_json: bool,
) -> bool:
    """Whether nothing differs. Raises MantaError for what a user can mend."""
    checkpoint = open_checkpoint(resolve_model(model, revision), model_impl)
    checkpoint.check_head()
    name = compute_dtype(dtype, checkpoint.architecture)
    device = resolve_device(EngineConfig())
    prompts = _prompts(checkpoint)
    said, parts = ours(checkpoint, device, getattr(torch, name), prompts, tokens)
    try:
        reference = Reference(checkpoint, device, getattr(torch, name))
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        raise CheckpointError(f"transformers cannot load {checkpoint.directory} to compare with: {error}") from error
    results = tuple(
        _compare(answer, *reference.read(prompt, answer), name, len(prompt))
        for prompt, answer in zip(prompts, said, strict=True)
    )
    found = Comparison(checkpoint, device, name, results, reference.compare(parts, name))
    if as_json:
        print(json.dumps(_document(found)))
    else:
        _print(found)
    return found.is_good


def _prompts(checkpoint: Checkpoint) -> list[list[int]]:
    """Ordinary text; a few ids where there is no tokenizer.json."""
    file = checkpoint.directory / "tokenizer.json"
    if not file.is_file():
        vocab_size = checkpoint.architecture.vocab_size
        return [[(7 * place + 11 * number) % vocab_size for place in range(12)] for number in range(1, len(TEXTS) + 1)]
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers has no class of its own
        raise CheckpointError(f"{file} cannot be read as a tokenizer: {error}") from error
    return [tokenizer.encode(text).ids for text in TEXTS]


def _compare(
    said: Said, logprobs: torch.Tensor, layers: Layers, near_ties: int, dtype: str, prompt_tokens: int
) -> PromptResult:
    best = logprobs.max(-1).values
    differences, others = [], []
    for position, (token, logprob) in enumerate(zip(said.token_ids, said.logprobs, strict=True)):
        expected = float(logprobs[position, token])
        differences.append(abs(expected - logprob))
        if not float(best[position]) - expected <= TOLERANCE[dtype]:
            others.append(position)
    largest = float(torch.tensor(differences or [float("nan")]).max())  # NaN where one is
    result = PromptResult(
        prompt_tokens,
        len(said.token_ids),
        len(others),
        others[0] if others else None,
        largest,
        near_ties,
        (),
        said.error,
    )
    if result.is_good(TOLERANCE[dtype]):
        return result
    return replace(result, layers=_off(said.layers, layers, dtype))


def _off(mine: Layers, theirs: Layers, dtype: str) -> tuple[LayerDifference, ...]:
    """In the order in which a token goes through them, as far as both have them."""
    found = []
    for layer in sorted(mine.attended.keys() & theirs.attended.keys()):
        one, other = mine.attended[layer], theirs.attended[layer]
        off = float("nan") if one.shape != other.shape else float((one - other).abs().max() / other.abs().max())
        if not off <= OFF[dtype]:
            found.append(LayerDifference(layer, "attention", off))
    for layer in sorted(mine.experts.keys() & theirs.experts.keys()):
        chosen, others = mine.experts[layer], theirs.experts[layer]
        share = 1.0 if chosen.shape != others.shape else float((chosen != others).any(1).float().mean())
        if share:
            found.append(LayerDifference(layer, "gate", share))
    return tuple(sorted(found, key=lambda one: one.layer))


def _document(found: Comparison) -> dict[str, Any]:
    import transformers

    return {
        "model": str(found.checkpoint.directory),
        "model_impl": found.checkpoint.model_impl,
        "fingerprint": found.checkpoint.fingerprint,
        "device": found.device.type,
        "dtype": found.dtype,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": this_machine().lines(),
        "good": found.is_good,
        "tolerance": TOLERANCE[found.dtype],
        "prompts": [asdict(prompt) for prompt in found.prompts],
        "parts": [asdict(part) for part in found.parts],
    }


def _print(found: Comparison) -> None:
    checkpoint, dtype = found.checkpoint, found.dtype
    whose = "code of ours" if checkpoint.model_impl == "native" else "transformers' code with our experts and attention"
    print(
        f"{checkpoint.directory}: {checkpoint.architecture.num_layers} layers, {whose}, {dtype} on {found.device.type}"
    )
    for number, result in enumerate(found.prompts, start=1):
        if result.error:
            print(f"prompt {number}: no tokens: {result.error}")
            continue
        ties = f", {result.near_ties} near ties of gates decided alike" if result.near_ties else ""
        print(
            f"prompt {number}: {result.output_tokens - result.other_tokens} of {result.output_tokens} tokens, "
            f"log-probabilities differ by {result.largest_difference:.2g} at most{ties}"
        )
        for one in result.layers[:MOST_LAYERS]:
            if one.what == "attention":
                print(f"  layer {one.layer}: attention is off by {one.off:.2g} of its largest number")
            else:
                print(f"  layer {one.layer}: {one.off:.0%} of the tokens go to other experts")
        if len(result.layers) > MOST_LAYERS:
            print(f"  and {len(result.layers) - MOST_LAYERS} more")
    lines = part_lines(found.parts)
    if lines:
        print("parts that compute something else, each given the same input on both sides:")
    for line in lines[:MOST_PARTS]:
        print(f"  {line}")
    if len(lines) > MOST_PARTS:
        print(f"  and {len(lines) - MOST_PARTS} more")
    if found.is_good:
        print(
            f"as transformers computes it: no log-probability is off by more than {TOLERANCE[dtype]:g}, "
            f"and no part by more than {OFF[dtype]:g} of its largest number"
        )
        return
    if not found.parts:
        rounding = ", or rounding: try --dtype float32" if dtype == "bfloat16" else ""
        print(
            "each part computes what transformers' does from the same input: what is off is attention over the cache,"
        )
        print(f"or how parts are put together{rounding}")
    if any(part.there for part in found.parts):
        print("transformers makes numbers that are not finite of it as well: the checkpoint's files are broken")
    else:
        print("not as transformers computes it: report it, with what manta verify --json prints")
