"""The chat page of the running server in a real Chromium, on a phone's screen in the dark."""

from __future__ import annotations

import shutil

import pytest

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
        assert "tokens/s" in page.inner_text(".figures")
        assert len(page.inner_text(".assistant .text")) > 10
        page.click("button:text-is('Experts')")
        tokens = page.locator(".tokens span").count()
        rows = page.locator(".heat tbody tr")
        for row in rows.all():
            assert sum(map(int, row.locator("td").all_inner_texts())) == 2 * tokens, "two experts a token and layer"
        assert rows.count() > 1
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off on a phone"
        page.screenshot(path=tmp_path / "phone.png")
        browser.close()
