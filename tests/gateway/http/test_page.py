"""The chat page in a real Chromium against the real HTTP door: type, stream, stop, edit, see experts, give the key."""

from __future__ import annotations

import hashlib
import re
import shutil
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.config import GatewayConfig
from cluster.messages import ModelCard, Request, TokenChunk, TokenLogprobs
from gateway.http.page import content_security_policy
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway.chat_formats import write_qwen3
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, http_server, model_card, tokens_script

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
ANSWER = """A **bold** word, `code`, [a link](https://example.org) and [a trap](javascript:alert(1)).

- one
- two é 你好

```python
print("<b>not HTML</b>")
```
<img src=x onerror="document.title = 'owned'">"""
LAYERS, EXPERTS, TOP_K = 4, 8, 2


def answering(tokens: tuple[int, ...], *, endless: bool = False) -> Any:
    """A script: these tokens, each with experts that follow from its place; then the end, or the same again."""

    async def script(request: Request) -> AsyncIterator[TokenChunk]:
        inner = tokens_script(tokens * (50 if endless else 1), pause_s=0.02 if endless else 0.0)
        async for chunk in inner(replace(request, sampling=replace(request.sampling, max_tokens=10_000))):
            experts = bytes(
                (chunk.first_position + layer + k) % EXPERTS for layer in range(LAYERS) for k in range(TOP_K)
            )
            yield replace(
                chunk,
                logprobs=tuple(TokenLogprobs(-0.5) for _ in chunk.token_ids),
                routed_experts=experts if request.sampling.routed_experts else None,
            )

    return script


@pytest.fixture
def sparse(card: ModelCard) -> ModelCard:
    return replace(card, num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page whose console must stay silent: a refused script or style would be an error there."""
    context = browser.new_context(viewport={"width": 900, "height": 1000})
    page = context.new_page()
    page.set_default_timeout(20_000)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    yield page
    context.close()
    assert [text for text in complaints if "401" not in text] == []


def ask(page: Any, text: str) -> None:
    page.wait_for_selector("#model option", state="attached")
    page.fill("#prompt", text)
    page.keyboard.press("Enter")


def until(page: Any, condition: Callable[[], bool]) -> None:
    """Playwright's own waiting for a function evaluates text in the page, which the policy forbids."""
    for _ in range(400):
        if condition():
            return
        page.wait_for_timeout(50)
    raise AssertionError("waited 20 s")


def test_the_policy_allows_the_page_and_nothing_else(card: ModelCard) -> None:
    with http_server(build_frontend(card, ScriptedCoordinator(tokens_script([])))) as url:
        answer = httpx.get(url + "/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    for tag in ("script", "style"):
        [content] = re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        assert f"'sha256-{b64encode(hashlib.sha256(content.encode()).digest()).decode()}'" in policy
    assert content_security_policy(answer.text) == policy
    urls = set(re.findall(r"""https?://[^\s"'<>)`]+""", answer.text)) - {"http://www.w3.org/2000/svg"}
    assert not urls, "no other host"
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\(", answer.text)


@needs_chromium
def test_an_answer_streams_is_rendered_and_shows_its_experts(
    page: Any, sparse: ModelCard, tokenizer: HuggingFaceTokenizer, tmp_path: Path
) -> None:
    tokens = tokenizer.encode(ANSWER)[1:]
    coordinator = ScriptedCoordinator(answering(tokens))
    with http_server(build_frontend(replace(sparse, max_model_len=4096), coordinator)) as url:
        page.goto(url)
        ask(page, "Hello <b>you</b>")
        page.wait_for_selector("text=The answer is complete.")
        assert "tokens/s" in page.inner_text(".figures")
        assert page.inner_text(".user .text") == "Hello <b>you</b>"
        text = page.locator(".assistant .text")
        assert text.locator("strong").inner_text() == "bold"
        assert text.locator("li").all_inner_texts() == ["one", "two é 你好"]
        assert text.locator("pre").inner_text() == 'print("<b>not HTML</b>")'
        assert text.locator("a").all_inner_texts() == ["a link"]
        assert "[a trap](javascript:alert(1))" in text.inner_text()
        assert '<img src=x onerror="document.title' in text.inner_text()
        assert page.title() == "Manta"
        assert "first after" in page.inner_text(".figures")

        page.click("button:text-is('Experts')")
        spans = page.locator(".tokens span")
        assert spans.count() == len(tokens) + 1, "the token that ended the answer is one of them"
        assert "".join(spans.all_text_contents()).startswith("A **bold** word")
        assert "你好" in page.inner_text(".tokens")
        cells = page.locator(".heat td")
        assert cells.count() == LAYERS * EXPERTS
        assert sum(map(int, cells.all_inner_texts())) == (len(tokens) + 1) * LAYERS * TOP_K
        colours = {span.evaluate("e => getComputedStyle(e).backgroundColor") for span in spans.all()[:16]}
        assert len(colours) >= 4
        spans.nth(1).hover()
        assert page.inner_text("#tip div").split("\n")[0].startswith("layer 0")
        page.click("button:text-is('layer 2')")
        assert page.locator(".experts select").input_value() == "2"
        page.focus(".tokens")
        page.keyboard.press("ArrowRight")
        assert page.is_visible("#tip")
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        page.set_viewport_size({"width": 360, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, "it fits a phone"
        page.screenshot(path=tmp_path / "phone.png")
        page.set_viewport_size({"width": 900, "height": 1000})

        page.click("button:text-is('Regenerate')")
        page.wait_for_selector("text=The answer is complete.")
        assert page.locator("article").count() == 2
        page.hover(".user")
        page.click("button:text-is('Edit')")
        page.fill(".edit textarea", "Something else")
        page.keyboard.press("Enter")
        until(page, lambda: page.locator(".assistant:not(.busy)").count() == 1 and len(coordinator.requests) == 3)
        assert page.inner_text(".user .text") == "Something else"
        assert len(coordinator.requests) == 3
        prompts = [request.prompt_token_ids for request in coordinator.requests]
        assert prompts[0] == prompts[1], "what is regenerated is asked without its former answer"
        assert prompts[2] == tokenizer.encode_chat([{"role": "user", "content": "Something else"}])


@needs_chromium
def test_stop_ends_the_answer_on_the_server(page: Any, sparse: ModelCard, tokenizer: HuggingFaceTokenizer) -> None:
    coordinator = ScriptedCoordinator(answering(tokenizer.encode("Hello ")[1:], endless=True))
    with http_server(build_frontend(replace(sparse, max_model_len=9999), coordinator)) as url:
        page.goto(url)
        ask(page, "Go on")
        until(page, lambda: "Hello Hello" in page.inner_text("#log"))
        page.click("button:text-is('Stop')")
        page.wait_for_selector("text=stopped")
        until(page, lambda: coordinator.running == 0)
        assert "Hello" in page.inner_text(".assistant .text")
        ask(page, "Again")
        until(page, lambda: coordinator.running == 1)
        page.keyboard.press("Escape")
        until(page, lambda: coordinator.running == 0)
        page.wait_for_selector("#send:text('Send')")


@needs_chromium
def test_the_key_is_asked_for_and_stays_in_the_tab(
    page: Any, card: ModelCard, tokenizer: HuggingFaceTokenizer, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(f'- {{id: alice, sha256: "{hashlib.sha256(b"the-key").hexdigest()}"}}\n')
    coordinator = ScriptedCoordinator(tokens_script(tokenizer.encode("Hello")[1:]))
    with http_server(build_frontend(card, coordinator, GatewayConfig(api_keys_file=str(keys)))) as url:
        page.goto(url)
        for key in ("wrong", "the-key"):
            page.wait_for_selector("#key-dialog[open]")
            page.fill("#key", key)
            page.click("button:text-is('Use key')")
        ask(page, "Hi")
        page.wait_for_selector("text=The answer is complete.")
        assert page.inner_text(".assistant .text") == "Hello"
        assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
        assert page.locator("button:text-is('Experts')").count() == 0, "a dense model has none to show"


@needs_chromium
def test_a_page_of_another_site_cannot_ask_and_ours_can(browser: Any, card: ModelCard) -> None:
    """What any page in the browser of whoever runs the server could do: no preflight, the answer is not read."""
    coordinator = ScriptedCoordinator(tokens_script([40]))
    body = '{"model": "tiny", "prompt": "x"}'
    attack = f"url => fetch(url, {{method: 'POST', mode: 'no-cors', body: new Blob([{body!r}])}}).then(() => 'sent')"
    others = build_frontend(card, ScriptedCoordinator(tokens_script([])))
    with http_server(build_frontend(card, coordinator)) as url, http_server(others) as another:
        context = browser.new_context()
        page = context.new_page()
        for site, count in ((another, 0), (url, 1)):
            page.goto(f"{site}/health")
            assert page.evaluate(attack, f"{url}/v1/completions") == "sent"
            assert len(coordinator.requests) == count, site
        context.close()


@needs_chromium
def test_what_a_model_thinks_is_folded_once_it_answers(page: Any, tmp_path: Path) -> None:
    """A long thought was an empty answer for as long as it took."""
    directory = write_qwen3(tmp_path)
    thought, end = "<think>\nSix <b>sevens</b>.\n", "</think>\n\nForty-two."
    tokenizer = HuggingFaceTokenizer(directory)
    begun, whole = (tokenizer.encode(text, add_special_tokens=False) for text in (thought, thought + end))
    frontends = [
        build_frontend(model_card(directory, vocab_size=400, max_model_len=4096), ScriptedCoordinator(script))
        for script in (tokens_script(begun, pause_s=0.5), tokens_script(whole))
    ]
    with http_server(frontends[0]) as url:
        page.goto(url)
        ask(page, "Six times seven?")
        until(page, lambda: page.locator(".thought p").count() == 1)
        assert page.locator(".thought").get_attribute("open") is not None
        page.keyboard.press("Escape")
        page.wait_for_selector("text=Stopped.")
    with http_server(frontends[1]) as url:
        page.goto(url)
        ask(page, "Six times seven?")
        page.wait_for_selector("text=The answer is complete.")
        assert page.inner_text(".assistant .text") == "Forty-two."
        assert page.locator(".thought").get_attribute("open") is None
        page.click(".thought summary")
        assert page.inner_text(".thought p") == "Six <b>sevens</b>."
