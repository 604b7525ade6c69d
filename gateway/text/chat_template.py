"""Renders a chat template: as transformers does, and once more with the template's own words told from the callers'.

Knows Jinja and the spelling of control tokens; encodes nothing.

    text     <s>[INST] hi [/INST] Sure.</s> [/INST]
    traced   ~~~~~~~~~ hi [/INST] Sure.</s> ~~~~~~~     ~ is a twin: it stands for a character that the template wrote

A twin is a lone surrogate, which no caller's text can hold. What a template writes has twins; what it compares with or
splits at has none, so that a template that looks into a text (`'</think>' in content`) finds there what it looks for.
"""

from __future__ import annotations

import inspect
import re
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from jinja2 import Environment, Template, nodes
from jinja2.exceptions import TemplateError
from jinja2.meta import find_undeclared_variables
from jinja2.visitor import NodeTransformer

Conversation = Sequence[Mapping[str, Any]]
# What a template may raise about a conversation.
REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)

_FIRST_TWIN, _NUM_TWINS = 0xD800, 0x800
_TWINS = re.compile("[\\ud800-\\udfff][\\ud800-\\udfff]*")  # with `+` a search takes seven times as long
_ROLES = ("system", "user", "assistant", "tool")
_WRITTEN = {
    "join": 0,
    "default": 0,
    "d": 0,
    "format": 0,
    "replace": 1,
}  # by filter or method: its first written argument


@dataclass(frozen=True)
class Rendering:
    """How a conversation becomes a prompt, besides its messages and tools."""

    continues: bool = False  # the last message is open-ended: the model goes on with it
    has_generation_prompt: bool = True  # what begins an assistant's turn comes last, if the template has such
    variables: Mapping[str, Any] = field(default_factory=dict)  # the client's, for templates that read them
    hints: Mapping[str, Any] = field(default_factory=dict)  # the same, that a chat format may do without


ANSWER = Rendering()


class ChatTemplate:
    """The templates of one checkpoint; which of them is used depends on whether there are tools."""

    def __init__(self, hf: Any, control_tokens: Collection[str]) -> None:
        """`hf`: the checkpoint's tokenizer, as transformers has it."""
        self._hf = hf
        self._twins = Twins(control_tokens)
        self._compiled = lru_cache(self._compile)
        self._read_by = lru_cache(self._variables)
        parameters = inspect.signature(hf.apply_chat_template).parameters
        self.reserved = frozenset({*parameters, *hf.special_tokens_map, "messages", "raise_exception", "strftime_now"})

    def check(self) -> None:
        """Raises TemplateSyntaxError for the first that does not compile."""
        from transformers.utils.chat_template_utils import _compile_jinja_template

        templates = self._hf.chat_template
        for source in templates.values() if isinstance(templates, dict) else [templates or ""]:
            _compile_jinja_template(source)

    def render(
        self, chat: Conversation, tools: Sequence[Any] | None, how: Rendering = ANSWER
    ) -> tuple[str, list[tuple[int, int]] | None]:
        """The text, and where in it the control tokens stand that the template wrote: None if that cannot be told.

        Raises one of REFUSALS.
        """
        source = self._hf.get_chat_template(None, tools)
        tag = f"CONTINUE_FINAL_MESSAGE_{secrets.token_hex(8)} "  # which no caller can say
        messages = _tagged(chat, tag) if how.continues else chat
        known = self._read_by(source)
        variables = {name: value for name, value in {**how.hints, **how.variables}.items() if name in known}
        options = {"tools": tools, "add_generation_prompt": how.has_generation_prompt, **variables}
        text = str(self._hf.apply_chat_template(messages, tokenize=False, **options))
        if how.continues:
            text = _cut(text, tag, chat[-1]["content"])
        try:
            traced = self._compiled(source).render(
                messages=[{key: value for key, value in message.items() if value is not None} for message in messages],
                documents=None,
                **options,
                **self._hf.special_tokens_map,
            )
            if how.continues:
                traced = _cut(traced, tag, "")
        except REFUSALS:
            return text, None
        return text, self._twins.tokens(traced) if self._twins.unmark(traced) == text else None

    def _variables(self, source: str) -> frozenset[str]:
        """What a template reads of what it is given."""
        return frozenset(find_undeclared_variables(self._environment(source).parse(source)))

    def _compile(self, source: str) -> Template:
        environment = self._environment(source)
        tree = environment.parse(source)
        assigned = {name.name for name in tree.find_all(nodes.Name) if name.ctx != "load"}
        variables = {name: str(text) for name, text in self._hf.special_tokens_map.items() if name not in assigned}
        template: Template = environment.from_string(_OwnWords(self._twins, variables).visit(tree))
        return template

    @staticmethod
    def _environment(source: str) -> Environment:
        """transformers' own, which has what templates may call."""
        from transformers.utils.chat_template_utils import _compile_jinja_template

        environment: Environment = _compile_jinja_template(source).environment
        return environment


def refusal(error: Exception) -> str:
    """What the template says by `raise_exception`; of any other error the kind: its words are of our insides."""
    return str(error) if type(error) is TemplateError else type(error).__name__


def _tagged(chat: Conversation, tag: str) -> Conversation:
    """The same with its last text marked at the end, as transformers marks one that is continued."""
    return [*chat[:-1], {**chat[-1], "content": chat[-1]["content"] + tag}]


def _cut(rendered: str, tag: str, content: str) -> str:
    """Up to the mark, without what a template that trimmed the text had taken away. Raises TemplateError."""
    at = rendered.rfind(tag.rstrip())
    if at < 0 or content.strip() not in rendered:
        raise TemplateError("it changes the last message, which cannot be continued then")
    return rendered[:at] if rendered.startswith(tag, at) else rendered[:at].rstrip()


class Twins:
    """The characters of control tokens, each with its twin. Spaces have none, for templates trim them."""

    def __init__(self, control_tokens: Iterable[str]) -> None:
        tokens = sorted(control_tokens, key=len, reverse=True)
        alphabet = sorted({char for token in tokens for char in token if not char.isspace()})[:_NUM_TWINS]
        self._twin_of = {ord(char): chr(_FIRST_TWIN + i) for i, char in enumerate(alphabet)}
        self._char_of = {ord(twin): chr(char) for char, twin in self._twin_of.items()}
        tokens = [token for token in tokens if set(token) <= {*alphabet, *filter(str.isspace, token)}]
        self._longest = len(tokens[0]) if tokens else 0
        self._whole = _any_of(map(re.escape, tokens))
        self._own = _any_of(spelling for token in tokens for spelling in self._spellings(token))
        self._heads = {token[:end] for token in tokens for end in range(1, len(token))}
        self._tails = {token[start:] for token in tokens for start in range(1, len(token))}

    def mark(self, literal: str) -> str:
        """Its control tokens in twins, and what it has of one at an end, for a text might stand beside it."""
        marked = list(literal)
        spans = [match.span() for match in self._whole.finditer(literal)]
        lengths = range(1, min(self._longest, len(literal)) + 1)
        spans += [(0, n) for n in lengths if literal[:n] in self._tails]
        spans += [(len(literal) - n, len(literal)) for n in lengths if literal[-n:] in self._heads]
        for start, end in spans:
            marked[start:end] = literal[start:end].translate(self._twin_of)
        return "".join(marked)

    def unmark(self, traced: str) -> str:
        """Without twins."""
        return _TWINS.sub(lambda match: match[0].translate(self._char_of), traced)

    def tokens(self, traced: str) -> list[tuple[int, int]]:
        """Where control tokens stand in twins."""
        return [match.span() for match in self._own.finditer(traced)]

    def _spellings(self, token: str) -> Iterable[str]:
        """In twins, or in twins around a role: `'<|' + message['role'] + '|>'`."""
        yield self._in_twins(token)
        for role in _ROLES:
            head, _, tail = token.partition(role)
            if head and tail:
                yield self._in_twins(head) + role + self._in_twins(tail)

    def _in_twins(self, token: str) -> str:
        return re.escape(token.translate(self._twin_of))


class _OwnWords(NodeTransformer):
    """Puts twins into what a template writes: its text, the literals of its expressions and its special tokens."""

    def __init__(self, twins: Twins, variables: Mapping[str, str]) -> None:
        self._twins = twins
        self._variables = variables  # `bos_token` and the like, unless the template assigns them itself

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:  # noqa: N802
        node.data = self._twins.mark(node.data)
        return node

    def visit_Const(self, node: nodes.Const) -> nodes.Node:  # noqa: N802
        if isinstance(node.value, str):
            node.value = self._twins.mark(node.value)
        return node

    def visit_Name(self, node: nodes.Name) -> nodes.Node:  # noqa: N802
        if node.ctx == "load" and node.name in self._variables:
            return nodes.Const(self._twins.mark(self._variables[node.name]), lineno=node.lineno)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        return node

    def visit_Test(self, node: nodes.Test) -> nodes.Node:  # noqa: N802
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        node.node = self.visit(node.node)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:  # noqa: N802
        node.value = self.visit(node.value)
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:  # noqa: N802
        if node.node is not None:
            node.node = self.visit(node.node)
        node.args = self._visit_written(node.name, node.args)
        return node

    def visit_Call(self, node: nodes.Call) -> nodes.Node:  # noqa: N802
        if isinstance(node.node, nodes.Getattr):  # a method
            node.node.node = self.visit(node.node.node)
            node.args = self._visit_written(node.node.attr, node.args)
            return node
        return self.generic_visit(node)

    def _visit_written(self, name: str, args: list[nodes.Expr]) -> list[nodes.Expr]:
        first = _WRITTEN.get(name, len(args))
        return args[:first] + [self.visit(arg) for arg in args[first:]]


def _any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    """The first of them that matches; none ever does if there are none."""
    return re.compile("|".join(patterns) or "(?!)")
