"""Small tokenizers of every kind that checkpoints have, all with the same control tokens, and templates for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = ["Hello, my name is Manta. user system assistant tool", "le fromage français INST im start end think"] * 4
SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<|im_start|>", "<|im_end|>", "[TOOL_RESULTS]", "<|user|>"]
ADDED = [  # no special ones
    AddedToken("<think>", normalized=False),
    AddedToken("</think>", normalized=False),
    AddedToken("[TOOL_CALLS]", normalized=False),
    AddedToken("[AVAILABLE_TOOLS]", normalized=True),
    AddedToken("<mask>", lstrip=True, rstrip=True, normalized=False),
    AddedToken("<s>[INST]", normalized=False),  # longer than one that the template writes
    AddedToken("QUERY", single_word=True, normalized=False),
]
CONTROL = [*SPECIAL, *(token.content for token in ADDED)]
SPACES = AddedToken("    ", normalized=False)  # what GPT-NeoX's kind has: text, in a token of its own


def byte_level(*, add_prefix_space: bool = False) -> Tokenizer:
    """As Llama 3 and Qwen have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece(*, is_legacy: bool = True) -> Tokenizer:
    """As Mixtral has it, by a normalizer, and as later conversions have it, by a pre-tokenizer."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL + byte_tokens, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    if is_legacy:
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _without(tokenizer, byte_tokens)


def unigram() -> Tokenizer:
    """As T5 has it: the model itself makes a piece of a text that spells one, also of a control token's."""
    pieces = [(token, 0.0) for token in SPECIAL] + [(char, -5.0) for char in "▁<>[]|/_" + "".join(set("".join(CORPUS)))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "byte level with a space": lambda: byte_level(add_prefix_space=True),
    "sentencepiece": sentencepiece,
    "metaspace": lambda: sentencepiece(is_legacy=False),
    "unigram": unigram,
}

MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}"
    "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROLES_IN_TOKENS = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endfor %}"
THINKING = (
    "{% macro shown(content) %}{{ content | trim }}{% endmacro %}"
    "{% for m in messages %}{% set content = shown(m.content) %}"
    "{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last or loop.index == loop.length - 1 %}"
    "{% set content = '<think>\n' + thought + '\n</think>\n\n' + content %}{% endif %}"
    "{% endif %}{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)
TOOLS = (
    "{{ bos_token }}{% if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{% if m['tool_calls'] %}"
    "{% for c in m['tool_calls'] %}[TOOL_CALLS]{{ c.function.name }}{{ c.function.arguments | tojson }}{{ c.id }}"
    "{% endfor %}{{ eos_token }}"
    "{% elif m['role'] == 'tool' %}[TOOL_RESULTS]{{ m.name }}{{ m['content'] }}{{ m['tool_call_id'] }}"
    "{% elif m['role'] == 'user' %}[INST]{{ m['content'] }}[/INST]"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


def write(directory: Path, kind: str, template: str, special: Sequence[str] = ()) -> Path:
    """A tokenizer of one of KINDS, as transformers saves it; `special` are more special tokens."""
    rust = KINDS[kind]()
    rust.add_special_tokens([*SPECIAL, *special])
    rust.add_tokens([AddedToken(token, special=False, normalized=False) for token in ("[INST]", "[/INST]")])
    rust.add_tokens([*ADDED, SPACES])
    fast = PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = template
    fast.save_pretrained(str(directory))
    return directory


def _without(tokenizer: Tokenizer, tokens: list[str]) -> Tokenizer:
    """The byte tokens are pieces of the model, and no added tokens."""
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] not in tokens]
    return Tokenizer.from_str(json.dumps(document))
