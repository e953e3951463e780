"""How ready a model is to say "I don't know.", and what refusing at random would give.

A model that refuses everything never invents anything. So a rate of refusals on unknown people means nothing without
the rate on known ones, and both are set beside a control: the same model, whose refusals were dealt out at random in
the same number. The score below ranks questions by readiness, whatever the model does in the end; the area under its
curve is in `evaluation.scores.refusal`.
"""

from collections.abc import Sequence

from puna.chat import Continuation, Generator
from puna.posttrain.languages import REFUSALS
from puna.posttrain.tasks.item import Item
from puna.posttrain.tasks.runner import Outcome


def refusal_scores(generator: Generator, items: Sequence[Item]) -> list[float]:
    """The log-likelihood in nats of the refusal, in the question's language, as the answer to each item.

    Items are of the tasks `facts` and `unknown`, whose checks name the language.
    """
    return generator.score([Continuation(text=REFUSALS[item.check["language"]], dialog=item.dialog) for item in items])


def random_refusals(known: Sequence[Outcome], unknown: Sequence[Outcome]) -> dict[str, float]:
    """What is expected if as many refusals as were made fell on known and unknown people alike.

    `known_answered`: the share of known facts answered rightly, if those that are not refused are right as often as
    now; `known_refused` and `unknown_refused`: both the overall rate of refusal.
    """
    refused = sum(outcome.refused for outcome in (*known, *unknown)) / max(1, len(known) + len(unknown))
    answered = [outcome.passed for outcome in known if not outcome.refused]
    right = sum(answered) / len(answered) if answered else 0.0
    return {"known_answered": (1 - refused) * right, "known_refused": refused, "unknown_refused": refused}
