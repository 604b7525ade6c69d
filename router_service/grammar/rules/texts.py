"""Spells a text grammar as rules of its texts. Knows the kinds that the doors let through; compiles nothing."""

from __future__ import annotations

import json

from cluster.ebnf import choice, literal
from cluster.json_schema.patterns import of_length, parse_pattern
from cluster.messages import TextGrammar
from router_service.grammar.rules.regexes import class_of, pattern_rule
from router_service.grammar.rules.rules import Rules


def text_rules(grammar: TextGrammar) -> str:
    """The rules in EBNF. Raises ValueError with why there are none."""
    match grammar.kind:
        case "regex":
            rules = Rules()
            return rules.text(pattern_rule(rules, of_length(parse_pattern(grammar.text), 0, None), class_of))
        case "choice":
            return f"root ::= {choice(map(literal, json.loads(grammar.text)))}"
        case "ebnf":
            return grammar.text
