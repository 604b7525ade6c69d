"""docs/logs.md against the code: every event that is logged is on it, with its level, and no other."""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import Overloaded
from gateway.telemetry.logs import RequestRecord
from gateway.telemetry.request_ends import RequestEnds
from tests.programs import REPOSITORY

PAGE = (REPOSITORY / "docs" / "logs.md").read_text()
LEVELS = {"exception": "ERROR"} | {name: name.upper() for name in ("info", "warning", "error", "critical")}
WITH_FIELDS = {"request", "load is shed"}


def events(file: Path) -> Iterator[tuple[str, str]]:
    """(level, text) of the calls of a module's `logger`, but for DEBUG."""
    for node in ast.walk(ast.parse(file.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if isinstance(node.func.value, ast.Name) and node.func.value.id == "logger" and node.func.attr in LEVELS:
            [text, *_] = node.args
            assert isinstance(text, ast.Constant), f"{file}: a text that is put together has no stable form"
            yield LEVELS[node.func.attr], str(text.value)


def test_every_event_is_on_the_page_and_no_other() -> None:
    rooms = ("cluster", "experts_service", "gateway", "router_service")
    modules = [file for room in rooms for file in (REPOSITORY / room).rglob("*.py")]
    logged = {event for file in modules for event in events(file)}
    assert len(logged) > 40
    tables = PAGE.split("\n## All other lines\n")[1]
    told = re.findall(r"^\| ([A-Z]+) \| `(.*?)` \| ", tables, re.MULTILINE)
    assert len(told) == len(set(told))
    assert set(told) == {event for event in logged if event[1] not in WITH_FIELDS}
    assert {text for _, text in logged} >= WITH_FIELDS


def test_the_modules_that_the_page_names_log_what_it_says() -> None:
    wrong = []
    for level, text, meaning in re.findall(r"^\| ([A-Z]+) \| `(.*?)` \| (.*) \|$", PAGE, re.MULTILINE):
        named = re.findall(r"`((?:cluster|experts_service|gateway|router_service)(?:\.\w+)+)`", meaning)
        files = [REPOSITORY / (module.replace(".", "/") + ".py") for module in named]
        if not files or any((level, text) not in set(events(file)) for file in files):
            wrong.append(text)
    assert wrong == []


def fields(event: str) -> list[str]:
    section = PAGE.split(f"\n### `{event}`\n")[1].split("\n#")[0]
    return re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)


def test_the_fields_of_events_are_on_the_page(caplog: pytest.LogCaptureFixture) -> None:
    record = RequestRecord(
        "http",
        "/",
        "chatcmpl-1",
        "429",
        "tiny",
        "alice",
        finish_reasons=["stop"],
        prompt_tokens=1,
        cached_tokens=1,
        completion_tokens=1,
        queue_s=0.1,
        time_to_first_token_s=0.5,
    )
    record.fail(Overloaded("full", reason="shed_queue"))
    with caplog.at_level(logging.INFO, "gateway"):
        RequestEnds()(record)
    said = {one.getMessage(): (one.name, one.levelname, list(one.__dict__["figures"])) for one in caplog.records}
    assert said == {
        "request": ("gateway.requests", "INFO", fields("request")),
        "load is shed": ("gateway.telemetry.request_ends", "WARNING", fields("load is shed")),
    }
    for event, (name, level, _) in said.items():
        assert f"Logger `{name}`, {level}" in PAGE.split(f"\n### `{event}`\n")[1].split("\n#")[0]
