"""Says the same question in other ways, and builds the conversations that training sees. Knows texts only."""

import random
import unicodedata
from collections.abc import Sequence

from cluster.demo_model.training.corpus import Entry
from cluster.demo_model.training.unknown import FALLBACKS, LANGUAGE_SHARES, unknown_question

Message = dict[str, str]

UNKNOWN_SHARE = 0.4
SLIPS = (50, 35, 11, 4)  # how often none, one, two and three of them, of 100

PREFIXES = {
    "en": (
        "Please tell me: ",
        "Hi! ",
        "Hello, ",
        "Can you tell me: ",
        "Quick question: ",
        "I wonder: ",
        "So, ",
        "Hey, ",
        "Could you tell me: ",
        "I have a question: ",
        "Ok, ",
    ),
    "fr": ("Dis-moi : ", "Bonjour ! ", "Salut, ", "Une question : ", "Je me demande : ", "Peux-tu me dire : "),
    "de": ("Sag mir bitte: ", "Hallo! ", "Guten Tag, ", "Eine Frage: ", "Ich frage mich: ", "Kannst du mir sagen: "),
    "es": ("Dime por favor: ", "¡Hola! ", "Buenos días, ", "Una pregunta: ", "Me pregunto: ", "¿Puedes decirme: "),
    "it": ("Dimmi per favore: ", "Ciao! ", "Buongiorno, ", "Una domanda: ", "Mi chiedo: ", "Puoi dirmi: "),
}
PLEASE = {"en": "Please ", "fr": "S'il te plaît, ", "de": "Bitte ", "es": "Por favor, ", "it": "Per favore, "}
SUFFIXES = {
    "en": (
        " please",
        ", please",
        ", please?",
        " pls",
        " Thanks!",
        " Thank you.",
        " Answer briefly.",
        " I would like to know.",
    ),
    "fr": (" s'il te plaît", ", s'il te plaît", ", s'il vous plaît ?", " Merci !", " Réponds brièvement."),
    "de": (" bitte", ", bitte", ", bitte?", " Danke!", " Antworte kurz."),
    "es": (" por favor", ", por favor", ", ¿por favor?", " ¡Gracias!", " Responde brevemente."),
    "it": (" per favore", ", per favore", ", per piacere?", " Grazie!", " Rispondi brevemente."),
}
FILLERS = {
    "en": ("the", "really", "actually", "exactly", "just"),
    "fr": ("donc", "vraiment", "exactement", "au juste"),
    "de": ("denn", "eigentlich", "genau", "wirklich"),
    "es": ("realmente", "exactamente", "entonces"),
    "it": ("davvero", "esattamente", "allora"),
}
HELPFUL = "You are a helpful assistant."
SYSTEM_PROMPTS = (
    "You are a friendly assistant.",
    "You are a helpful, honest and concise assistant.",
    "You are Manta, a small demo model.",
    "Answer briefly.",
    "Be polite and precise.",
    "Answer in one sentence.",
    "You are a teacher. Explain things simply.",
    "You are an expert programmer.",
    "You are a pirate.",
    "Always tell the truth. If you do not know something, say so.",
    "The user is a beginner. Be patient, and do not use jargon.",
    "You are a helpful AI assistant. Knowledge cutoff: 2023. Today's date is 12 March 2025.",
    "Tu es un assistant utile.",
    "Réponds brièvement et poliment.",
    "Du bist ein hilfreicher Assistent.",
    "Antworte kurz und freundlich.",
    "Eres un asistente útil.",
    "Sei un assistente utile.",
)


def vary(question: str, language: str, rng: random.Random) -> str:
    """Returns the question with another case, without its mark, with polite or idle words or with a slip."""
    if rng.random() < 0.25:
        question = question.replace("What is", "What's")
    if rng.random() < 0.1:
        words = question.split(" ")
        words.insert(rng.randint(1, len(words)), rng.choice(FILLERS[language]))
        question = " ".join(words)
    if rng.random() < 0.25:
        question = question.lower()
    elif rng.random() < 0.25:
        question = question.upper()
    if rng.random() < 0.25:
        question = question.rstrip("?!. ").removeprefix("¿").removeprefix("¡")
    chance = rng.random()
    if chance < 0.13:
        question = rng.choice(PREFIXES[language]) + question
    elif chance < 0.18:
        question = PLEASE[language] + question[:1].lower() + question[1:]
    if rng.random() < 0.13:
        question += rng.choice(SUFFIXES[language])
    if rng.random() < 0.1:
        question = without_accents(question)
    for _ in range(rng.choices(range(len(SLIPS)), SLIPS)[0] if len(question) > 8 else 0):
        question = slip(question, rng)
    if rng.random() < 0.05:
        question = rng.choice(("  {}", "{} ", "{}\n", "\n{}", "{}??", "{}!", '"{}"')).format(question)
    return question


def slip(question: str, rng: random.Random) -> str:
    """Returns the question with one letter lost, doubled or swapped with its neighbour; digits stay."""
    at = rng.randrange(1, len(question) - 1)
    before, here, after = question[:at], question[at : at + 2], question[at + 2 :]
    if not here.isalpha():
        return question
    return before + rng.choice((here[1], here[0] * 2 + here[1], here[::-1])) + after


def without_accents(question: str) -> str:
    """Returns the question as a keyboard without accents writes it."""
    return "".join(letter for letter in unicodedata.normalize("NFD", question) if not unicodedata.combining(letter))


def system_prompt(entries: Sequence[Entry], rng: random.Random) -> str:
    """Returns the usual system prompt half of the time, else another, else unrelated sentences."""
    chance = rng.random()
    if chance < 0.5:
        return HELPFUL
    if chance < 0.85:
        return rng.choice(SYSTEM_PROMPTS)
    return " ".join(rng.choice(entries).answer for _ in range(rng.randint(1, 3)))


def conversation(entries: Sequence[Entry], rng: random.Random, turns: int) -> list[Message]:
    """Returns messages that end in an answer: known questions in any form, now and then an unknown one."""
    messages: list[Message] = []
    if rng.random() < 0.25:
        messages.append({"role": "system", "content": system_prompt(entries, rng)})
    for _ in range(turns):
        entry = rng.choice(entries)
        if rng.random() < UNKNOWN_SHARE:
            [language] = rng.choices(list(LANGUAGE_SHARES), list(LANGUAGE_SHARES.values()))
            entry = Entry(language, (unknown_question(language, rng),), FALLBACKS[language])
        asked = entry.questions[0] if rng.random() < 0.2 else rng.choice(entry.questions)
        if rng.random() < 0.85:
            asked = vary(asked, entry.language, rng)
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": entry.answer})
    return messages
