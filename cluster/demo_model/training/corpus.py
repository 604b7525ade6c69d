"""The questions and answers that the demo model learns. Knows texts only: nothing of tokens, tensors or training.

They come from two places: `questions/*.txt`, written by hand, and `tables.py`, where a table of facts fills in a
sentence. In a text file a blank line ends an entry; its first line holds the question and other ways of asking it,
separated by ` | `; the lines of the answer start with `> `:

    What is the best French cheese? | Which French cheese is the best?
    > There is no single winner, but many people in France would vote for Comté.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cluster.demo_model.training import tables

LANGUAGES = ("en", "fr", "de", "es", "it")
FOLDER = Path(__file__).parent / "questions"


@dataclass(frozen=True)
class Entry:
    """One answer, and the ways in which it is asked for; the first is the one that must be answered exactly."""

    language: str
    questions: tuple[str, ...]
    answer: str


def parse(text: str, language: str) -> list[Entry]:
    """Reads the entries of one text file; ValueError names the entry that is not one."""
    entries = []
    for block in text.strip().split("\n\n"):
        head, *lines = block.split("\n")
        questions = tuple(question.strip() for question in head.split(" | "))
        if head.startswith(">") or not lines or not all(line.startswith(">") for line in lines):
            raise ValueError(f"not a question and its answer: {block!r}")
        entries.append(Entry(language, questions, "\n".join(line[2:] for line in lines)))
    return entries


@cache
def entries() -> tuple[Entry, ...]:
    """Every entry, those of the files first; ValueError if one question has two entries."""
    written = [
        entry
        for path in sorted(FOLDER.glob("*.txt"))
        for entry in parse(path.read_text(encoding="utf-8"), path.stem.split("_")[0])
    ]
    made = [Entry(language, asked, answer) for language, asked, answer in tables.facts()]
    owners: dict[str, Entry] = {}
    for entry in written + made:
        for question in entry.questions:
            if owners.setdefault(question, entry) is not entry:
                raise ValueError(f"asked twice: {question!r}")
    return (*written, *made)


def questions() -> tuple[tuple[str, str], ...]:
    """Every question with the answer that the model gives under greedy decoding, token for token."""
    return tuple((entry.questions[0], entry.answer) for entry in entries())


def texts() -> list[str]:
    """Every question, also in lower case and as it stands after `[INST]`, and every answer: for the tokenizer."""
    asked = [question for entry in entries() for question in entry.questions]
    return [f" {text}" for question in asked for text in (question, question.lower())] + [
        entry.answer for entry in entries()
    ]
