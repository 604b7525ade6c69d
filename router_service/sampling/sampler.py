"""Chooses a token for every row of logits, and says how likely it was. Knows sampling parameters; keeps no state.

The random number of a token depends on (seed, choice index, position) and on nothing else: the same sequence continued
in another process, or in another batch, gets the same token. All rows are worked on at once, and what a row asks for
costs about the same whatever its values are.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from collections.abc import Sequence as Seq

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.messages import Request, SamplingParams, TokenLogprobs
from experts_service.device import upload
from experts_service.kernels.compiled import jit
from router_service.adjustments import Adjustments, has_adjustments
from router_service.outputs.logprobs import token_logprobs
from router_service.sampling import compiled_adjust, device_adjust
from router_service.sampling.compiled_adjust import Wishes
from router_service.sampling.device_draw import GREEDY_BELOW, choose
from router_service.sampling.draw import draw, uniform
from router_service.sampling.tokens import NOT_FINITE, NOT_READY, DeviceTokens, HostTokens, Sampled, Tokens
from router_service.scheduling.sequence import Sequence

_GRACE_S = 0.001  # all grammars of a step together are waited for
_ROWS_AT_ONCE = 8  # on a CPU: what they need stays in its cache, and memory is not asked for anew each time


class Sampler:
    """Greedy, or by inverse transform sampling of the filtered distribution."""

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos_token_ids = np.array(sorted(eos_token_ids), np.int64)

    def warm_up(self) -> None:
        """Have compiled what the first requests that wish something would wait for, by one of the processes that start.

        Three coordinators of one machine once compiled all of it, each for itself, and took its cores from each other.
        """
        everything = SamplingParams(max_tokens=1, temperature=1.0, top_p=0.5, repetition_penalty=2.0, logprobs=1)
        with jit.one_process("compiling-sampling"):
            self(torch.zeros(1, 8), [Sequence(Request("", (0,), everything, seed=0))])

    def __call__(self, logits: torch.Tensor, sequences: Seq[Sequence]) -> Sampled:
        """What `launch` begins, waited for."""
        return self.launch(logits, sequences).wait()

    @torch.inference_mode()
    def launch(self, logits: torch.Tensor, sequences: Seq[Sequence]) -> Tokens:
        """A token id and, where asked for, its log-probabilities for each row of `logits` [B, V] (fp32).

        The id is NOT_FINITE for a row that holds NaN or infinity: no token can be told from it. It is NOT_READY where a
        grammar does not say in time which tokens may come: sample the row in a later step. A row's result does not
        depend on the others, so any part of a batch may be sampled again by itself. Nothing waits for a GPU.
        """
        late = _late(sequences)
        if logits.is_cuda:
            return self._launch_on_device(logits, sequences, late)
        step = _rows_at_once(sequences)
        chosen = torch.empty(len(sequences), dtype=torch.int64)
        logprobs: list[TokenLogprobs | None] = []
        for at in range(0, len(sequences), step):
            rows = slice(at, at + step)
            adjusted = self._adjust(logits[rows], sequences[rows], late)
            chosen[rows] = _choose(adjusted, sequences[rows])
            logprobs += _logprobs(logits[rows], chosen[rows], sequences[rows])
        if late:
            chosen[[row for row, sequence in enumerate(sequences) if sequence in late]] = NOT_READY
        return HostTokens(chosen.where(logits.sum(dim=-1).isfinite(), NOT_FINITE).tolist(), logprobs)

    def _launch_on_device(
        self, logits: torch.Tensor, sequences: Seq[Sequence], late: Collection[Sequence]
    ) -> DeviceTokens:
        """All rows at once."""
        params = [sequence.request.sampling for sequence in sequences]
        chosen = choose(self._adjust(logits, sequences, late), params, _uniforms(sequences))
        not_ready = [row for row, sequence in enumerate(sequences) if sequence in late]
        return DeviceTokens(logits, chosen, [p.logprobs for p in params], not_ready)

    def _adjust(self, logits: torch.Tensor, sequences: Seq[Sequence], late: Collection[Sequence]) -> torch.Tensor:
        """`logits` with penalties, biases, grammars and the masks of `min_tokens`, in this order."""
        adjusted = {
            row: _adjustments(sequence, logits.shape[1])
            for row, sequence in enumerate(sequences)
            if has_adjustments(sequence.request.sampling)
        }
        masks = {
            row: mask
            for row, sequence in enumerate(sequences)
            if sequence.grammar is not None and sequence not in late and (mask := sequence.grammar.mask) is not None
        }
        if not (adjusted or masks or any(map(_never_ends, sequences))):
            return logits
        logits = logits.clone(memory_format=torch.contiguous_format)
        wishes = [(row, _wishes(adjusted.get(row), masks.get(row))) for row in adjusted.keys() | masks.keys()]
        if wishes and (logits.is_cuda or not jit.AVAILABLE):
            device_adjust.adjust(logits, wishes)
        elif wishes:
            compiled_adjust.adjust(logits.numpy(), wishes)
        self._hold_open(logits, sequences, adjusted)
        return logits

    def _hold_open(self, logits: torch.Tensor, sequences: Seq[Sequence], adjusted: dict[int, Adjustments]) -> None:
        """Change `logits` [B, V] in place: nothing may end a sequence before `min_tokens`.

        Within a grammar nothing may follow an end of sequence, so `ignore_eos` rules it out too; and where a grammar
        allows only an end, the grammar wins.
        """
        ends: list[NDArray[np.int64]] = []
        for row, sequence in enumerate(sequences):
            sampling = sequence.request.sampling
            is_short = sequence.num_output_tokens < sampling.min_tokens
            if is_short or _never_ends(sequence):
                ends.append(_flat(logits, row, self._eos_token_ids))
                if is_short:
                    ends.append(_flat(logits, row, adjusted[row].stop_ids))
        if not ends:
            return
        places, constrained = upload(
            [np.concatenate(ends), np.array([sequence.grammar is not None for sequence in sequences])], logits.device
        )
        flat = logits.view(-1)
        if all(sequence.grammar is None for sequence in sequences):
            flat.index_fill_(0, places, float("-inf"))
            return
        before = flat.index_select(0, places)
        flat.index_fill_(0, places, float("-inf"))
        is_over = constrained & (logits.amax(dim=-1) == float("-inf"))  # [B]
        of_places = is_over.index_select(0, places.div(logits.shape[1], rounding_mode="floor"))
        flat.index_copy_(0, places, torch.where(of_places, before, float("-inf")))


def _late(sequences: Seq[Sequence]) -> set[Sequence]:
    """Those whose grammar does not say yet which tokens may come."""
    deadline = time.monotonic() + _GRACE_S
    return {
        sequence
        for sequence in sequences
        if sequence.grammar is not None and not sequence.grammar.is_ready(max(0.0, deadline - time.monotonic()))
    }


def _rows_at_once(sequences: Seq[Sequence]) -> int:
    if all(_is_plain(sequence) for sequence in sequences):
        return max(1, len(sequences))
    return _ROWS_AT_ONCE


def _is_plain(sequence: Sequence) -> bool:
    """Greedy, and nothing else is wished."""
    sampling = sequence.request.sampling
    return (
        sequence.grammar is None
        and sampling.temperature < GREEDY_BELOW
        and sampling.logprobs is None
        and not has_adjustments(sampling)
    )


def _choose(logits: torch.Tensor, sequences: Seq[Sequence]) -> torch.Tensor:
    """Token ids [B], the likeliest or drawn, from adjusted `logits` [B, V]."""
    drawn = [row for row, sequence in enumerate(sequences) if sequence.request.sampling.temperature >= GREEDY_BELOW]
    if drawn and len(drawn) == len(sequences):
        return _draw(logits, sequences)
    chosen = _likeliest(logits)
    if drawn:
        chosen[drawn] = _draw(logits[drawn], [sequences[row] for row in drawn])
    return chosen


def _likeliest(logits: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(logits.numpy().argmax(axis=-1))  # a tenth of torch's time


def _never_ends(sequence: Sequence) -> bool:
    """Whether an end of sequence is ruled out: within a grammar nothing may follow one."""
    return sequence.grammar is not None and sequence.request.sampling.ignore_eos


def _adjustments(sequence: Sequence, vocab_size: int) -> Adjustments:
    """Of a sequence, up to date."""
    if sequence.adjustments is None:
        sequence.adjustments = Adjustments(sequence.request, vocab_size)
    sequence.adjustments.catch_up(sequence.token_ids)
    return sequence.adjustments


def _wishes(adjustments: Adjustments | None, mask: NDArray[np.uint8] | None) -> Wishes:
    if adjustments is None:
        return Wishes(mask=mask)
    return Wishes(
        divisors=adjustments.divisors,
        is_reward=adjustments.repetition_penalty < 1.0,
        penalties=adjustments.penalties,
        bias_ids=adjustments.bias_ids,
        bias=adjustments.bias,
        mask=mask,
    )


def _draw(logits: torch.Tensor, sequences: Seq[Sequence]) -> torch.Tensor:
    """Sample token ids [B] from `logits` [B, V] by temperature and filters."""
    params = [sequence.request.sampling for sequence in sequences]
    temperature = torch.tensor([p.temperature for p in params])[:, None]
    probabilities = (logits / temperature).softmax(dim=-1)  # [B, V]
    if probabilities[:, 0].isnan().any():  # then the whole row is
        probabilities.nan_to_num_(0.0)
    return draw(probabilities, params, _uniforms(sequences))


def _uniforms(sequences: Seq[Sequence]) -> list[float]:
    """The number of each one's next token."""
    return [uniform(s.request.seed, s.request.choice_index, s.num_output_tokens) for s in sequences]


def _flat(logits: torch.Tensor, row: int, token_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where the tokens of a row are in the flat `logits`."""
    return token_ids + row * logits.shape[1]


def _logprobs(logits: torch.Tensor, chosen: torch.Tensor, sequences: Seq[Sequence]) -> list[TokenLogprobs | None]:
    """Log-probabilities of `chosen` [B] under the raw `logits` [B, V], for the rows that ask for them."""
    result: list[TokenLogprobs | None] = [None] * len(sequences)
    asked = [row for row, sequence in enumerate(sequences) if sequence.request.sampling.logprobs is not None]
    if not asked:
        return result
    counts = [sequences[row].request.sampling.logprobs or 0 for row in asked]
    if len(asked) < len(sequences):
        logits, chosen = logits[asked], chosen[asked]
    for row, logprobs in zip(asked, token_logprobs(logits, chosen.tolist(), counts), strict=True):
        result[row] = logprobs
    return result
