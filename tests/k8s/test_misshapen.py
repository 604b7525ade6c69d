"""`manta k8s check` with manifests in which something is not of its shape: a sentence with the path, and no traceback.

`containers: [1]`, `template: x` and the like ended in an AttributeError, and brackets by the thousand in a crash.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cluster.cli import app
from cluster.errors import ConfigError
from cluster.kubernetes.check.documents import Document
from cluster.kubernetes.check.problems import problems
from tests.k8s.overlays import REPOSITORY

BASE = REPOSITORY / "k8s" / "base"
OVERLAY = REPOSITORY / "k8s" / "overlays" / "cpu-demo"
Path_ = tuple[str | int, ...]


def valid() -> list[dict[str, Any]]:
    """The demo's manifests and those of the base, as they are written."""
    files = [OVERLAY / "rendered.yaml", *sorted(BASE.glob("*.yaml"))]
    found = [one for file in files for one in yaml.safe_load_all(file.read_text()) if isinstance(one, dict)]
    return [one for one in found if {"apiVersion", "kind", "metadata"} <= one.keys()]


DOCUMENTS = valid()


def places(node: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Every place of a document but the whole and what makes it a document."""
    if path and path not in (("kind",), ("apiVersion",)):
        yield path
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in entries:
        yield from places(value, (*path, key))


PLACES = [(number, path) for number, document in enumerate(DOCUMENTS) for path in places(document)]
WRONG: list[Any] = [None, 1, -1.5, True, "x", "", [], [1], [None], ["x"], [[]], [{}], {}, {"x": 1}, {1: "x"}]


def replaced(number: int, path: Path_, value: Any) -> list[str]:
    documents = list(DOCUMENTS)
    documents[number] = copy.deepcopy(DOCUMENTS[number])
    node: Any = documents[number]
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    return list(problems([Document("demo", document) for document in documents]))


def within(number: int, path: Path_, value: Any) -> list[str]:
    """The same inside of the Serve configuration, which is a text in a manifest."""
    document = copy.deepcopy(DOCUMENTS[number])
    config = yaml.safe_load(document["spec"]["serveConfigV2"])
    node = config
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    document["spec"]["serveConfigV2"] = yaml.safe_dump(config)
    return list(problems([Document("demo", document)]))


@given(st.sampled_from(PLACES), st.sampled_from(WRONG))
@settings(max_examples=12, deadline=None)
def test_whatever_stands_anywhere_is_judged(place: tuple[int, Path_], value: Any) -> None:
    found = replaced(*place, value)
    assert all(problem.startswith("demo: ") for problem in found)


@pytest.mark.long
@given(st.sampled_from(PLACES), st.sampled_from(WRONG))
@settings(max_examples=1200, deadline=None)
def test_whatever_stands_anywhere_is_judged_many_times(place: tuple[int, Path_], value: Any) -> None:
    replaced(*place, value)


SERVICE = next(number for number, document in enumerate(DOCUMENTS) if document["kind"] == "RayService")
SERVE_PLACES = list(places(yaml.safe_load(DOCUMENTS[SERVICE]["spec"]["serveConfigV2"])))


@given(st.sampled_from(SERVE_PLACES), st.sampled_from(WRONG))
@settings(max_examples=12, deadline=None)
def test_and_within_the_serve_configuration(path: Path_, value: Any) -> None:
    assert all(problem.startswith("demo: ") for problem in within(SERVICE, path, value))


POD = "spec.rayClusterConfig.workerGroupSpecs[0].template"


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("template", "x", f"{POD}: has to be a mapping, and is a text"),
        ("template.spec", [], f"{POD}.spec: has to be a mapping, and is a list"),
        ("template.spec.containers", 1, f"{POD}.spec.containers: has to be a list, and is a whole number"),
        ("template.spec.containers", [1], f"{POD}.spec.containers[0]: has to be a mapping, and is a whole number"),
        (
            "template.spec.containers",
            [{"env": {}}],
            f"{POD}.spec.containers[0].env: has to be a list, and is a mapping",
        ),
        ("minReplicas", "1", f"{POD.removesuffix('template')}minReplicas: has to be a whole number, and is a text"),
        ("labels", {"a": 1}, f"{POD.removesuffix('template')}labels.a: has to be a text, and is a whole number"),
    ],
)
def test_the_path_of_what_is_misshapen_is_told(path: str, value: Any, problem: str) -> None:
    *before, last = path.split(".")
    where: Path_ = ("spec", "rayClusterConfig", "workerGroupSpecs", 0, *before, last)
    assert f"demo: RayService/manta: {problem}" in replaced(SERVICE, where, value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 50_000, "nested more than"),
        ("- " * 50_000, "nested more than"),
        ("a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
            f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
        ) + "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\n", "more than 200000 values"),
        ("apiVersion: v1\nkind: ConfigMap\nmetadata: &m {name: x, labels: *m}\n", "nested more than"),
    ],
    ids=["brackets", "dashes", "aliases of aliases", "a mapping in itself"],
)  # fmt: skip
def test_a_text_that_grows_or_is_too_deep_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "it.yaml").write_text(text)
    result = CliRunner().invoke(app, ["k8s", "check", str(tmp_path / "it.yaml")])
    assert isinstance(result.exception, ConfigError)
    assert said in result.exception.message
