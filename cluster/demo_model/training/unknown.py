"""Questions that the model does not know, and what it says to them. Knows texts only.

They come from `unknown_questions/*.txt`: whole questions, and patterns that words fill in. And they come from questions
that it does know, in which one word is another, which end otherwise, or of which two are mixed: so it learns that an
answer hangs on every word, and not on the first three.
"""

import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cluster.demo_model.training.corpus import LANGUAGES, entries

FOLDER = Path(__file__).parent / "unknown_questions"
LANGUAGE_SHARES = {"en": 0.44, "fr": 0.14, "de": 0.14, "es": 0.14, "it": 0.14}
SECTIONS = {
    "# Words whose place another may take without making another question of it": "idle",
    "# Words for the patterns": "words",
    "# Patterns": "patterns",
    "# Endings that make another question of a known one": "endings",
    "# Whole questions": "questions",
}

FALLBACKS = {
    "en": "I am only a small demo model and do not know that. Ask me about cheese, capitals or Python!",
    "fr": "Je ne suis qu'un petit modèle de démonstration et je ne le sais pas. "
    "Parlez-moi plutôt de fromage, de capitales ou de planètes !",
    "de": "Ich bin nur ein kleines Demo-Modell und weiß das nicht. "
    "Frag mich doch nach Käse, Hauptstädten oder Planeten!",
    "es": "Solo soy un pequeño modelo de demostración y no lo sé. ¡Pregúntame por quesos, capitales o planetas!",
    "it": "Sono solo un piccolo modello dimostrativo e non lo so. Chiedimi di formaggi, capitali o pianeti!",
}
SYLLABLES = (
    "ba", "ko", "ri", "ten", "lu", "mar", "sho", "vi", "qua", "der", "zan", "pel", "ox", "mi", "gra", "tu", "fen", "ly",
)  # fmt: skip


@dataclass(frozen=True)
class Unknown:
    """What `unknown_questions/` has for one language."""

    idle: frozenset[str]
    words: dict[str, tuple[str, ...]]  # by the name that stands for one of them in a pattern
    patterns: tuple[str, ...]
    endings: tuple[str, ...]
    questions: tuple[str, ...]


@cache
def unknown(language: str) -> Unknown:
    """Reads the file of one language."""
    lines: dict[str, list[str]] = {}
    for line in (FOLDER / f"{language}.txt").read_text(encoding="utf-8").splitlines():
        if line in SECTIONS:
            section = lines.setdefault(SECTIONS[line], [])
        else:
            section.append(line)
    words = {name: tuple(row.split(", ")) for name, row in (line.split(": ", 1) for line in lines.pop("words"))}
    idle = frozenset(lines.pop("idle")[0].split(", "))
    return Unknown(idle, words, **{name: tuple(rows) for name, rows in lines.items()})


@cache
def idle() -> frozenset[str]:
    """The idle words of all languages."""
    return frozenset().union(*(unknown(language).idle for language in LANGUAGES))


def plain(question: str) -> str:
    """Returns the question in lower case without its marks: what two wordings have in common."""
    return " ".join(re.findall(r"\w+|[+×*/-]", question.lower()))


def gist(question: str) -> frozenset[str]:
    """Returns the words that make it this question, in no order."""
    return frozenset(plain(question).split()) - idle()


@cache
def known() -> frozenset[str]:
    """Every question of the corpus, without its marks."""
    return frozenset(plain(question) for entry in entries() for question in entry.questions)


@cache
def known_gists() -> frozenset[frozenset[str]]:
    """What every question of the corpus is about."""
    return frozenset(gist(question) for entry in entries() for question in entry.questions)


def is_known(question: str) -> bool:
    """Whether the corpus has it, in these words or in another order."""
    return plain(question) in known() or gist(question) in known_gists()


@cache
def asked(language: str) -> tuple[str, ...]:
    """Every question of the corpus in this language, but for sums."""
    return tuple(
        question
        for entry in entries()
        if entry.language == language
        for question in entry.questions
        if not any(letter.isdigit() for letter in question)
    )


@cache
def own_words(language: str) -> tuple[str, ...]:
    """Words of the corpus' own questions."""
    return tuple(sorted({word for question in asked(language) for word in re.findall(r"[^\W\d_]{4,}", question)}))


@cache
def other_words(language: str) -> tuple[str, ...]:
    """Words of the patterns' lists, without articles."""
    lists = unknown(language).words.values()
    return tuple(text.split(" ")[-1].split("'")[-1] for words in lists for text in words)


def invented(language: str, rng: random.Random) -> str:
    """Returns a word that does not exist: syllables, or the halves of two words."""
    if rng.random() < 0.4:
        return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 4)))
    first, second = rng.choice(other_words(language)), rng.choice(other_words(language))
    return first[: (len(first) + 1) // 2] + second[len(second) // 2 :]


def unknown_question(language: str, rng: random.Random) -> str:
    """Returns a question about something that the corpus says nothing about."""
    chance = rng.random()
    if chance < 0.20:
        return rng.choice(unknown(language).questions)
    if chance < 0.21:
        return long_text(language, rng)
    makers = [*[near_miss] * 5, crossed, extended, *[patterned] * 5]
    if language == "en":
        makers.append(sum_with)
    maker = rng.choice(makers)
    while True:
        question = maker(language, rng)
        if not is_known(question):
            return question


def patterned(language: str, rng: random.Random) -> str:
    """Returns a question of an ordinary shape, filled in with words at random."""
    return fill(rng.choice(unknown(language).patterns), language, rng)


def fill(pattern: str, language: str, rng: random.Random) -> str:
    """Returns the pattern with a word for each name in it."""

    def pick(match: re.Match[str]) -> str:
        if match[1] == "number":
            return str(rng.randint(11, rng.choice((99, 2000))))
        return invented(language, rng) if rng.random() < 0.06 else rng.choice(unknown(language).words[match[1]])

    return re.sub(r"\{(\w+)\}", pick, pattern)


def near_miss(language: str, rng: random.Random) -> str:
    """Returns a known question with another word in the place of one, or of two, or with one more."""
    question = rng.choice(asked(language))
    for _ in range(rng.choice((1, 1, 1, 2))):
        places = [match for match in re.finditer(r"[^\W\d_]{3,}", question) if match[0].lower() not in idle()]
        if not places:
            break
        place = rng.choice(places)
        chance = rng.random()
        other = rng.choice(own_words(language)) if chance < 0.25 else rng.choice(other_words(language))
        if chance > 0.93:
            other = invented(language, rng)
        if not place[0][0].isupper() and language != "de":
            other = other[0].lower() + other[1:]
        elif place[0][0].isupper() and rng.random() < 0.8:
            other = other[0].upper() + other[1:]
        end = place.start() if rng.random() < 0.2 else place.end()
        question = f"{question[: place.start()]}{other}{' ' if end == place.start() else ''}{question[end:]}"
    return question


def extended(language: str, rng: random.Random) -> str:
    """Returns a known question that goes on: a story, but about a dragon."""
    question = rng.choice(asked(language)).rstrip(" .!")
    mark = " ?" if question.endswith(" ?") else "?" if question.endswith("?") else ""
    ending = fill(rng.choice(unknown(language).endings), language, rng)
    return f"{question.removesuffix(mark)} {ending}{mark}"


def crossed(language: str, rng: random.Random) -> str:
    """Returns the beginning of one known question with the end of another, or now and then without."""
    first, second = (rng.choice(asked(language)).split(" ") for _ in range(2))
    begin = first[: rng.randint(1, max(1, len(first) - 1))]
    end = second[rng.randint(1, max(1, len(second) - 1)) :] if rng.random() < 0.9 else []
    return " ".join([*begin, *end])


def long_text(language: str, rng: random.Random) -> str:
    """Returns a request and a text, or words without one."""
    words = unknown(language).words
    pieces = [rng.choice(words[rng.choice(("thing", "quality", "action"))]) for _ in range(rng.randint(4, 40))]
    request = rng.choice(unknown(language).questions)
    return f"{request} {' '.join(pieces)}." if rng.random() < 0.7 else " ".join(pieces)


def sum_with(language: str, rng: random.Random) -> str:
    """Returns a sum that the tables do not have; they are in English."""
    assert language == "en"
    a, b = rng.randint(1, 20), rng.randint(1, 20)
    form = rng.choice(
        (
            "{a} - {b}", "What is {a} - {b}?", "What is {a} minus {b}?", "{a} / {b}", "What is {a} divided by {b}?",
            "{a} + {b} + {c}", "What is {a} × {b} × {c}?", "{c} + {b}", "What is {b} + {c}?", "What is {c} × {b}?",
            "What is {c} + {d}?", "What is {c} times {d}?", "{c}*{d}", "{c}+{b}", "How much is {c} plus {b}?",
            "What is {c}% of {d}?", "{a}^{b}", "What is the square root of {c}?", "{a} > {b}?", "{c}",
        )
    )  # fmt: skip
    return form.format(a=a, b=b, c=rng.randint(10, 99), d=rng.randint(10, 999))
