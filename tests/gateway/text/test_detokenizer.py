"""Pieces joined are the whole text, and no piece splits a character, over every kind of text and of ids."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import mistral_common
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.decoders import DecodeStream

from cluster.errors import InvalidRequest
from gateway.text.detokenizer import Detokenizer, detokenize
from gateway.text.stop_strings import StopStrings
from gateway.text.tokenizer import HuggingFaceTokenizer, MistralTokenizer, Tokenizer
from tests.gateway.doubles import write_tokenizer

TEXTS = st.text(
    st.one_of(
        st.sampled_from("👩‍🚀🇫🇷👨‍👩‍👧é 你好ñ́한"),
        st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"),
        st.sampled_from("ab \n"),
    ),
    max_size=40,
).filter(lambda text: "s>" not in text)  # the text of a special token is that token
MISTRAL_DATA = Path(mistral_common.__file__).parent / "data"


@pytest.fixture(
    scope="module", params=["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3", "tekken_240718.json"]
)
def mistral(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MistralTokenizer:
    directory = tmp_path_factory.mktemp("mistral")
    name = "tekken.json" if "tekken" in request.param else "tokenizer.model." + request.param.rpartition(".")[2]
    (directory / name).symlink_to(MISTRAL_DATA / request.param)
    return MistralTokenizer(directory)


def pieces(tokenizer: Tokenizer, ids: list[int], context: tuple[int, ...] = ()) -> list[str]:
    detokenizer = Detokenizer(tokenizer, context)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_streamed_text_is_the_text(tokenizer: HuggingFaceTokenizer, text: str) -> None:
    ids = list(tokenizer.encode(text))
    streamed = pieces(tokenizer, ids)
    assert "".join(streamed) == text
    assert not any("\ufffd" in piece for piece in streamed)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_streamed_text_is_the_text_for_mistral(mistral: MistralTokenizer, text: str) -> None:
    ids = list(mistral.encode(text))
    streamed = pieces(mistral, ids)
    whole = mistral.decode(ids)
    assert "".join(streamed) == whole
    if "\ufffd" not in whole:
        assert not any("\ufffd" in piece for piece in streamed)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(0, 340), max_size=80))
def test_any_ids_at_all(tokenizer: HuggingFaceTokenizer, ids: list[int]) -> None:
    shown = [i for i in ids if i not in tokenizer.special_ids and i < tokenizer.vocab_size]
    whole = tokenizer.decode(shown)
    streamed = "".join(pieces(tokenizer, ids))
    assert detokenize(tokenizer, ids) == whole
    assert streamed.replace("\ufffd", "") == whole.replace("\ufffd", "")
    if len(shown) < 32:
        assert streamed == whole


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=TEXTS.filter(bool), text=TEXTS)
def test_text_goes_on_from_a_prompt(tokenizer: HuggingFaceTokenizer, prompt: str, text: str) -> None:
    context = tokenizer.encode(prompt)
    ids = list(tokenizer.encode(text))[1:]
    assert "".join(pieces(tokenizer, ids, context)) == text


def test_a_sentencepiece_output_keeps_its_space_only_after_a_prompt(mistral: MistralTokenizer) -> None:
    last = list(mistral.encode("a b")[-1:])
    assert "".join(pieces(mistral, last)) == mistral.decode(last)  # tekken keeps every space
    assert "".join(pieces(mistral, last, mistral.encode("a"))) == " b"


class CountingTokenizer:
    """Counts the ids that are decoded."""

    def __init__(self, inner: Tokenizer) -> None:
        self._inner = inner
        self.vocab_size, self.special_ids = inner.vocab_size, inner.special_ids
        self.max_token_chars, self.begin_ids = inner.max_token_chars, inner.begin_ids
        self.encode, self.encode_chat, self.token_bytes = inner.encode, inner.encode_chat, inner.token_bytes
        self.piece = inner.piece
        self.decoded = 0

    def decode(self, token_ids: Sequence[int]) -> str:
        self.decoded += len(token_ids)
        return self._inner.decode(token_ids)


@pytest.mark.parametrize("text", ["Hello, my name is ", "你好 👩‍🚀 "])
def test_a_token_costs_the_same_at_any_length(tokenizer: HuggingFaceTokenizer, text: str) -> None:
    counting = CountingTokenizer(tokenizer)
    ids = list(tokenizer.encode(text * 500))
    assert "".join(pieces(counting, ids)) == text * 500
    assert counting.decoded < 10 * len(ids)


def test_bytes_that_are_no_text_cost_the_same_too(tokenizer: HuggingFaceTokenizer) -> None:
    counting = CountingTokenizer(tokenizer)
    [lone_byte] = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"\xff"]
    assert "".join(pieces(counting, [lone_byte] * 2000)) == "\ufffd" * 2000
    assert counting.decoded < 40 * 2000


def test_an_output_that_ends_inside_a_character_keeps_its_end(tokenizer: HuggingFaceTokenizer) -> None:
    """The stream of the library itself shows nothing of it: when this fails, it may serve us."""
    *ids, _ = tokenizer.encode("a🚀")
    assert pieces(tokenizer, ids)[-1] == "\ufffd"
    stream = DecodeStream(skip_special_tokens=True)
    assert [stream.step(tokenizer._rust._rust, i) for i in ids][-1] is None


@settings(max_examples=500, deadline=None)
@given(
    chunks=st.lists(st.text("abS", max_size=4), max_size=12),
    stop=st.lists(st.text("abS", min_size=1, max_size=4), max_size=3),
)
def test_streamed_text_is_cut_at_the_first_match(chunks: list[str], stop: list[str]) -> None:
    whole = "".join(chunks)
    at = min((i for text in stop if (i := whole.find(text)) >= 0), default=len(whole))
    checker = StopStrings(stop)
    sent = "".join(checker.push(chunk) for chunk in chunks) + checker.flush()
    assert sent == whole[:at]
    assert checker.is_stopped() == (
        at < len(whole) or any(text and whole.endswith(text) for text in stop if text in whole)
    )


def test_only_a_possible_beginning_is_held_back() -> None:
    checker = StopStrings(["STOP"])
    assert [checker.push(piece) for piece in ("go S", "T", "ay", " ST", "OP and on", "never")] == [
        "go ",
        "",
        "STay",
        " ",
        "",
        "",
    ]
    assert checker.is_stopped()


def test_a_character_costs_the_same_however_long_the_stop_strings_are() -> None:
    """Sixteen of 256 characters, each nearly what the text is, took sixty times as long; on the event loop."""

    def seconds(stop: list[str]) -> float:
        strings = StopStrings(stop)
        start = time.thread_time()
        for _ in range(600):
            strings.push("a")
        return time.thread_time() - start

    short, long = [f"{i:02}" for i in range(16)], [f"b{'a' * 253}{i:02}" for i in range(15)] + ["a" * 255 + "b"]
    assert min(seconds(long) for _ in range(3)) < 15 * min(seconds(short) for _ in range(3))


def test_huggingface_encodes_as_transformers_does(tokenizer: HuggingFaceTokenizer) -> None:
    for text in ("", "Hello, my name is", "é👩‍🚀</s> [INST]"):
        assert list(tokenizer.encode(text)) == tokenizer._hf(text)["input_ids"]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert list(tokenizer.encode_chat(messages)) == tokenizer._hf.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False
    )


def test_token_bytes_spell_the_text(tokenizer: HuggingFaceTokenizer, mistral: MistralTokenizer) -> None:
    text = "é 你好 👩‍🚀 x"
    assert b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode(text)[1:]).decode() == text
    assert b"".join(mistral.token_bytes(i) for i in mistral.encode(text)[1:]).decode().strip() == text


def test_templates_refuse_by_field(tokenizer: HuggingFaceTokenizer, mistral: MistralTokenizer, tmp_path: Path) -> None:
    late_system = [{"role": "user", "content": "Hi"}, {"role": "system", "content": "no"}]
    twice = [{"role": "assistant", "content": "Hi"}, {"role": "assistant", "content": "no"}]
    with pytest.raises(InvalidRequest, match="system comes first") as refused:
        tokenizer.encode_chat(late_system)
    assert refused.value.param == "messages"
    with pytest.raises(InvalidRequest) as refused:
        mistral.encode_chat(twice)
    assert refused.value.param == "messages"
    assert mistral.encode_chat([{"role": "user", "content": "Hi"}])[0] == 1
    bare = HuggingFaceTokenizer(write_tokenizer(tmp_path, chat_template=None))
    with pytest.raises(InvalidRequest, match="no chat template") as refused:
        bare.encode_chat([{"role": "user", "content": "Hi"}])
    assert refused.value.param == "messages"
