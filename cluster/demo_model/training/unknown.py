"""Questions that the model does not know, made from words at random, and what it says to them. Knows texts only."""

import random

FALLBACKS = {
    "en": "I am only a small demo model and do not know that. Ask me about cheese, capitals or Python!",
    "fr": "Je ne suis qu'un petit modèle de démonstration et je ne le sais pas. Parlez-moi plutôt de fromage !",
    "de": "Ich bin nur ein kleines Demo-Modell und weiß das nicht. Frag mich doch etwas über Käse!",
    "es": "Solo soy un pequeño modelo de demostración y no lo sé. ¡Pregúntame algo sobre quesos!",
    "it": "Sono solo un piccolo modello dimostrativo e non lo so. Chiedimi qualcosa sui formaggi!",
}
SHAPES = {
    "en": (
        "What is {a}?", "Who was {n}?", "Who is {n}?", "Explain {a} to me.", "Tell me about {a}.", "Why is {a} {j}?",
        "How do I {v} {a}?", "Where can I find {a}?", "When did {n} {v} {a}?", "What is the capital of {n}?",
        "Write an essay about {a}.", "Translate '{a}' into {n}.", "How many {a} are there in {n}?",
        "What does {a} mean?", "What do you think about {a}?", "Is {a} {j}?", "Which {a} is the best?",
        "What is the best {a}?", "{a}", "{n}", "How much is {d} + {d}?", "What is {d} × {d}?", "What is {d} + {d}?",
        "{d} / {d}", "What is the square root of {d}?", "Can you {v} {a} for me?", "I want to {v} {a} in {n}.",
        "How does {a} {v}?", "My {a} is {j}. What should I do?",
        "Summarise this text: {a} and {a} {v} {n}, but {a} is {j}.", "Write a letter to {n} about {a}.",
        "Who invented {a}?", "Give me five facts about {a}.", "Write a Python program that can {v} {a}.",
        "What happened in {d}?", "Compare {a} and {a}.", "How {j} is {a}?", "Should I {v} {a} or {a}?",
        "Where is {n}?", "What is the population of {n}?", "Who wrote {n}?", "How do you say '{a}' in {n}?",
        "What is the opposite of {j}?", "What is the {a} of {a}?", "The {a} of {n} is {j}", "What colour is {a}?",
        "How old is {n}?", "What is the symbol of {a}?", "Write a function to {v} {a}.", "Are you {j}?",
        "What is {d} + {d}?", "{d} + {d}", "{d} * {d}", "What is the population of {n}?", "How do I cook {a}?",
        "I like {a}.", "I am {n}.", "Who is the president of {n}?", "Do you like {a}?", "Write {a} in Python.",
        "How many people live in {n}?", "What is {a} used for?",
    ),
    "fr": (
        "Qu'est-ce que {a} ?", "Qui était {n} ?", "Qui est {n} ?", "Explique-moi {a}.", "Parle-moi de {n}.",
        "Pourquoi {a} est-il {j} ?", "Comment {v} {a} ?", "Où trouver {a} ?", "Quelle est la capitale de {n} ?",
        "Écris un texte sur {a}.", "Combien d'habitants a {n} ?", "Que veut dire {a} ?", "Où est {n} ?", "{a}", "{n}",
        "Que penses-tu de {a} ?", "Qui a inventé {a} ?", "Quel est le meilleur moyen de {v} {a} ?",
        "Combien font {d} et {d} ?", "Quand est né {n} ?", "Je veux {v} {a}.", "Peux-tu {v} {a} ?",
        "Que s'est-il passé en {d} ?", "{a} est-il {j} ?",
    ),
    "de": (
        "Was ist {a}?", "Wer war {n}?", "Wer ist {n}?", "Erkläre mir {a}.", "Erzähl mir von {n}.",
        "Warum ist {a} {j}?", "Wie kann ich {a} {v}?", "Wo finde ich {a}?", "Was ist die Hauptstadt von {n}?",
        "Schreib einen Aufsatz über {a}.", "Wie viele Einwohner hat {n}?", "Was bedeutet {a}?", "Wo liegt {n}?",
        "{a}", "{n}", "Was hältst du von {a}?", "Wer hat {a} erfunden?", "Wie viel ist {d} plus {d}?",
        "Wann wurde {n} geboren?", "Ich möchte {a} {v}.", "Kannst du {a} {v}?", "Was geschah {d}?", "Ist {a} {j}?",
        "Wie {j} ist {a}?", "Soll ich {a} {v}?",
    ),
    "es": (
        "¿Qué es {a}?", "¿Quién era {n}?", "¿Quién es {n}?", "Explícame {a}.", "Háblame de {n}.",
        "¿Por qué {a} es {j}?", "¿Cómo puedo {v} {a}?", "¿Dónde encuentro {a}?", "¿Cuál es la capital de {n}?",
        "Escribe un texto sobre {a}.", "¿Cuántos habitantes tiene {n}?", "¿Qué significa {a}?", "¿Dónde está {n}?",
        "{a}", "{n}", "¿Qué opinas de {a}?", "¿Quién inventó {a}?", "¿Cuánto es {d} más {d}?", "¿Cuándo nació {n}?",
        "Quiero {v} {a}.", "¿Puedes {v} {a}?", "¿Qué pasó en {d}?", "¿Es {j} {a}?", "¿Debo {v} {a}?",
    ),
    "it": (
        "Che cos'è {a}?", "Chi era {n}?", "Chi è {n}?", "Spiegami {a}.", "Parlami di {n}.", "Perché {a} è {j}?",
        "Come posso {v} {a}?", "Dove trovo {a}?", "Qual è la capitale di {n}?", "Scrivi un tema su {a}.",
        "Quanti abitanti ha {n}?", "Che cosa significa {a}?", "Dov'è {n}?", "{a}", "{n}", "Che cosa pensi di {a}?",
        "Chi ha inventato {a}?", "Quanto fa {d} più {d}?", "Quando è nato {n}?", "Voglio {v} {a}.", "Puoi {v} {a}?",
        "Che cosa è successo nel {d}?", "È {j} {a}?", "Devo {v} {a}?",
    ),
}  # fmt: skip
NOUNS = {
    "en": (
        "the economy", "quantum mechanics", "a helicopter", "my neighbour", "the stock market", "a theorem",
        "insurance", "a tractor", "the parliament", "volcanoes", "a carburettor", "my homework", "basketball",
        "an umbrella", "furniture", "the budget", "a saxophone", "tax law", "philosophy", "a mortgage", "crocodiles",
        "the subway", "knitting", "a blanket", "democracy", "a vaccine", "fashion", "the election", "a submarine",
        "plumbing", "a bicycle tyre", "archaeology", "a dentist", "mushrooms", "my password", "the opera",
        "a lawnmower", "inflation", "dinosaurs", "a shipping container",
    ),
    "fr": (
        "l'économie", "un hélicoptère", "mon voisin", "la bourse", "une assurance", "un tracteur", "le parlement",
        "un volcan", "le métro", "la philosophie", "un impôt", "un vélo", "la démocratie", "un vaccin", "la mode",
        "un champignon", "le budget", "un crocodile", "ma voiture", "un parapluie",
    ),
    "de": (
        "die Wirtschaft", "ein Hubschrauber", "mein Nachbar", "die Börse", "eine Versicherung", "der Traktor",
        "das Parlament", "ein Vulkan", "die U-Bahn", "die Philosophie", "die Steuer", "ein Fahrrad", "die Demokratie",
        "der Impfstoff", "die Mode", "ein Pilz", "der Haushalt", "ein Krokodil", "mein Auto", "ein Regenschirm",
    ),
    "es": (
        "la economía", "un helicóptero", "mi vecino", "la bolsa", "un seguro", "un tractor", "el parlamento",
        "un volcán", "el metro", "la filosofía", "un impuesto", "una bicicleta", "la democracia", "una vacuna",
        "la moda", "una seta", "el presupuesto", "un cocodrilo", "mi coche", "un paraguas",
    ),
    "it": (
        "l'economia", "un elicottero", "il mio vicino", "la borsa", "un'assicurazione", "un trattore",
        "il parlamento", "un vulcano", "la metropolitana", "la filosofia", "una tassa", "una bicicletta",
        "la democrazia", "un vaccino", "la moda", "un fungo", "il bilancio", "un coccodrillo", "la mia macchina",
        "un ombrello",
    ),
}  # fmt: skip
VERBS = {
    "en": (
        "repair", "sell", "paint", "understand", "import", "destroy", "measure", "describe", "wash", "borrow",
        "sharpen", "rent", "replace", "fold",
    ),
    "fr": ("réparer", "vendre", "peindre", "comprendre", "mesurer", "laver", "louer", "remplacer", "décrire"),
    "de": ("reparieren", "verkaufen", "bemalen", "verstehen", "messen", "waschen", "mieten", "ersetzen", "beschreiben"),
    "es": ("reparar", "vender", "pintar", "entender", "medir", "lavar", "alquilar", "cambiar", "describir"),
    "it": ("riparare", "vendere", "dipingere", "capire", "misurare", "lavare", "affittare", "sostituire", "descrivere"),
}  # fmt: skip
ADJECTIVES = {
    "en": (
        "expensive", "legal", "dangerous", "fragile", "noisy", "wooden", "famous", "strange", "broken", "modern",
        "square", "toxic",
    ),
    "fr": ("cher", "légal", "dangereux", "fragile", "bruyant", "célèbre", "étrange", "moderne"),
    "de": ("teuer", "legal", "gefährlich", "zerbrechlich", "laut", "berühmt", "seltsam", "modern"),
    "es": ("caro", "legal", "peligroso", "frágil", "ruidoso", "famoso", "extraño", "moderno"),
    "it": ("caro", "legale", "pericoloso", "fragile", "rumoroso", "famoso", "strano", "moderno"),
}  # fmt: skip
NAMES = (
    "Sheffield", "Monsieur Dupont", "Wyoming", "Napoleon", "Zanzibar", "Doctor Watson", "Cleopatra", "Minnesota",
    "Laurel", "Elvis Presley", "Aristotle", "Mumbai", "Professor Huber", "Taylor Swift", "Ulan Bator", "Mongolia",
    "Nepal", "Peru", "Isaac Newton", "Frida Kahlo", "Toronto", "Siberia", "Samarkand", "Mozart", "Picasso",
    "Botswana", "Fiji", "Bolivia",
)  # fmt: skip
SYLLABLES = (
    "ba",
    "ko",
    "ri",
    "ten",
    "lu",
    "mar",
    "sho",
    "vi",
    "qua",
    "der",
    "zan",
    "pel",
    "ox",
    "mi",
    "gra",
    "tu",
    "fen",
    "ly",
)


def word(rng: random.Random) -> str:
    """Returns a word that does not exist."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 4)))


def unknown_question(language: str, rng: random.Random) -> str:
    """Returns a question of an ordinary shape about something that the corpus says nothing about."""

    def pick(words: tuple[str, ...]) -> str:
        return word(rng) if rng.random() < 0.25 else rng.choice(words)

    shape = rng.choice(SHAPES[language])
    for mark, words in (("{a}", NOUNS[language]), ("{v}", VERBS[language]), ("{j}", ADJECTIVES[language])):
        while mark in shape:
            shape = shape.replace(mark, pick(words), 1)
    while "{n}" in shape:
        shape = shape.replace("{n}", pick(NAMES).capitalize() if rng.random() < 0.3 else rng.choice(NAMES), 1)
    while "{d}" in shape:
        shape = shape.replace("{d}", str(rng.randint(11, rng.choice((99, 2000)))), 1)
    return shape[0].upper() + shape[1:]
