"""Trains the tokenizer: byte-level BPE, so that any text comes back as it was. Knows nothing of the model.

The first five ids are those of Mistral's own tokenizers: <unk>, <s>, </s>, [INST] and [/INST]. Digits stand alone.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB_SIZE = 2048
CONTEXT = 32768
UNK, BOS, EOS = "<unk>", "<s>", "</s>"
BOS_ID, EOS_ID = 1, 2
CONTROL = ("[INST]", "[/INST]")


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Trains the merges on the texts. The same texts in the same order give the same tokenizer."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[UNK, BOS, EOS, *CONTROL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # [INST] is no special token: a text that quotes it keeps it when special tokens are left out of the decoded text.
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in CONTROL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes `tokenizer.json` and the `tokenizer_config.json` that transformers expects beside it."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": CONTEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNK,
    }
    text = json.dumps(config, indent=2) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
