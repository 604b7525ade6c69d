"""What was said so far, and the settings of the next answer. Plain data; knows neither a terminal nor HTTP."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Conversation:
    """Turns that strictly alternate between user and assistant, under an optional system message."""

    system: str | None = None
    temperature: float | None = None  # None: the server's default
    turns: list[tuple[str, str]] = field(default_factory=list)  # (user, assistant), complete or partial

    def messages(self, prompt: str) -> list[dict[str, str]]:
        """The messages that ask for the answer to `prompt`."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for user, assistant in self.turns:
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        return [*messages, {"role": "user", "content": prompt}]

    def sampling(self) -> dict[str, Any]:
        """The settings that differ from the server's defaults."""
        return {} if self.temperature is None else {"temperature": self.temperature}

    def record(self, prompt: str, answer: str) -> None:
        """Keep a turn. One without an answer is dropped, question included, so that roles go on alternating."""
        if answer:
            self.turns.append((prompt, answer))

    def reset(self) -> None:
        """Forget what was said; system message and temperature stay."""
        self.turns.clear()
