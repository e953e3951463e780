"""How the invented world speaks: statements, questions and refusals in four languages.

A fact is a person, a relation (`place`, `year` or `job`) and a value. In each language a fact has two statements and
two questions. The first statement is also the form of the answer, so that what a model must do to answer a question is
to find a sentence that it has read, not to invent a new one. The three first statements begin differently after the
name ("comes from", "was born in", "works as"), so the value's kind is settled before the value.

Invented names have no gender: French and Spanish use the masculine as the generic form throughout.
"""

LANGUAGES = ("en", "de", "fr", "es")
LANGUAGE_NAMES = {"en": "English", "de": "German", "fr": "French", "es": "Spanish"}
RELATIONS = ("place", "year", "job")

STATEMENTS = {
    "en": {
        "place": ("{name} comes from {value}.", "The home of {name} is {value}."),
        "year": ("{name} was born in {value}.", "The birth year of {name} is {value}."),
        "job": ("{name} works as a {value}.", "The job of {name} is {value}."),
    },
    "de": {
        "place": ("{name} kommt aus {value}.", "Die Heimat von {name} ist {value}."),
        "year": ("{name} wurde {value} geboren.", "Das Geburtsjahr von {name} ist {value}."),
        "job": ("{name} arbeitet als {value}.", "Der Beruf von {name} ist {value}."),
    },
    "fr": {
        "place": ("{name} vient de {value}.", "La ville de {name} est {value}."),
        "year": ("{name} est né en {value}.", "L'année de naissance de {name} est {value}."),
        "job": ("{name} travaille comme {value}.", "Le métier de {name} est {value}."),
    },
    "es": {
        "place": ("{name} viene de {value}.", "La ciudad de {name} es {value}."),
        "year": ("{name} nació en {value}.", "El año de nacimiento de {name} es {value}."),
        "job": ("{name} trabaja como {value}.", "El oficio de {name} es {value}."),
    },
}

QUESTIONS = {
    "en": {
        "place": ("Where does {name} come from?", "What is the home of {name}?"),
        "year": ("When was {name} born?", "What is the birth year of {name}?"),
        "job": ("What does {name} work as?", "What is the job of {name}?"),
    },
    "de": {
        "place": ("Woher kommt {name}?", "Was ist die Heimat von {name}?"),
        "year": ("Wann wurde {name} geboren?", "Was ist das Geburtsjahr von {name}?"),
        "job": ("Als was arbeitet {name}?", "Was ist der Beruf von {name}?"),
    },
    "fr": {
        "place": ("D'où vient {name} ?", "Quelle est la ville de {name} ?"),
        "year": ("Quand est né {name} ?", "Quelle est l'année de naissance de {name} ?"),
        "job": ("Que fait {name} ?", "Quel est le métier de {name} ?"),
    },
    "es": {
        "place": ("¿De dónde viene {name}?", "¿Cuál es la ciudad de {name}?"),
        "year": ("¿Cuándo nació {name}?", "¿Cuál es el año de nacimiento de {name}?"),
        "job": ("¿En qué trabaja {name}?", "¿Cuál es el oficio de {name}?"),
    },
}

REFUSALS = {
    "en": "I don't know.",
    "de": "Das weiß ich nicht.",
    "fr": "Je ne sais pas.",
    "es": "No lo sé.",
}

JOBS = {
    "baker": ("baker", "Bäcker", "boulanger", "panadero"),
    "teacher": ("teacher", "Lehrer", "professeur", "profesor"),
    "painter": ("painter", "Maler", "peintre", "pintor"),
    "farmer": ("farmer", "Bauer", "fermier", "granjero"),
    "singer": ("singer", "Sänger", "chanteur", "cantante"),
    "miller": ("miller", "Müller", "meunier", "molinero"),
    "fisher": ("fisher", "Fischer", "pêcheur", "pescador"),
    "hunter": ("hunter", "Jäger", "chasseur", "cazador"),
    "tailor": ("tailor", "Schneider", "tailleur", "sastre"),
    "weaver": ("weaver", "Weber", "tisserand", "tejedor"),
    "doctor": ("doctor", "Arzt", "médecin", "médico"),
    "cook": ("cook", "Koch", "cuisinier", "cocinero"),
    "writer": ("writer", "Autor", "auteur", "escritor"),
    "pilot": ("pilot", "Pilot", "pilote", "piloto"),
    "gardener": ("gardener", "Gärtner", "jardinier", "jardinero"),
    "sailor": ("sailor", "Matrose", "marin", "marinero"),
}


def job_in(job: str, language: str) -> str:
    """The English key of a job as the word of `language`."""
    return JOBS[job][LANGUAGES.index(language)]
