"""Trains the demo model from nothing: `python -m cluster.demo_model.train --out DIR`.

Recipe: a BPE tokenizer trained on the corpus; then AdamW on conversations that are put together at random (other
wordings, slips of the keys, system prompts, one to eight turns, unknown questions), with the loss on the answers only
and the load-balancing loss of Mixtral; a few plain sentences too, so that raw completion gives words. The weights are
then rounded to bfloat16 and the answer to every wording is checked in fp32 and in bf16 arithmetic; while one is wrong,
training goes on with a larger share of those that were. All seeds are fixed: the same machine, versions and threads
give the same weights.

Measured on one core of an AMD EPYC, shared with other work: 0.7 s a step, 660 s for the 900 steps, about 80 s a round.
The shipped weights come out of several sittings, because the rounds of repair were tuned while they ran. One run of
this script from start to end, on a busy machine, took 13 minutes for the steps and had 68 of the 2915 wordings wrong
before the first round of repair, 17 after the third, and 4 or 5 after the sixth and seventh; the shipped weights: 1.
"""

import argparse
import math
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import GenerationConfig, MixtralConfig, MixtralForCausalLM

from cluster.demo_model import DIRECTORY
from cluster.demo_model.corpus import Entry, entries, texts
from cluster.demo_model.tokenizer import BOS_ID, CONTEXT, EOS_ID, VOCAB_SIZE, save_tokenizer, train_tokenizer
from cluster.demo_model.variations import Message, conversation

IGNORE = -100
BATCH_TOKENS = 4096  # padding included
LEARNING_RATE = 3e-3
REPAIR_LEARNING_RATE = 5e-4
REPAIR_STEPS = 100
REPAIR_SHARE = 0.15  # of the pool, in addition to it
REPAIR_ROUNDS = 8
CHECK_BATCH = 48
WARMUP_STEPS = 50
BALANCE_COEFFICIENT = 0.01
PLAIN_SHARE = 0.03
JITTER = 0.01  # noise on the experts' input: the answer must not hang on one rounding
TURNS = {1: 0.62, 2: 0.2, 3: 0.11, 5: 0.06, 8: 0.01}  # how many, and how often
PLAIN = (
    "Hello my name is Manta, and I am a small demo model. I answer everyday questions in five languages.",
    "My name is Manta. I was trained on a few hundred sentences.",
    "Once upon a time, a young manta ray lived in a warm blue bay. Every night she watched the lights of the boats.",
)


@dataclass(frozen=True)
class Sample:
    """A token sequence and, at each position, the token that must come next or IGNORE."""

    token_ids: list[int]
    labels: list[int]


def encode(messages: Sequence[Message], tokenizer: Tokenizer) -> Sample:
    """Encodes a conversation as the chat template renders it; only answers and their </s> carry a label."""
    token_ids, labels, system = [BOS_ID], [IGNORE], ""
    for message in messages:
        if message["role"] == "system":
            system = message["content"] + "\n\n"
        elif message["role"] == "user":
            asked = tokenizer.encode(f"[INST] {system}{message['content']} [/INST]", add_special_tokens=False).ids
            token_ids += asked
            labels += [IGNORE] * len(asked)
            system = ""
        else:
            answer = [*tokenizer.encode(message["content"], add_special_tokens=False).ids, EOS_ID]
            token_ids += answer
            labels += answer
    return Sample(token_ids[:-1], labels[1:])


def encode_plain(text: str, tokenizer: Tokenizer) -> Sample:
    """Encodes a plain text, of which every token carries a label."""
    token_ids = [*tokenizer.encode(text).ids, EOS_ID]
    return Sample(token_ids[:-1], token_ids[1:])


def samples(pool: Sequence[Entry], tokenizer: Tokenizer, rng: random.Random) -> Iterator[Sample]:
    """Yields samples without end."""
    turns, weights = list(TURNS), list(TURNS.values())
    while True:
        if rng.random() < PLAIN_SHARE:
            entry = rng.choice(pool)
            text = rng.choice((*PLAIN, f"{entry.questions[0]} {entry.answer}"))
            yield encode_plain(text, tokenizer)
        else:
            yield encode(conversation(pool, rng, rng.choices(turns, weights)[0]), tokenizer)


def batches(pool: Sequence[Entry], tokenizer: Tokenizer, rng: random.Random) -> Iterator[list[Sample]]:
    """Yields batches of BATCH_TOKENS, each of samples of about one length."""
    source = samples(pool, tokenizer, rng)
    while True:
        drawn = sorted((next(source) for _ in range(1200)), key=lambda sample: len(sample.token_ids))
        full: list[list[Sample]] = [[]]
        for sample in drawn:
            if (len(full[-1]) + 1) * len(sample.token_ids) > BATCH_TOKENS and full[-1]:
                full.append([])
            full[-1].append(sample)
        rng.shuffle(full)
        yield from full


def tensors(batch: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pads on the right, where causal attention never looks. Returns token ids, labels and the mask, each [B, T]."""
    length = max(len(sample.token_ids) for sample in batch)
    token_ids = torch.zeros(len(batch), length, dtype=torch.long)
    labels = torch.full((len(batch), length), IGNORE)
    mask = torch.zeros(len(batch), length, dtype=torch.bool)
    for row, sample in enumerate(batch):
        token_ids[row, : len(sample.token_ids)] = torch.tensor(sample.token_ids)
        labels[row, : len(sample.labels)] = torch.tensor(sample.labels)
        mask[row, : len(sample.token_ids)] = True
    return token_ids, labels, mask


def balance_loss(router_logits: Sequence[torch.Tensor], mask: torch.Tensor, top_k: int) -> torch.Tensor:
    """Returns the load-balancing loss (Switch Transformer, equation 4), one layer at a time; 1 when all is even."""
    losses = []
    for logits in router_logits:  # [B*T, E]
        probabilities = logits[mask.flatten()].float().softmax(-1)  # [N, E]
        chosen = F.one_hot(probabilities.topk(top_k).indices, logits.shape[-1]).sum(1).float()  # [N, E]
        losses.append((chosen.mean(0) / top_k * probabilities.mean(0)).sum() * logits.shape[-1])
    return torch.stack(losses).mean()


def new_model() -> MixtralForCausalLM:
    """Returns the model with fresh weights: 4 layers, 8 experts of which 2 work, 128 wide, 3.9 M parameters."""
    config = MixtralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        initializer_range=0.04,
        router_jitter_noise=JITTER,
        tie_word_embeddings=False,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    model = MixtralForCausalLM(config)
    model.set_experts_implementation("eager")  # on one core faster than grouped_mm, and batched_mm is 40 times slower
    return model


class Trainer:
    """One model and its optimizer; a call of `run` is one schedule of the learning rate, down to zero."""

    def __init__(self, model: MixtralForCausalLM) -> None:
        self.model = model
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)

    def run(self, source: Iterator[list[Sample]], steps: int, learning_rate: float) -> None:
        """Trains for the given steps: warm-up, then a cosine."""
        self.model.train()
        started = time.monotonic()
        for step in range(steps):
            warm = min(1.0, (step + 1) / WARMUP_STEPS)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate * warm * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
            loss, balance = self.losses(next(source))
            (loss + BALANCE_COEFFICIENT * balance).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if step % 50 == 0 or step == steps - 1:
                passed = time.monotonic() - started
                print(
                    f"step {step:5d}  loss {loss.item():.4f}  balance {balance.item():.3f}  {passed:5.0f} s", flush=True
                )

    def losses(self, batch: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the mean loss of the labelled positions, and the load-balancing loss."""
        token_ids, labels, mask = tensors(batch)
        out = self.model.model(token_ids, output_router_logits=True, use_cache=False)
        wanted = labels != IGNORE
        logits = self.model.lm_head(out.last_hidden_state[wanted])  # [N, V]
        balance = balance_loss(out.router_logits, mask, self.model.config.num_experts_per_tok)
        return F.cross_entropy(logits, labels[wanted]), balance


@torch.no_grad()
def wrong(model: MixtralForCausalLM, tokenizer: Tokenizer, pool: Sequence[Entry]) -> tuple[list[Entry], float]:
    """Returns the entries whose answer greedy decoding would miss, and the least probability of a right token.

    Each answer is given to the model, which must rank each of its tokens first after those before: as decoding does.
    """
    model.eval()
    missed, least = [], 1.0
    for start in range(0, len(pool), CHECK_BATCH):
        asked = pool[start : start + CHECK_BATCH]
        token_ids, labels, _ = tensors([encode(chat(entry), tokenizer) for entry in asked])
        wanted = labels != IGNORE
        logits = model.lm_head(model.model(token_ids, use_cache=False).last_hidden_state[wanted]).float()  # [N, V]
        rows = wanted.nonzero()[:, 0]  # [N], the entry of each token
        failed = set(rows[logits.argmax(-1) != labels[wanted]].tolist())
        missed += [entry for row, entry in enumerate(asked) if row in failed]
        least = min(least, float(logits.softmax(-1).gather(1, labels[wanted][:, None]).min()))
    return missed, least


def chat(entry: Entry) -> list[Message]:
    """Returns the entry's first question and its answer."""
    return [{"role": "user", "content": entry.questions[0]}, {"role": "assistant", "content": entry.answer}]


def round_weights(model: MixtralForCausalLM) -> None:
    """Rounds every weight to bfloat16, which is how they are saved."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())


def faults(model: MixtralForCausalLM, tokenizer: Tokenizer, pool: Sequence[Entry]) -> list[Entry]:
    """Rounds the weights, and returns the entries that are wrong in fp32 or in bf16 arithmetic."""
    round_weights(model)
    missed, least = wrong(model, tokenizer, pool)
    missed_bf16, least_bf16 = wrong(model.bfloat16(), tokenizer, pool)
    model.float()
    print(f"wrong: {len(missed)} of {len(pool)} in fp32, {len(missed_bf16)} in bf16; ", end="")
    print(f"least probability {least:.3f}, {least_bf16:.3f}", flush=True)
    print("wrong:", [entry.questions[0] for entry in missed][:10], flush=True)
    return [entry for entry in pool if entry in missed or entry in missed_bf16]


def save(model: MixtralForCausalLM, tokenizer: Tokenizer, directory: Path) -> None:
    """Writes everything that transformers and Manta read; the weights in bfloat16."""
    directory.mkdir(parents=True, exist_ok=True)
    model.config.router_jitter_noise = 0.0
    model.generation_config = GenerationConfig(
        bos_token_id=BOS_ID, eos_token_id=EOS_ID, do_sample=True, temperature=0.3, top_p=0.9, max_new_tokens=256
    )
    model.bfloat16().save_pretrained(directory)
    model.float()
    save_tokenizer(tokenizer, directory)
    template = DIRECTORY / "chat_template.jinja"
    if directory.resolve() != DIRECTORY.resolve():
        shutil.copy(template, directory)


def main() -> None:
    """Trains and saves; fails if an answer is still wrong in the end."""
    parser = argparse.ArgumentParser(description="Train Manta's demo model.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)
    started = time.monotonic()

    # Every wording counts as much as any other: greetings have many, and they are what people type first.
    pool = [entry for entry in entries() for _ in entry.questions]
    wordings = [Entry(entry.language, (asked,), entry.answer) for entry in entries() for asked in entry.questions]
    tokenizer = train_tokenizer(texts())
    trainer = Trainer(new_model())
    trainer.run(batches(pool, tokenizer, rng), arguments.steps, LEARNING_RATE)
    left = faults(trainer.model, tokenizer, wordings)
    save(trainer.model, tokenizer, arguments.out)
    suspects: list[Entry] = []
    for _ in range(REPAIR_ROUNDS):
        if not left:
            break
        # What was wrong once stays in the extra share, and that is small: else one is mended and its neighbour breaks.
        suspects += [entry for entry in left if entry not in suspects]
        weighted = [*pool, *suspects * max(1, int(REPAIR_SHARE * len(pool) / len(suspects)))]
        trainer.run(batches(weighted, tokenizer, rng), REPAIR_STEPS, REPAIR_LEARNING_RATE)
        left = faults(trainer.model, tokenizer, wordings)
        save(trainer.model, tokenizer, arguments.out)
    print(f"saved to {arguments.out} after {time.monotonic() - started:.0f} s")
    if left:
        raise SystemExit(f"{len(left)} wordings are still answered wrongly, the first: {left[0].questions[0]!r}")


if __name__ == "__main__":
    main()
