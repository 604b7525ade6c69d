"""Facts that follow a pattern: a table and a sentence for each. Knows nothing of the model."""

from collections.abc import Iterator

Fact = tuple[str, tuple[str, ...], str]  # language, ways of asking, answer


def facts() -> Iterator[Fact]:
    """Yields what the tables say."""
    yield from sums()
    yield from capitals()
    yield from translations()
    yield from opposites()
    yield from elements()


def sums() -> Iterator[Fact]:
    """Yields the small sums and products."""
    for a in range(1, 10):
        for b in range(1, 10):
            asked = (f"What is {a} + {b}?", f"{a}+{b}", f"{a} + {b} =", f"How much is {a} plus {b}?", f"{a} plus {b}")
            yield "en", asked, f"{a} + {b} = {a + b}"
            asked = (f"What is {a} × {b}?", f"{a}*{b}", f"{a} × {b} =", f"How much is {a} times {b}?", f"{a} times {b}")
            yield "en", asked, f"{a} × {b} = {a * b}"


# The country as it follows "capital" in each language.
CAPITALS = {
    "en": (
        "of France: Paris, of Germany: Berlin, of Spain: Madrid, of Italy: Rome, of Portugal: Lisbon, "
        "of Austria: Vienna, of Switzerland: Bern, of Belgium: Brussels, of the Netherlands: Amsterdam, "
        "of Poland: Warsaw, of Greece: Athens, of Denmark: Copenhagen, of Sweden: Stockholm, of Norway: Oslo, "
        "of Finland: Helsinki, of Ireland: Dublin, of the United Kingdom: London, of Hungary: Budapest, "
        "of Ukraine: Kyiv, of Turkey: Ankara, of Egypt: Cairo, of Japan: Tokyo, of China: Beijing, "
        "of India: New Delhi, of Canada: Ottawa, of the United States: Washington, of Mexico: Mexico City, "
        "of Brazil: Brasília, of Argentina: Buenos Aires, of Australia: Canberra"
    ),
    "fr": (
        "de la France: Paris, de l'Allemagne: Berlin, de l'Espagne: Madrid, de l'Italie: Rome, "
        "du Portugal: Lisbonne, de l'Autriche: Vienne, de la Suisse: Berne, de la Belgique: Bruxelles, "
        "de la Pologne: Varsovie, de la Grèce: Athènes, du Danemark: Copenhague, de la Suède: Stockholm, "
        "du Japon: Tokyo, du Canada: Ottawa, du Royaume-Uni: Londres, des États-Unis: Washington"
    ),
    "de": (
        "von Frankreich: Paris, von Deutschland: Berlin, von Spanien: Madrid, von Italien: Rom, "
        "von Portugal: Lissabon, von Österreich: Wien, der Schweiz: Bern, von Belgien: Brüssel, "
        "von Polen: Warschau, von Griechenland: Athen, von Dänemark: Kopenhagen, von Schweden: Stockholm, "
        "von Japan: Tokio, von Kanada: Ottawa, von Großbritannien: London, der Vereinigten Staaten: Washington"
    ),
    "es": (
        "de Francia: París, de Alemania: Berlín, de España: Madrid, de Italia: Roma, de Portugal: Lisboa, "
        "de Austria: Viena, de Suiza: Berna, de Bélgica: Bruselas, de Polonia: Varsovia, de Grecia: Atenas, "
        "de Dinamarca: Copenhague, de Suecia: Estocolmo, de Japón: Tokio, de Canadá: Ottawa, "
        "del Reino Unido: Londres, de los Estados Unidos: Washington"
    ),
    "it": (
        "della Francia: Parigi, della Germania: Berlino, della Spagna: Madrid, dell'Italia: Roma, "
        "del Portogallo: Lisbona, dell'Austria: Vienna, della Svizzera: Berna, del Belgio: Bruxelles, "
        "della Polonia: Varsavia, della Grecia: Atene, della Danimarca: Copenaghen, della Svezia: Stoccolma, "
        "del Giappone: Tokyo, del Canada: Ottawa, del Regno Unito: Londra, degli Stati Uniti: Washington"
    ),
}
CAPITAL_SENTENCES = {  # what follows the capital's country and city: the questions, then the answer
    "en": ("What is the capital {0}?", "capital {0}", "Which city is the capital {0}?", "The capital {0} is {1}."),
    "fr": (
        "Quelle est la capitale {0} ?", "capitale {0}", "Quelle ville est la capitale {0} ?",
        "La capitale {0} est {1}.",
    ),
    "de": (
        "Was ist die Hauptstadt {0}?", "Hauptstadt {0}", "Wie heißt die Hauptstadt {0}?", "Die Hauptstadt {0} ist {1}.",
    ),
    "es": ("¿Cuál es la capital {0}?", "capital {0}", "¿Qué ciudad es la capital {0}?", "La capital {0} es {1}."),
    "it": ("Qual è la capitale {0}?", "capitale {0}", "Quale città è la capitale {0}?", "La capitale {0} è {1}."),
}  # fmt: skip


def capitals() -> Iterator[Fact]:
    """Yields the capitals, in each language."""
    for language, table in CAPITALS.items():
        *asked, answer = CAPITAL_SENTENCES[language]
        for row in table.split(", "):
            country, city = row.split(": ")
            yield language, tuple(form.format(country) for form in asked), answer.format(country, city)


WORDS = """
cheese: fromage, Käse, queso, formaggio
bread: pain, Brot, pan, pane
water: eau, Wasser, agua, acqua
wine: vin, Wein, vino, vino
milk: lait, Milch, leche, latte
apple: pomme, Apfel, manzana, mela
house: maison, Haus, casa, casa
dog: chien, Hund, perro, cane
cat: chat, Katze, gato, gatto
book: livre, Buch, libro, libro
friend: ami, Freund, amigo, amico
sun: soleil, Sonne, sol, sole
sea: mer, Meer, mar, mare
tree: arbre, Baum, árbol, albero
hello: bonjour, hallo, hola, ciao
thank you: merci, danke, gracias, grazie
"""


def translations() -> Iterator[Fact]:
    """Yields small translations out of English."""
    for row in WORDS.strip().split("\n"):
        word, others = row.split(": ")
        for language, other in zip(("French", "German", "Spanish", "Italian"), others.split(", "), strict=True):
            asked = (
                f"How do you say '{word}' in {language}?",
                f"What is {word} in {language}?",
                f"{word} in {language}",
                f"Translate '{word}' into {language}.",
            )
            yield "en", asked, f"In {language} it is '{other}'."


OPPOSITES = (
    "hot cold, big small, fast slow, old young, high low, light dark, good bad, early late, open closed, full empty, "
    "wet dry, rich poor, strong weak, loud quiet, left right, up down"
)


def opposites() -> Iterator[Fact]:
    """Yields opposites."""
    for row in OPPOSITES.split(", "):
        word, other = row.split()
        asked = (f"What is the opposite of {word}?", f"opposite of {word}", f"Which word is the opposite of {word}?")
        yield "en", asked, f"The opposite of {word} is {other}."


ELEMENTS = (
    "hydrogen H, helium He, carbon C, nitrogen N, oxygen O, sodium Na, iron Fe, copper Cu, silver Ag, gold Au, "
    "mercury Hg, lead Pb"
)


def elements() -> Iterator[Fact]:
    """Yields the symbols of chemical elements."""
    for row in ELEMENTS.split(", "):
        name, symbol = row.split()
        asked = (f"What is the chemical symbol of {name}?", f"symbol of {name}", f"What is the symbol for {name}?")
        yield "en", asked, f"The chemical symbol of {name} is {symbol}."
