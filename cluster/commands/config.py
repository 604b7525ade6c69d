"""`manta config`: every key of the configuration, as Markdown. What a key means is `cluster.config`'s."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from cluster.config import MantaConfig

_INTRODUCTION = """\
# Configuration

`manta serve --config FILE` takes a YAML file with these keys. `manta config` prints this page. An unknown key is
refused, and the message names the nearest known one. [serving.md](serving.md#the-configuration-file) has an example.
"""


def reference() -> str:
    """The page docs/configuration.md: a table for each section of the file."""
    return "\n".join([_INTRODUCTION, *_section(MantaConfig, "", {})]).rstrip() + "\n"


def _section(section: type[BaseModel], path: str, seen: dict[type[BaseModel], str]) -> Iterator[str]:
    """Markdown of one section, then of those that its keys open.

    `path`: how the file reaches it, `models[].engine`. `seen`: where a kind of section was shown before.
    """
    if path:
        yield f"## `{path}`\n"
    if section in seen:
        yield f"The keys of `{seen[section]}`.\n"
        return
    seen[section] = path
    yield f"{inspect.cleandoc(section.__doc__ or '')}\n"
    yield "| key | value | default | what it says |\n|---|---|---|---|"
    inner: list[tuple[type[BaseModel], str]] = []
    for name, field in section.model_fields.items():
        yield f"| `{name}` | {_type(field)} | {_default(field)} | {' '.join((field.description or '').split())} |"
        inner += [(model, f"{path}.{name}{suffix}".lstrip(".")) for model, suffix in _models(field.annotation)]
    yield ""
    for model, where in inner:
        yield from _section(model, where, seen)


def _models(annotation: Any) -> Iterator[tuple[type[BaseModel], str]]:
    """The sections that a value may be, with what follows the key: nothing, `[]` in a list, `{}` in a mapping."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, ""
    suffix = {tuple: "[]", dict: "{}"}.get(get_origin(annotation), "")
    for part in get_args(annotation):
        for model, below in _models(part):
            yield model, suffix + below


def _type(field: FieldInfo) -> str:
    """What a value may be, in words, with its bounds."""
    bounds = [
        f"{sign} {value:g}"
        for constraint in field.metadata
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
        if (value := getattr(constraint, name, None)) is not None
    ]
    return ", ".join([_words(field.annotation), *bounds])


def _words(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(part) for part in arguments if part is not types.NoneType)
    if origin is tuple:
        return f"list of {_words(arguments[0])}"
    if origin is dict:
        return f"mapping of {_words(arguments[0])} to {_words(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path"}[annotation]


def _default(field: FieldInfo) -> str:
    value = field.default
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "none"
    if isinstance(value, BaseModel):
        return "its defaults"
    if value in ({}, ()):
        return "empty"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"
