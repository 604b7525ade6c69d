"""Texts that hold a control token are refused where a template's own cannot be told, at a cost that has a bound."""

from __future__ import annotations

import time

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel

from cluster.errors import InvalidRequest
from gateway.text.control_tokens import _PIECE, ControlTokens


def control_tokens(number: int) -> ControlTokens:
    """Many models have hundreds that nothing uses yet."""
    tokenizer = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    texts = ["</s>", "<s>", "[INST]", "[INST]!", *(f"<|reserved_{i}|>" for i in range(number))]
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in texts])
    return ControlTokens(tokenizer)


@pytest.mark.parametrize("token", ["</s>", "[INST]", "<|reserved_7|>", "<|reserved_77|>", "<|reserved_399|>"])
@pytest.mark.parametrize("at", [0, 5, _PIECE - 1, _PIECE - 3, 3 * _PIECE - 8])
def test_a_text_that_holds_one_is_refused_wherever_it_is(token, at):
    tokens = control_tokens(400)
    text = "<" * at + token + "|reserved_"
    for value in (text, ["x", {"key": [text]}], {text: 1}):
        with pytest.raises(InvalidRequest) as refused:
            tokens.refuse(value, "messages")
        assert repr(token) in refused.value.message
        assert refused.value.param == "messages"


def test_other_texts_are_not():
    tokens = control_tokens(400)
    tokens.refuse(["<|reserved_400|>", "<|reserved_7", "</ s>", "[INST", "", 7, None, True, 1.5], "messages")


def test_the_cost_does_not_grow_with_the_number_of_control_tokens():
    """Each was looked for by itself: a text of eight million characters took seconds, in which nothing else ran."""
    few, many = control_tokens(4), control_tokens(1000)
    for text in ("<|reserved_" * 50_000, "plain words " * 50_000):
        times = []
        for _ in range(3):
            started = time.thread_time()
            few.refuse(text, "messages")
            between = time.thread_time()
            many.refuse(text, "messages")
            times.append((between - started, time.thread_time() - between))
        assert min(of_many for _, of_many in times) < 10 * min(of_few for of_few, _ in times) + 0.005
