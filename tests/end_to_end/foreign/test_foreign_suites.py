"""Test suites that others wrote, or made of what others wrote, each in an environment of its own, against one server.

What cannot pass is listed with its reason in `suites/waivers.toml`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.demo_model import DENSE_DIRECTORY, DIRECTORY
from tests.conftest import running_server
from tests.environments import cached_environment, run_in

SUITES = Path(__file__).parent / "suites"
# A model this small may never end a string of its own; OpenAI's suite names OpenAI's models.
CONFIG = {
    "models": [
        {"name": "manta-demo", "path": str(DIRECTORY), "engine": {"max_model_len": 8192, "num_threads": 1}},
        {"name": "mistral-embed", "path": str(DENSE_DIRECTORY), "kind": "embedding", "pooling": "mean"},
    ],
    "gateway": {"accept_any_model": True},
}


@dataclass(frozen=True)
class Suite:
    """Files of pytest's, ours or those of a package's source distribution, which its wheel has not."""

    name: str  # of a folder with requirements.txt
    files: tuple[str, ...]
    sources_of: str | None = None


OPENAI_FILES = (
    "test_completions.py",
    "test_embeddings.py",
    "test_models.py",
    "test_responses.py",
    "chat/test_completions.py",
)
ALL = (
    Suite("langchain_standard", ("chat.py", "responses.py", "mistral.py", "embeddings.py")),
    Suite("openai_agents", ("agents_with_tools.py",)),
    Suite("pydantic_ai", ("agents.py",)),
    Suite("instructor", ("modes.py",)),
    Suite("openai_python", tuple(f"tests/api_resources/{name}" for name in OPENAI_FILES), sources_of="openai"),
)


@pytest.fixture(scope="module")
def any_model_server():
    with running_server(json.dumps(CONFIG)) as server:
        yield server


@pytest.mark.long
@pytest.mark.parametrize("suite", ALL, ids=lambda suite: suite.name)
def test_what_others_expect(suite, any_model_server):
    folder = SUITES / suite.name
    environment = cached_environment(folder / "requirements.txt", sources_of=suite.sources_of)
    root = environment.sources or folder
    base_url = f"{any_model_server.url}/v1"
    output = run_in(
        environment.python,
        *("-m", "pytest", "-c", SUITES / "pytest.ini", f"--rootdir={root}", f"--confcutdir={root}"),
        *("--suite", suite.name, *(root / name for name in suite.files)),
        environment={
            "PYTHONPATH": str(SUITES),
            "OPENAI_API_KEY": "none",
            "OPENAI_BASE_URL": base_url,
            "MISTRAL_API_KEY": "none",
            "TEST_API_BASE_URL": base_url,
            "MANTA_URL": any_model_server.url,
            "HF_HUB_OFFLINE": "1",
        },
        timeout_s=1500,  # ten times what it takes
    )
    print(output)
    assert re.search(r"\d+ passed", output)
