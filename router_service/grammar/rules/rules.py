"""Rules of a grammar as xgrammar reads them, in EBNF; each expression once. Knows no JSON."""

from __future__ import annotations

_MAX_RULES = 20_000


class Rules:
    """Grows by `add`; a body names other rules."""

    def __init__(self) -> None:
        self._bodies: dict[str, str] = {}
        self._names: dict[tuple[str, int | None], str] = {}  # by body and most characters
        self._max_chars: dict[str, int] = {}

    def add(self, body: str, *, max_chars: int | None = None) -> str:
        """The name of the rule with that body. Raises ValueError if there are too many.

        Past `max_chars` characters the rule ends as soon as it can.
        """
        if (body, max_chars) not in self._names:
            name = self._names[body, max_chars] = self.reserve()
            self.set(name, body)
            if max_chars is not None:
                self._max_chars[name] = max_chars
        return self._names[body, max_chars]

    def reserve(self) -> str:
        """A name whose body is set later, for what refers to itself."""
        if len(self._bodies) >= _MAX_RULES:
            raise ValueError("it is too large")
        name = f"r{len(self._bodies)}"
        self._bodies[name] = ""
        return name

    def set(self, name: str, body: str) -> None:
        """The body of a reserved name."""
        self._bodies[name] = body

    def text(self, root: str) -> str:
        """The grammar that begins with the rule `root`."""
        limits = {name: f"[max_chars={most}]" for name, most in self._max_chars.items()}
        rules = (f"{name}{limits.get(name, '')} ::= {body}" for name, body in self._bodies.items())
        return "\n".join([f"root ::= {root}", *rules])
