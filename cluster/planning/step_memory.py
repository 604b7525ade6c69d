"""How much memory a step of a coordinator takes beside weights and KV cache. An upper bound, by arithmetic; no torch.

Shapes: B sequences, T tokens of the step, S longest context, V vocabulary, D hidden size, N query heads, G key-value
heads, H head_dim, K experts per token, F width of a feed-forward network.
"""

from __future__ import annotations

from cluster.checkpoint.architecture import Architecture
from cluster.planning.placement import DTYPE_BYTES, Dtype, KvDtype, kv_bytes_per_token

GATHER_BYTES = 2**30  # of keys and values that decoding sequences read at once, if one context alone is not longer
MAX_SCORES = 2**24  # of attention in memory at once, where they are there at all, if those of one token are not more
SCORE_COPIES = 4  # of each: as computed, with a sink beside, as a share, and as that is multiplied with values
INDEX_SCORE_BYTES = 8  # of an indexer's score of one of its heads, in fp32: as multiplied, and scaled
INDEX_PAIR_BYTES = 20  # of a row and a key, all heads together: their sum, masked, and sorted with its index
PARTIAL_BYTES = 2**24  # of what splits of long contexts make before it is added up
SCORED_ROWS = 256  # of a prompt's logits in memory at once
SCORED_LOGIT_BYTES = 12  # of one of these: as computed, in fp32, as logarithm of a probability
SAMPLED_LOGIT_BYTES = 32  # of one that is sampled from: the same, adjusted, as probability, sorted with its index
GRAPH_BYTES = 2**24  # what CUDA keeps of a captured step: some kilobytes a launch, by what others tell; not measured


def graph_sizes(most: int) -> list[int]:
    """Batch sizes whose steps are captured: 1, 2, 4, 8, 16, 24, 32, 48, 64, … and `most`, which all others fit."""
    below = [1, 2, 4, *range(8, 33, 8), *range(48, most, 16)]
    return [*(size for size in below if size < most), most]


def max_gathered_tokens(architecture: Architecture, item_bytes: int) -> int:
    """Tokens whose keys and values of one layer are GATHER_BYTES, numbers having `item_bytes`."""
    return GATHER_BYTES // (2 * architecture.num_kv_heads * architecture.head_dim * item_bytes)


def step_bytes(
    architecture: Architecture,
    dtype: Dtype,
    *,
    kv_dtype: KvDtype | None = None,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int,
    local_experts: bool = False,
    gathers: bool = True,
) -> int:
    """The most that a step allocates. `local_experts`: they are computed in the same process.

    `gathers`: attention copies what it reads of the cache; else it reads the pages where they lie. `kv_dtype`: what the
    cache is kept in; None: `dtype`.
    """
    a, item = architecture, DTYPE_BYTES[dtype]
    sequences, tokens, context = min(max_num_seqs, max_num_batched_tokens), max_num_batched_tokens, max_model_len
    padded = sequences * context  # B · S
    attention = 4 * padded + 8 * tokens  # block tables, at one token a block, and slots that are written
    if gathers:
        seen = min(context, a.sliding_window or context)
        gathered = max(seen, min(sequences * seen, max_gathered_tokens(a, item)))
        each = kv_bytes_per_token(a, dtype) // a.num_layers  # keys and values of one layer
        if kv_dtype == "int8":  # as they are kept, and made numbers of
            each += (kv_bytes_per_token(a, kv_dtype) + 2 * kv_bytes_per_token(a, "float32")) // a.num_layers
        attention += _scoring_bytes(a, dtype, tokens, seen, gathered, each) if a.has_scores else gathered * each
        if a.index_heads:
            attention += 2 * tokens * context  # what it lets tokens see, as it is told and for all of them
        # Slots and masks of decodes [B, S]; masks of prefills [T, S], true or false, then as what is added to scores.
        attention += padded * (8 + 1 + item) + tokens * context * (2 + item)
    else:
        attention += PARTIAL_BYTES
    logits = a.vocab_size * (sequences * SAMPLED_LOGIT_BYTES + SCORED_ROWS * SCORED_LOGIT_BYTES)
    width = 16 * a.hidden_size + 4 * (a.num_heads + 2 * a.num_kv_heads) * a.head_dim
    if not a.is_dense:
        width += 4 * a.top_k * a.hidden_size  # rows to the experts and back
    width += 4 * max(layer.dense_size for layer in a.layers)
    if local_experts:
        width += 4 * a.top_k * a.intermediate_size
    return attention + logits + tokens * width * item


def _scoring_bytes(a: Architecture, dtype: Dtype, tokens: int, seen: int, gathered: int, each: int) -> int:
    """Of attention that has scores, or of an indexer, which comes before it: of a prompt's part or of decodes, which
    come one after the other. `each`: of the keys and values of a token.
    """
    heads = max(a.num_heads, a.index_heads)
    gathered = max(seen, min(gathered, MAX_SCORES // heads))

    def most(heads: int, of_token: int, of_pair: int) -> int:
        pairs = min(tokens * seen, max(MAX_SCORES // heads, seen))  # rows of a prompt's part times keys, at once
        return max(seen * of_token + pairs * of_pair, gathered * (of_token + of_pair))

    of_row = kv_bytes_per_token(a, dtype) // a.num_layers
    if a.widened:  # in fp32, whatever they are in
        copies = each + 4 * a.widened + (0 if dtype == "float32" else 2 * of_row)
        of_score = SCORE_COPIES * 4
    else:
        copies, of_score = each + of_row, SCORE_COPIES * DTYPE_BYTES[dtype]
    of_attention = most(a.num_heads, copies, a.num_heads * of_score)
    if not a.index_heads:
        return of_attention
    return max(of_attention, most(a.index_heads, each, INDEX_SCORE_BYTES * a.index_heads + INDEX_PAIR_BYTES))


def graph_bytes(
    architecture: Architecture, dtype: Dtype, *, max_num_seqs: int, max_model_len: int, local_experts: bool
) -> int:
    """What captured steps keep: memory for the largest, which they share, and the graphs."""
    largest = step_bytes(
        architecture,
        dtype,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs,
        max_model_len=max_model_len,
        local_experts=local_experts,
        gathers=False,
    )
    return largest + GRAPH_BYTES * len(graph_sizes(max_num_seqs))
