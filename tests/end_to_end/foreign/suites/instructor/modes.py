"""instructor in each of its modes of an OpenAI client: objects, lists, streams of them, and questions asked again."""

from collections.abc import Iterable
from typing import Literal

import instructor
import openai
import pytest
from instructor import Mode
from instructor.core import IncompleteOutputException
from pydantic import BaseModel, Field, field_validator

QUESTION = [{"role": "user", "content": "What is the best French cheese?"}]
MODES = (Mode.TOOLS, Mode.TOOLS_STRICT, Mode.JSON_SCHEMA, Mode.RESPONSES_TOOLS)


class Visit(BaseModel):
    city: Literal["Paris", "Lyon"]
    days: int = Field(ge=1, le=9)
    by_train: bool


class Trip(BaseModel):
    visits: list[Visit] = Field(min_length=1, max_length=2)
    budget: float | None


def client(mode):
    made = instructor.from_openai(openai.OpenAI(max_retries=0), mode=mode)
    limit = {"max_output_tokens": 500} if mode is Mode.RESPONSES_TOOLS else {"max_tokens": 500}
    return made, {"model": "manta-demo", "temperature": 0, **limit}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wanted", [Visit, Trip])
def test_an_object(mode, wanted):
    made, settings = client(mode)
    assert isinstance(made.create(response_model=wanted, messages=QUESTION, max_retries=0, **settings), wanted)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wanted", [int, bool, Literal["red", "green"]], ids=str)
def test_a_simple_type(mode, wanted):
    made, settings = client(mode)
    answer = made.create(response_model=wanted, messages=QUESTION, max_retries=0, **settings)
    assert isinstance(answer, wanted) if isinstance(wanted, type) else answer in ("red", "green")


@pytest.mark.parametrize("mode", MODES)
async def test_an_async_client_and_the_raw_answer(mode):
    _, settings = client(mode)
    made = instructor.from_openai(openai.AsyncOpenAI(max_retries=0), mode=mode)
    answer, raw = await made.create_with_completion(response_model=Visit, messages=QUESTION, max_retries=0, **settings)
    assert isinstance(answer, Visit)
    assert raw.usage.total_tokens > 0


@pytest.mark.parametrize("mode", MODES)
def test_a_partial_stream(mode):
    made, settings = client(mode)
    states = list(made.create_partial(response_model=Visit, messages=QUESTION, max_retries=0, **settings))
    assert len(states) > 1
    assert Visit.model_validate(states[-1].model_dump())


def test_an_iterable():
    """The demo model likes an empty list best."""
    made, settings = client(Mode.JSON_SCHEMA)
    settings |= {"temperature": 1.5, "response_model": Iterable[Visit], "messages": QUESTION, "max_retries": 0}
    lists = (list(made.create(stream=True, seed=seed, **settings)) for seed in range(50))
    answers = next(filter(None, lists))
    assert all(isinstance(answer, Visit) for answer in answers)


@pytest.mark.parametrize("mode", MODES)
def test_asked_again_after_a_validator_said_no(mode):
    tries = []

    class Patient(Visit):
        @field_validator("days")
        @classmethod
        def once_more(cls, days):
            tries.append(days)
            if len(tries) == 1:
                raise ValueError("not today")
            return days

    made, settings = client(mode)
    assert isinstance(made.create(response_model=Patient, messages=QUESTION, max_retries=2, **settings), Patient)
    assert len(tries) == 2


def test_an_answer_that_is_cut_is_told_as_such():
    made, settings = client(Mode.TOOLS)
    with pytest.raises(IncompleteOutputException):
        made.create(response_model=Trip, messages=QUESTION, max_retries=0, **{**settings, "max_tokens": 5})


@pytest.mark.parametrize("mode", MODES)
def test_twenty_turns(mode):
    """Each object is part of what the next is asked with."""
    made, settings = client(mode)
    messages = list(QUESTION)
    for turn in range(20):
        visit = made.create(response_model=Visit, messages=messages, max_retries=0, **settings)
        assert isinstance(visit, Visit)
        messages += [
            {"role": "assistant", "content": visit.model_dump_json()},
            {"role": "user", "content": f"And then, after {turn + 1}?"},
        ]
