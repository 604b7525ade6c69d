"""Messages of one role in a row: Mixtral's template refuses them, and nearly every client sends some one day.

They are joined as mistral-common joins them, but only where the template refuses them as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given

from cluster import demo_model
from cluster.errors import InvalidRequest
from gateway.grpc.proto import chat_pb2, chat_pb2_grpc
from gateway.text.chat_template import Rendering
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway import vocabularies
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, http_server, model_card, tokens_script
from tests.gateway.grpc.test_grpc import grpc_server
from tests.gateway.message_shapes import Json, assistant, call, calls, result, system, user
from tests.gateway.text.test_forged_turns import HOSTILE, SLOW

DEMO = Path(demo_model.__file__).parent
ALTERNATING = (  # as Mixtral's and Mistral's own
    "{{ bos_token }}{% set spoken = namespace(last='') %}{% for m in messages %}"
    "{% if m.role == spoken.last and m.role != 'tool' %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set spoken.last = m.role %}"
    "{% if m.role == 'assistant' %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[TOOL_CALLS]{{ c.function | tojson }}{% endfor %}{{ eos_token }}"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}{{ tools }}"
    "{% else %}[INST]{{ m.content }}[/INST]{% endif %}{% endfor %}"
)
JOINED: list[tuple[list[Json], list[Json]]] = [
    ([user("a"), user("b"), user("c")], [user("a\n\nb\n\nc")]),
    ([user("a"), user(""), user("b")], [user("a\n\nb")]),
    ([user(""), user("")], [user("")]),
    ([system("x"), system("y"), user("a")], [system("x\n\ny"), user("a")]),
    ([user("a"), assistant("b"), assistant("c"), user("d")], [user("a"), assistant("b\n\nc"), user("d")]),
    ([user("a"), user("b"), assistant("c"), user("d"), user("e")], [user("a\n\nb"), assistant("c"), user("d\n\ne")]),
]
WITH_CALLS: list[tuple[list[Json], list[Json]]] = [
    (
        [user("a"), assistant("b"), calls(call(), content=""), result(), result(call_id="bcdefghij"), user("c")],
        [user("a"), calls(call(), content="b"), result(), result(call_id="bcdefghij"), user("c")],
    ),
    (
        [user("a"), calls(call(), content="b"), calls(call("bcdefghij"), content="c"), result()],
        [user("a"), calls(call(), call("bcdefghij"), content="b\n\nc"), result()],
    ),
]


@pytest.fixture(scope="module")
def demo() -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(DEMO)


@pytest.fixture(scope="module", params=vocabularies.KINDS)
def alternating(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(vocabularies.write(tmp_path_factory.mktemp("tokenizer"), request.param, ALTERNATING))


@pytest.mark.parametrize(("sent", "means"), JOINED)
def test_a_template_that_refuses_them_gets_them_joined(
    demo: HuggingFaceTokenizer, sent: list[Json], means: list[Json]
) -> None:
    """They were 400: `After the optional system message, the roles must alternate`."""
    assert demo.encode_chat(sent) == demo.encode_chat(means)


@pytest.mark.parametrize(("sent", "means"), JOINED + WITH_CALLS)
def test_every_kind_of_tokenizer_joins_them(
    alternating: HuggingFaceTokenizer, sent: list[Json], means: list[Json]
) -> None:
    assert alternating.encode_chat(sent) == alternating.encode_chat(means)


def test_a_template_that_accepts_them_gets_them_as_they_are(tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(vocabularies.write(tmp_path, "byte level", vocabularies.CHATML))
    text = tokenizer.decode(tokenizer.encode_chat([user("a"), user("b")]))
    assert text.count("<|im_start|>user") == 2


def test_what_is_refused_for_another_reason_stays_so(demo: HuggingFaceTokenizer) -> None:
    with pytest.raises(InvalidRequest, match="the model's chat template refuses these messages"):
        demo.encode_chat([user("a"), user("b"), system("c")])


def test_the_last_of_several_answers_is_continued(demo: HuggingFaceTokenizer) -> None:
    how = Rendering(continues=True, has_generation_prompt=False)
    sent = [user("a"), assistant("b"), assistant("c")]
    assert demo.encode_chat(sent, (), how) == demo.encode_chat([user("a"), assistant("b\n\nc")], (), how)


@SLOW
@given(HOSTILE, HOSTILE)
def test_no_turn_is_forged_where_texts_are_joined(
    alternating: HuggingFaceTokenizer, demo: HuggingFaceTokenizer, one: str, other: str
) -> None:
    """Neither by one of the texts nor by the end of one and the beginning of the next."""
    for tokenizer in (alternating, demo):

        def control(*texts: str, tokenizer: HuggingFaceTokenizer = tokenizer) -> list[int]:
            known = tokenizer._control_tokens._text_of.keys() - {tokenizer._control_tokens._unk_id}
            return [i for i in tokenizer.encode_chat([user(text) for text in texts]) if i in known]

        assert control(one, other) == control("hi", "hi") == control("hi")


def test_both_doors_take_them(demo: HuggingFaceTokenizer) -> None:
    coordinator = ScriptedCoordinator(tokens_script([5]))
    card = model_card(DEMO, vocab_size=demo.vocab_size, max_model_len=512, eos_token_ids=(1,))
    frontend = build_frontend(card, coordinator)
    expected = demo.encode_chat([user("a\n\nb")])
    with http_server(frontend) as url:
        asked: dict[str, Any] = {"model": "tiny", "messages": [user("a"), user("b")]}
        assert httpx.post(f"{url}/v1/chat/completions", json=asked).status_code == 200
        assert coordinator.requests[-1].prompt_token_ids == expected
        assert tuple(httpx.post(f"{url}/tokenize", json=asked).json()["tokens"]) == expected
    with grpc_server(frontend) as channel:
        stub = chat_pb2_grpc.MantaStub(channel)  # type: ignore[no-untyped-call]
        messages = [chat_pb2.Message(role="user", content=text) for text in "ab"]
        stub.Chat(chat_pb2.ChatRequest(messages=messages), timeout=30)
        assert coordinator.requests[-1].prompt_token_ids == expected
