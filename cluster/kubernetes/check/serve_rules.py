"""The Serve configuration inside a RayService: Ray's own schema, and what the pods around it have to offer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cluster.errors import ConfigError
from cluster.kubernetes.check.documents import Document
from cluster.kubernetes.check.shapes import TEXTS, Shape, misshapen
from cluster.yaml_document import parse_yaml

FIELD = "spec.serveConfigV2"
_CONFIG: Shape = {
    "http_options": {"port": int, "host": str},
    "grpc_options": {"port": int},
    "applications": [{"deployments": [{}]}],
}


def serve_problems(document: Document) -> Iterator[str]:
    """Of a RayService."""
    if document.kind != "RayService":
        return
    spec = document.body.get("spec") or {}
    config, problem = _parse(spec.get("serveConfigV2"))
    if config is None:
        yield f"{document}: {FIELD}: {problem}"
        return
    if wrong := list(misshapen(config, _CONFIG)):
        yield from (f"{document}: {FIELD}: {one}" for one in wrong)
        return
    if problem:
        yield f"{document}: {FIELD}: {problem}"
    for path in _unknown_keys(config):
        yield f"{document}: {FIELD}: {path}: Serve knows no such key, and would pass over it"
    cluster = spec.get("rayClusterConfig") or {}
    groups = cluster.get("workerGroupSpecs") or []
    for path, selector in _selectors(config, FIELD):
        if wrong := list(misshapen(selector, TEXTS, path)):
            yield from (f"{document}: {one}" for one in wrong)
        elif not any(_satisfies(group.get("labels") or {}, selector) for group in groups):
            wanted = ", ".join(f"{key}: {value}" for key, value in selector.items())
            yield f"{document}: {path}: no worker group has the labels {wanted}"
    yield from _ports(document, config, groups)


def _parse(text: object) -> tuple[dict[str, Any] | None, str]:
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    if not isinstance(text, str) or not text.strip():
        return None, "there is none; it is a YAML text"
    try:
        config = parse_yaml(text, "the text").value
    except ConfigError as error:
        return None, error.message
    if not isinstance(config, dict):
        return None, "is no mapping"
    try:
        ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return config, f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    except Exception as error:  # Ray looks for the policies that are named, and does not check all that it takes
        return config, f"Serve cannot read it: {error}"
    return config, ""


def _unknown_keys(config: dict[str, Any]) -> Iterator[str]:
    """What Serve's schema takes without a word."""
    from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

    yield from (key for key in config if key not in ServeDeploySchema.model_fields)
    for number, application in enumerate(config.get("applications") or []):
        path = f"applications.{number}"
        yield from (f"{path}.{key}" for key in application if key not in ServeApplicationSchema.model_fields)
        for index, deployment in enumerate(application.get("deployments") or []):
            known = DeploymentSchema.model_fields
            yield from (f"{path}.deployments.{index}.{key}" for key in deployment if key not in known)


def _selectors(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Whatever stands for a label selector in the document, of options and of our own arguments."""
    if isinstance(node, dict):
        for key, value in node.items():
            here = f"{path}.{key}"
            if key == "label_selector" and value:
                yield here, value
            elif key == "placement_group_bundle_label_selector" and isinstance(value, list):
                yield from ((f"{here}[{i}]", one) for i, one in enumerate(value) if one)
            else:
                yield from _selectors(value, here)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _selectors(value, f"{path}[{index}]")


def _satisfies(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """By Ray's rules: a value, `in(a, b)`, or one of them after `!`."""
    for key, wanted in selector.items():
        negated = wanted.startswith("!")
        values = wanted.removeprefix("!")
        if values.startswith("in("):
            values = values.removeprefix("in(").removesuffix(")")
        if (labels.get(key) in [value.strip() for value in values.split(",")]) == negated:
            return False
    return True


def _ports(document: Document, config: dict[str, Any], groups: list[dict[str, Any]]) -> Iterator[str]:
    """The doors' ports are those of the containers that are selected for them."""
    doors = {
        "http_options": ((config.get("http_options") or {}).get("port", 8000), "serve"),
        "grpc_options": ((config.get("grpc_options") or {}).get("port", 9000), "grpc"),
    }
    named: dict[str, set[int]] = {}
    for group in groups:
        for container in ((group.get("template") or {}).get("spec") or {}).get("containers", []):
            for port in container.get("ports", []):
                named.setdefault(str(port.get("name")), set()).add(port.get("containerPort"))
    for option, (port, name) in doors.items():
        if name in named and named[name] != {port}:
            have = ", ".join(str(one) for one in sorted(named[name]))
            yield f"{document}: {FIELD}.{option}.port: {port}, and the containers' port {name!r} is {have}"
    host = (config.get("http_options") or {}).get("host", "0.0.0.0")
    if host not in ("0.0.0.0", "::"):
        yield f"{document}: {FIELD}.http_options.host: {host!r} cannot be reached from another pod"
