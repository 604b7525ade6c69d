"""The chat page in a real Chromium against the real HTTP door: type, stream, stop, edit, see experts, give the key."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from cluster.config import GatewayConfig
from cluster.messages import ModelCard, Request, TokenChunk, TokenLogprobs
from gateway.http.page import content_security_policy
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway.chat_formats import write_qwen3
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, http_server, model_card, tokens_script
from tests.gateway.http import heat_map

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
        inner = tokens_script(tokens * (50 if endless else 1), pause_s=0.02 if endless else 0.002)
        async for chunk in inner(replace(request, sampling=replace(request.sampling, max_tokens=10_000))):
            first = np.arange(LAYERS)[:, None] + np.arange(TOP_K)  # [L, K]
            yield told(request, chunk, (chunk.first_position + first) % EXPERTS)

    return script


def told(request: Request, chunk: TokenChunk, experts: NDArray[Any]) -> TokenChunk:
    """The chunk, with scores, and the experts of its tokens if the request asks."""
    return replace(
        chunk,
        logprobs=tuple(TokenLogprobs(-0.5) for _ in chunk.token_ids),
        routed_experts=experts.astype(np.uint16).tobytes() if request.sampling.routed_experts else None,
    )


def routed(token: int, routes: NDArray[Any], pause_s: float = 0.0) -> Any:
    """A script: the same token again and again, each with its `routes` [tokens, L, K]."""

    async def script(request: Request) -> AsyncIterator[TokenChunk]:
        async for chunk in tokens_script([token] * len(routes), pause_s=pause_s, eos=None)(
            replace(request, sampling=replace(request.sampling, max_tokens=len(routes)))
        ):
            yield told(request, chunk, routes[chunk.first_position])

    return script


def random_routes(num_tokens: int, layers: int, experts: int, top_k: int) -> NDArray[Any]:
    """[tokens, L, K]; some experts are chosen more often, others never."""
    random = np.random.default_rng(1)
    scores = random.normal(0, 2, (layers, experts)) + random.gumbel(size=(num_tokens, layers, experts))
    return np.argsort(-scores, axis=-1)[..., :top_k]


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
    assert [text for text in complaints if "401" not in text and "ERR_INTERNET_DISCONNECTED" not in text] == []


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
        assert page.inner_text(".figures").startswith(f"{len(tokens) + 1} tokens · "), "with its end"
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
        assert [sum(row) for row in heat_map.counts(page, LAYERS, EXPERTS)] == [(len(tokens) + 1) * TOP_K] * LAYERS
        colours = {span.evaluate("e => getComputedStyle(e).backgroundColor") for span in spans.all()[:16]}
        assert len(colours) >= 4
        spans.nth(1).hover()
        assert page.inner_text("#tip > span").split() == ["layer", "0", "1", "2"]
        page.select_option(".experts select", "2")
        page.mouse.move(0, 0)
        page.focus(".tokens")
        page.keyboard.press("ArrowRight")
        assert page.inner_text("#tip > span").split() == ["layer", "2", "2", "3"]
        assert page.inner_text("#status") == "A layer 2 2 3", "to be read aloud"
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
def test_every_count_of_a_large_map_is_right(page: Any, card: ModelCard, tmp_path: Path) -> None:
    """Of 256 experts nobody could read one: 15,360 numbers in cells of two pixels, and a legend of 256 colours."""
    layers, experts, top_k = 60, 256, 8
    routes = random_routes(500, layers, experts, top_k)
    expected = np.stack([np.bincount(routes[:, layer].ravel(), minlength=experts) for layer in range(layers)])
    large = replace(card, num_layers=layers, num_experts=experts, top_k=top_k, max_model_len=4096)
    with http_server(build_frontend(large, ScriptedCoordinator(routed(40, routes)))) as url:
        page.goto(url)
        ask(page, "Go on")
        page.wait_for_selector("text=The answer is complete.")
        page.click("button:text-is('Experts')")
        assert heat_map.counts(page, layers, experts) == expected.tolist()
        page.screenshot(path=tmp_path / "large.png", full_page=True)

        named = [entry.split() for entry in page.locator(".legend button").all_inner_texts()]
        first = np.sort(expected[0])[::-1][:12]
        assert [int(count) for _, _, count in named] == first.tolist(), "the most used of layer 0, and no other"
        assert all(expected[0][int(expert)] == int(count) for _, expert, count in named)
        assert f"{np.count_nonzero(expected[0])} of 256 experts" in page.inner_text(".experts")

        page.locator(".tokens span").nth(7).hover()
        assert page.inner_text("#tip > span").split() == ["layer", "0", *map(str, routes[7, 0])]
        page.mouse.move(0, 0)
        layer, expert = (int(at) for at in np.unravel_index(expected.argmax(), expected.shape))
        x, y = place(page, layer, expert, experts)
        page.locator("canvas.heat").click(position={"x": x, "y": y})
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowUp")
        assert page.inner_text("#status") == f"layer {layer}, expert {expert}: {expected.max()} of 500 tokens"
        page.mouse.move(0, 0)
        coloured = page.locator(".tokens span").evaluate_all(
            "all => all.map((one) => one.style.backgroundColor !== '')"
        )
        assert coloured == (routes[:, layer] == expert).any(axis=1).tolist(), "the tokens that went to that expert"
        assert pixel(page, layer, expert, experts) == "#0f6b6b", "the strongest has the whole colour"
        layer, expert = (int(at) for at in np.argwhere(expected == 0)[-1])
        assert pixel(page, layer, expert, experts) == "#f2f0ec", "the unused have none"


def place(page: Any, layer: int, expert: int, experts: int) -> tuple[float, float]:
    """The middle of a cell; cells are 8 pixels high, below 18 and right of 30 of numbers."""
    return 30 + (expert + 0.5) * (
        page.evaluate("document.querySelector('canvas').clientWidth") - 30
    ) / experts, 18 + 8 * layer + 4


def pixel(page: Any, layer: int, expert: int, experts: int) -> str:
    """The colour in the middle of a cell, once what is to be painted is."""
    colour: str = page.locator("canvas.heat").evaluate(
        """(canvas, at) => new Promise((told) => requestAnimationFrame(() => setTimeout(() => {
          const data = canvas.getContext("2d").getImageData(...at, 1, 1).data;
          told("#" + [...data.slice(0, 3)].map((part) => part.toString(16).padStart(2, "0")).join(""));
        })))""",
        place(page, layer, expert, experts),
    )
    return colour


@needs_chromium
def test_many_experts_do_not_hold_the_page(browser: Any, page: Any, card: ModelCard) -> None:
    """At each token the whole answer, a table of 15,360 cells and as many spans were made anew: it stood for seconds.

    A token costs some 5 ms of CPU and the longest task 15 ms where it was measured. The bounds are ten times that.
    """
    layers, experts, top_k = 60, 256, 8
    routes = random_routes(500, layers, experts, top_k)
    large = replace(card, num_layers=layers, num_experts=experts, top_k=top_k, max_model_len=4096)
    with http_server(build_frontend(large, ScriptedCoordinator(routed(40, routes, pause_s=0.005)))) as url:
        page.goto(url)
        ask(page, "Go on")
        page.wait_for_selector("text=The answer is complete.")
        page.click("button:text-is('Experts')")
        browser.start_tracing(page=page, categories=["toplevel"])
        ask(page, "Go on")  # of the next answer experts are shown from the first token on
        until(page, lambda: page.locator(".assistant").count() == 2)
        until(page, lambda: page.locator(".busy").count() == 0)
        events = json.loads(browser.stop_tracing())["traceEvents"]
    main = {(e["pid"], e["tid"]) for e in events if e.get("args", {}).get("name") == "CrRendererMain"}
    tasks = [e["tdur"] / 1e3 for e in events if (e["pid"], e["tid"]) in main and "RunTask" in e["name"] and "tdur" in e]
    assert max(tasks) < 150, "ms of CPU"
    assert sum(tasks) < 500 * 50
    assert len(tasks) > 100


@needs_chromium
def test_a_long_answer_takes_a_bounded_part_of_the_page_and_of_memory(page: Any, card: ModelCard) -> None:
    """Each token was an element, and its experts were arrays of arrays: 32,000 tokens of such a model took 300 MB."""
    layers, experts, top_k, num_tokens = 60, 256, 8, 2000
    routes = random_routes(num_tokens, layers, experts, top_k)
    large = replace(card, num_layers=layers, num_experts=experts, top_k=top_k, max_model_len=4096)
    with http_server(build_frontend(large, ScriptedCoordinator(routed(40, routes)))) as url:
        page.goto(url)
        ask(page, "Go on")
        page.wait_for_selector("text=The answer is complete.", timeout=60_000)
        page.click("button:text-is('Experts')")
        assert page.evaluate("document.querySelectorAll('*').length") < 1500
        assert page.inner_text(".pages span") == "Tokens 1 to 500 of 2,000"
        page.click("button:text-is('Later')")
        assert page.inner_text(".pages span") == "Tokens 501 to 1,000 of 2,000"
        page.locator(".tokens span").nth(1).hover()
        assert page.inner_text("#tip > span").split() == ["layer", "0", *map(str, routes[501, 0])]
        kept, counted, text = page.evaluate(
            """([layers, topK]) => {
              const { routes } = turns.at(-1);
              const experts = Array.from({ length: layers }, () => Array.from({ length: topK }, (_, k) => k));
              for (let i = 0; i < 60000; i++) routes.add(String(i), experts);
              const bytes = routes.blocks.reduce((sum, block) => sum + block.experts.byteLength, 0);
              turns.at(-1).grow();
              return [bytes, routes.counts.reduce((sum, one) => sum + one, 0), routes.text(routes.tokens - 1)];
            }""",
            [layers, top_k],
        )
        assert kept <= 2**25
        assert counted == (num_tokens + 60_000) * layers * top_k, "what is forgotten stays counted"
        assert text == "59999"
        page.click("button:text-is('Later')")
        first = page.evaluate("turns.at(-1).routes.first")
        assert page.inner_text(".pages span").startswith(
            f"Tokens {first + 1:,} to {first + 500:,} of 62,000; the first"
        )


@needs_chromium
def test_more_than_256_experts_are_told_apart(page: Any, card: ModelCard) -> None:
    """The page asked for what the server refused of such a model, and could not be used with it."""
    routes = np.array([[[300, 44], [511, 0]]])
    large = replace(card, num_layers=3, num_experts=512, top_k=2)
    with http_server(build_frontend(large, ScriptedCoordinator(routed(40, routes)))) as url:
        page.goto(url)
        ask(page, "Go on")
        page.wait_for_selector("text=The answer is complete.")
        page.click("button:text-is('Experts')")
        assert [np.flatnonzero(row).tolist() for row in heat_map.counts(page, 2, 512)] == [[44, 300], [0, 511]]
        page.locator(".tokens span").hover()
        assert page.inner_text("#tip > span").split() == ["layer", "0", "300", "44"]
        assert "Only the 2 layers that have experts are counted." in page.inner_text(".experts")


@needs_chromium
def test_what_is_focused_stays_while_tokens_come(page: Any, sparse: ModelCard, tokenizer: HuggingFaceTokenizer) -> None:
    """The answer was made anew with each token: the focus fell back to the page, and what was selected was lost."""
    coordinator = ScriptedCoordinator(answering(tokenizer.encode("Hello\n\n")[1:], endless=True))
    with http_server(build_frontend(replace(sparse, max_model_len=9999), coordinator)) as url:
        page.goto(url)
        ask(page, "Go on")
        page.focus("button:text-is('Experts')")
        page.keyboard.press("Enter")
        page.select_option(".experts select", "1")
        page.focus(".experts select")
        page.evaluate("getSelection().selectAllChildren(document.querySelector('.assistant .text p'))")
        before = page.locator(".tokens span").count()
        until(page, lambda: page.locator(".tokens span").count() > before + 5)
        assert page.evaluate("document.activeElement.value") == "1"
        assert page.evaluate("getSelection().toString()") == "Hello"
        until(page, lambda: "tokens/s" in page.inner_text(".figures"))  # not before tokens came at two times
        page.keyboard.press("Escape")
        page.wait_for_selector("text=Stopped.")
        assert page.evaluate("document.activeElement.value") == "1", "nor does its end take it"
        texts = page.locator(".assistant .text p").all_inner_texts()
        assert set(texts[:-1]) == {"Hello"}


@needs_chromium
def test_an_answer_is_copied_where_the_browser_has_no_clipboard(
    page: Any, card: ModelCard, tokenizer: HuggingFaceTokenizer
) -> None:
    """It has one for its own machine and over HTTPS alone: elsewhere the button did nothing."""
    coordinator = ScriptedCoordinator(tokens_script(tokenizer.encode("Hello")[1:]))
    page.add_init_script("Object.defineProperty(Navigator.prototype, 'clipboard', { value: undefined })")
    with http_server(build_frontend(card, coordinator)) as url:
        page.goto(url)
        ask(page, "Hi")
        page.click("button:text-is('Copy')")
        page.wait_for_selector("text=Copied.")
        page.focus("#prompt")
        page.keyboard.press("Control+V")
        assert page.input_value("#prompt") == "Hello"


@needs_chromium
def test_a_question_without_an_answer_is_not_sent_again(
    page: Any, card: ModelCard, tokenizer: HuggingFaceTokenizer
) -> None:
    """Once one had failed, or was stopped at once, every next question was refused by templates that want turns."""
    coordinator = ScriptedCoordinator(tokens_script(tokenizer.encode("Hello")[1:], pause_s=0.5))
    with http_server(build_frontend(card, coordinator)) as url:
        page.goto(url)
        ask(page, "Go on")
        until(page, lambda: coordinator.running == 1)
        page.keyboard.press("Escape")
        page.wait_for_selector("text=Stopped.")
        page.context.set_offline(True)
        ask(page, "And now?")
        page.wait_for_selector("text=The server does not answer.")
        page.context.set_offline(False)
        ask(page, "Again")
        page.wait_for_selector("text=The answer is complete.")
    assert coordinator.requests[-1].prompt_token_ids == tokenizer.encode_chat([{"role": "user", "content": "Again"}])


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
    """A long thought was an empty answer for as long as it took; then one paragraph, laid out anew with each token."""
    directory = write_qwen3(tmp_path)
    thought, end = "<think>\nSix <b>sevens</b>.\nOr not.\n", "</think>\n\nForty-two."
    tokenizer = HuggingFaceTokenizer(directory)
    begun, whole = (tokenizer.encode(text, add_special_tokens=False) for text in (thought, thought + end))
    frontends = [
        build_frontend(model_card(directory, vocab_size=400, max_model_len=4096), ScriptedCoordinator(script))
        for script in (tokens_script(begun, pause_s=0.5), tokens_script(whole))
    ]
    with http_server(frontends[0]) as url:
        page.goto(url)
        ask(page, "Six times seven?")
        until(page, lambda: page.locator(".thought p").count() == 2)
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
        assert page.locator(".thought p").all_inner_texts() == ["Six <b>sevens</b>.", "Or not."], "a line each"
