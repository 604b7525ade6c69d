"""The chat page of the running server in a real Chromium, on a phone's screen in the dark."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import gateway.http
from cluster.demo_model.training.corpus import entries
from tests.gateway.http import heat_map

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_a_question_is_answered_and_its_experts_are_shown(server, tmp_path):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
        page.set_default_timeout(60_000)
        page.goto(server.url)
        page.wait_for_selector("#model option", state="attached")
        page.select_option("#model", "manta-demo")
        page.fill("#prompt", "What is the best French cheese?")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=The answer is complete.")
        # Without a speed where the whole answer came within 50 ms.
        assert re.fullmatch(r"\d+ tokens( · [\d.]+ tokens/s)? · first after [\d.]+ s", page.inner_text(".figures"))
        assert len(page.inner_text(".assistant .text")) > 10
        page.click("button:text-is('Experts')")
        tokens = page.locator(".tokens span").count()
        layers, experts = page.evaluate("[turns.at(-1).routes.layers, turns.at(-1).routes.experts]")
        assert layers > 1
        assert [sum(row) for row in heat_map.counts(page, layers, experts)] == [2 * tokens] * layers, "two a layer"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off on a phone"
        page.screenshot(path=tmp_path / "phone.png")
        browser.close()


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
@pytest.mark.parametrize(("locale", "language"), [("de-AT", "de"), ("en-GB", "en"), ("ja-JP", "en")])
def test_a_suggestion_is_in_the_readers_language_and_a_click_asks_it(server, locale, language):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(locale=locale)
        page.set_default_timeout(60_000)
        page.goto(server.url)
        page.wait_for_selector("#model option", state="attached")
        page.select_option("#model", "manta-demo")
        page.evaluate("document.getElementById('temperature').value = '0'")
        offered = page.locator("#suggestions button")
        assert offered.all_inner_texts() == suggestions()[language]
        question = offered.first.inner_text()
        offered.first.click()
        page.wait_for_selector("text=The answer is complete.")
        assert page.inner_text(".user .text") == question
        assert page.inner_text(".assistant .text") == answers(language)[question]
        browser.close()


def test_every_suggestion_is_a_question_of_the_demo_models_corpus():
    offered = suggestions()
    assert set(offered) == {"en", "fr", "de", "es", "it"}
    for language, questions in offered.items():
        assert len(questions) > 3
        assert set(questions) <= set(answers(language))


def suggestions() -> dict[str, list[str]]:
    """By language, as the page has them."""
    page = (Path(gateway.http.__file__).parent / "page.html").read_text(encoding="utf-8")
    lists = re.search(r"const SUGGESTIONS = \{(.*?)\n\};", page, re.DOTALL)
    assert lists is not None
    return {language: re.findall(r'"([^"]+)"', line) for language, line in re.findall(r"(\w+): \[(.*)\]", lists[1])}


def answers(language: str) -> dict[str, str]:
    """Of every question in that language, in all its wordings."""
    return {question: entry.answer for entry in entries() if entry.language == language for question in entry.questions}
