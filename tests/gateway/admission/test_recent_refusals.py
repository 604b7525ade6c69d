"""A burst that a coordinator refuses costs it one call in a moment, and other callers nothing."""

from __future__ import annotations

import gc
import weakref

import httpx
import pytest

from cluster.errors import Overloaded
from cluster.messages import ModelCard
from gateway.admission import recent_refusals
from gateway.admission.recent_refusals import HOLD_S, RecentRefusals
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, failing_script, http_server


def test_a_refusal_holds_for_a_moment_for_its_caller_and_model_only() -> None:
    now = [0.0]
    refusals = RecentRefusals(lambda: now[0])
    refusals.note("mixtral", "alice", Overloaded("full", retry_after_s=3))
    with pytest.raises(Overloaded, match="full") as refused:
        refusals.check("mixtral", "alice")
    assert refused.value.retry_after_s == 3
    refusals.check("mixtral", "bob")
    refusals.check("mistral", "alice")
    now[0] += HOLD_S
    refusals.check("mixtral", "alice")


def test_a_burst_is_refused_without_a_call_for_each(card: ModelCard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent_refusals, "HOLD_S", 60.0)  # longer than the burst takes
    coordinator = ScriptedCoordinator(failing_script([], Overloaded("full", retry_after_s=3)))
    body = {"model": "tiny", "prompt": "Hello"}
    with http_server(build_frontend(card, coordinator)) as url, httpx.Client(base_url=url) as client:
        answers = [client.post("/v1/completions", json=body) for _ in range(40)]
    assert {(answer.status_code, answer.headers["retry-after"]) for answer in answers} == {(429, "3")}
    assert len(coordinator.requests) == 1


def test_what_was_refused_is_let_go() -> None:
    """Until somebody else was refused, the traceback of the last error held the request's prompt."""

    class Prompt:
        pass

    def refused() -> tuple[Overloaded, weakref.ref[Prompt]]:
        prompt = Prompt()
        try:
            raise Overloaded("full")
        except Overloaded as error:
            return error, weakref.ref(prompt)

    refusals = RecentRefusals(lambda: 0.0)
    error, prompt = refused()
    refusals.note("m", "alice", error)
    del error
    gc.collect()
    assert prompt() is None
    with pytest.raises(Overloaded, match="full"):
        refusals.check("m", "alice")
