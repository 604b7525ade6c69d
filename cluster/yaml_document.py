"""Reads YAML by which something is decided: a repeated key, or a value that is not what its tag says, is an error.

PyYAML alone takes the last of two equal keys, leaves `!!int "abc"` to a ValueError that shows the text, and recurses as
deep as the text is nested. Knows no key by name; every error names the line.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import yaml

from cluster.errors import ConfigError

MAX_DEPTH = 32
MAX_MANIFEST_DEPTH = 100  # a schema of Kubernetes' is 50 deep


@dataclass(frozen=True)
class YamlDocument:
    """What a text says, and in which lines."""

    value: Any
    root: yaml.Node | None  # None: nothing

    def line(self, *path: object) -> int:
        """Of the entry at a path of keys and indices; where there is none, of what is around it."""
        node, line = self.root, 1
        if node is not None:
            line = node.start_mark.line + 1
        for part in path:
            entries: dict[object, tuple[yaml.Node, yaml.Node]] = {}  # where an entry begins, and what it holds
            if isinstance(node, yaml.SequenceNode):
                entries = {index: (one, one) for index, one in enumerate(node.value)}
            elif isinstance(node, yaml.MappingNode):
                entries = {key.value: (key, one) for key, one in node.value if isinstance(key.value, str)}
            if part not in entries:
                break
            start, node = entries[part]
            line = start.start_mark.line + 1
        return line


def parse_yaml(text: bytes | str, source: str, *, secret: bool = False) -> YamlDocument:
    """Raises ConfigError. Of a secret text no error shows anything, and aliases, by which it can grow, are refused."""
    try:
        text = text if isinstance(text, str) else text.decode()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{source}, line {line}: not UTF-8") from None
    with _opened(text, source, _SecretLoader if secret else _Loader) as loader:
        root = loader.get_single_node()
        return YamlDocument(None if root is None else loader.construct_document(root), root)


def parse_manifests(text: str, source: str) -> list[Any]:
    """Every document of a long text, by libyaml, which is ten times as fast; repeated keys pass. Raises ConfigError."""
    loader = getattr(yaml, "CSafeLoader", _Loader)
    try:
        _bound_depth(text, loader)
        return list(yaml.load_all(text, Loader=loader))
    except Exception:  # whatever int, datetime and the rest say; ours says where
        with _opened(text, source, _ManifestLoader) as own:
            documents = []
            while own.check_data():  # type: ignore[no-untyped-call]
                documents.append(own.get_data())
            return documents


def _bound_depth(text: str, loader: Any) -> None:
    """Raises ValueError. libyaml's loader recurses in C, where enough brackets end the process."""
    depth = 0
    for event in yaml.parse(text, Loader=loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_MANIFEST_DEPTH:
            raise ValueError


@contextmanager
def _opened(text: str, source: str, kind: type[_Loader]) -> Iterator[_Loader]:
    loader: _Loader | None = None
    try:
        loader = kind(text)
        yield loader
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{source}, line {line}: a character that YAML does not allow") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = 1 if mark is None else mark.line + 1
        if isinstance(error, _Refused):
            raise ConfigError(f"{source}, line {line}: {error.problem}") from None
        problem = "neither YAML nor JSON" if kind is _SecretLoader else f"not YAML: {error.problem}"
        raise ConfigError(f"{source}, line {line}: {problem}") from None
    finally:
        if loader is not None:
            loader.dispose()


class _Refused(yaml.MarkedYAMLError):
    """YAML, but not for us. The message shows nothing of the text."""

    def __init__(self, problem: str, node: yaml.Node | yaml.Event) -> None:
        super().__init__(problem=problem, problem_mark=node.start_mark)  # type: ignore[arg-type]  # of either parser


class _Loader(yaml.SafeLoader):
    max_depth = MAX_DEPTH

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._looked_at: set[yaml.Node] = set()

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        if self._depth > self.max_depth:
            raise _Refused(f"nested more than {self.max_depth} deep", self.peek_event())  # type: ignore[no-untyped-call]
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """PyYAML's turns `<<` into the keys that it merges, beside its own ones: those are looked at before."""
        if node not in self._looked_at:
            self._looked_at.add(node)
            seen = set()
            for key, _ in node.value:
                name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
                if name is not None and name in seen:
                    raise _Refused("a key for the second time", key)
                seen.add(name)
        super().flatten_mapping(node)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception:  # whatever int, datetime and the rest say of a text that is none
            raise _Refused("a value that is not what its tag says", node) from None


class _ManifestLoader(_Loader):
    max_depth = MAX_MANIFEST_DEPTH


class _SecretLoader(_Loader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise _Refused("an alias, which is not taken here", self.peek_event())  # type: ignore[no-untyped-call]
        return super().compose_node(parent, index)
