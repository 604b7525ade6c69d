"""Mistral's own client, whole and streaming."""

from __future__ import annotations

from mistralai.client import Mistral

from cluster.messages import ModelCard
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, http_server, tokens_script

ANSWER = "Grüße 👩‍🚀, 你好"


def test_chat_and_models(card: ModelCard, tokenizer: HuggingFaceTokenizer) -> None:
    coordinator = ScriptedCoordinator(tokens_script(tokenizer.encode(ANSWER)[1:]))
    with (
        http_server(build_frontend(card, coordinator)) as url,
        Mistral(api_key="none", server_url=url) as client,
    ):
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
        whole = client.chat.complete(model="tiny", messages=messages, random_seed=5, safe_prompt=False)  # type: ignore[arg-type]
        assert whole.choices[0].message.content == ANSWER
        with client.chat.stream(model="tiny", messages=messages, max_tokens=200) as stream:  # type: ignore[arg-type]
            chunks = [event.data for event in stream]
        assert "".join(str(chunk.choices[0].delta.content or "") for chunk in chunks) == ANSWER
        assert chunks[-1].choices[0].finish_reason == "stop"
        models = client.models.list().data
        assert models is not None
        assert [model.id for model in models] == ["tiny", "tiny-latest"]
    assert coordinator.requests[0].seed == 5
