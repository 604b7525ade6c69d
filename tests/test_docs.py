"""README.md and docs/: every file, name and link in them is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from cluster.config import EngineConfig, ExpertsConfig, GatewayConfig, KubernetesConfig
from tests.programs import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def _defined(file: Path) -> set[str]:
    """Functions, classes and their methods, as `Class.method`."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {
                f"{node.name}.{part.name}"
                for part in node.body
                if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)
            }
    return names


def _anchor(heading: str) -> str:
    """As GitHub makes it: lower case, no punctuation, dashes for spaces."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_each_step_of_a_requests_life_is_where_the_page_says() -> None:
    [_, life] = (REPOSITORY / "docs" / "design.md").read_text().split("## A request's life\n")
    steps = re.findall(r"`([\w/]+\.py)`\s+`([\w.]+)`", life.split("\n## ")[0])
    assert len(steps) >= 20
    missing = [(file, name) for file, name in steps if name not in _defined(REPOSITORY / file)]
    assert missing == []


ROOMS = ("cluster", "experts_service", "gateway", "router_service")


def test_every_room_is_in_the_table() -> None:
    """One of them was not."""
    [_, rooms] = (REPOSITORY / "docs" / "design.md").read_text().split("## The rooms\n")
    table = [line for line in rooms.split("\n## ")[0].splitlines() if line.startswith("| ")]
    packages = [file.parent for room in ROOMS for file in (REPOSITORY / room).glob("*/__init__.py")]
    assert [one for one in packages if not any(f"{one.name}/`" in line for line in table)] == []


def test_every_path_on_a_gpu_is_on_its_page() -> None:
    """Each that is told is there, and no module that names CUDA or Triton is missing."""
    page = (REPOSITORY / "docs" / "gpu.md").read_text()
    paths = page.split("\n## Every path\n")[1]
    named = re.findall(r"`([\w/]+\.py)` `([\w.]+)`", paths)
    assert len(named) >= 30
    assert [(file, name) for file, name in named if name not in _defined(REPOSITORY / file)] == []
    told = re.findall(r"`((?:cluster|experts_service|router_service)/[\w/]*(?:\.py|/))`", paths)
    modules = [str(file.relative_to(REPOSITORY)) for room in ROOMS for file in (REPOSITORY / room).rglob("*.py")]
    on_gpus = [
        module
        for module in modules
        if re.search(r"\bcuda\b|is_cuda|\btriton\b", (REPOSITORY / module).read_text(), re.IGNORECASE)
    ]
    assert [module for module in on_gpus if not module.startswith(tuple(told))] == []


LOGGER = ("gateway", "requests")


def test_every_key_of_a_configuration_that_a_page_names_is_one() -> None:
    """What to do about a full gateway was `gateway.replicas`, which is refused."""
    sections = {
        "gateway": GatewayConfig,
        "engine": EngineConfig,
        "experts": ExpertsConfig,
        "kubernetes": KubernetesConfig,
    }
    named = [
        (page.name, section, key)
        for page in PAGES
        for section, key in re.findall(rf"`({'|'.join(sections)})\.(\w+)", page.read_text())
        if not list((REPOSITORY / section).glob(f"{key}*")) and (section, key) != LOGGER  # else it is a module's name
    ]
    assert len(named) > 50
    assert [one for one in named if one[2] not in sections[one[1]].model_fields] == []


def test_each_message_that_can_be_looked_up_is_said_somewhere() -> None:
    """The headings of the page are pieces of messages, as they are in the code."""
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^### (.*)$", page, re.MULTILINE)
    assert len(messages) >= 20
    texts = [file.read_text() for room in ROOMS for file in (REPOSITORY / room).rglob("*.py")]
    joined = [re.sub(r'"\s*\n\s*f?"', "", text) for text in texts]  # strings that go on in the next line
    assert [message for message in messages if not any(message in text for text in joined)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    folders = r"(?:cluster|gateway|router_service|experts_service|tests|k8s|docs)"
    files = set(re.findall(rf"(?<![\w./-])({folders}/[\w./-]+\.(?:py|md|yaml|json|proto|html|png))", text))
    files -= {file for file in files if "…" in file}
    assert sorted(file for file in files if not (REPOSITORY / file).exists()) == []
    broken = []
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        linked = page if not file else (page.parent / file)
        if not linked.exists() or (
            anchor and anchor not in map(_anchor, re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE))
        ):
            broken.append(target)
    assert broken == []
