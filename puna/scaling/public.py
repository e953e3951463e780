"""What others have published: laws, and models with their sizes, tokens and scores. Each number has its source.

`chinchilla()` is the law to start with where no runs of one's own exist. Its losses are DeepMind's: nats per token of
*their* text and tokenizer. Differences between models mean something on other text, the number itself does not.
"""

from dataclasses import dataclass

import numpy as np

from puna.errors import ConfigError
from puna.scaling.accuracy import Accuracy
from puna.scaling.frontier import Frontier
from puna.scaling.law import Law, Seen

_EXPONENT_ERROR = 0.02  # of alpha and of beta, one standard error, as published
_RUN_SCATTER = 0.005  # log loss; the size of the refit's residuals
_DRIFT_PER_DECADE = 0.005  # log loss; ours, see docs/scaling.md: no public figure is better than such a guess


def chinchilla(draws: int = 400) -> Law:
    """Chinchilla's parametric law as Epoch AI refitted it (Besiroglu et al. 2024, arXiv 2404.10102).

    The constants that Hoffmann et al. 2022 print (E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28) come from a fit that
    stopped early and contradict their own two other approaches; they are not offered.

    Published are standard errors of single constants, not how they go together. A and B are all but functions of
    alpha and beta, so each draw takes exponents from their published errors and lets every term keep its value in the
    middle of DeepMind's runs, where the data are: there the law is certain to its scatter, and spreads away from it.
    """
    e, a, alpha, b, beta = 1.8172, 482.01, 0.3478, 2085.43, 0.3658
    seen = Seen(parameters=(70e6, 16e9), tokens=(5e9, 500e9), ratio=(2.0, 200.0))  # "70M to over 16B, 5B to 500B"
    middle_n, middle_d = (float(np.sqrt(r[0] * r[1])) for r in (seen.parameters, seen.tokens))
    random = np.random.default_rng(0)
    alphas, betas = (x + _EXPONENT_ERROR * random.standard_normal(draws) for x in (alpha, beta))
    rows = np.stack(
        [
            np.full(draws, e),
            a * middle_n ** (alphas - alpha),
            alphas,
            b * middle_d ** (betas - beta),
            betas,
        ],
        axis=1,
    )
    return Law(
        name="chinchilla",
        source="Besiroglu et al. 2024, arXiv 2404.10102: refit of Hoffmann et al. 2022 (arXiv 2203.15556), approach 3",
        counts="all", e=e, a=a, alpha=alpha, b=b, beta=beta, draws=rows,
        noise=_RUN_SCATTER, drift=_DRIFT_PER_DECADE, seen=seen,
    )  # fmt: skip


def llama3() -> Frontier:
    """Optimal tokens of the Llama 3 paper, by the constants in its *figure*: D* = 0.299 * C^0.537.

    The text rounds them to 0.29 and 0.53, which at 3.8e25 FLOPs gives 605B parameters instead of 393B: do not use those.
    The paper gives no interval; fit its points (`isoflop.fit`) to have one.
    """
    return Frontier(
        name="llama-3",
        source="Llama 3 paper (arXiv 2407.21783), figure 3: alpha = 0.537, A = 0.299",
        counts="all", factor=0.299, exponent=0.537, draws=np.zeros((0, 2)), largest_flops=1e22,
    )  # fmt: skip


LAWS = {"chinchilla": chinchilla, "llama-3": llama3}


def law(name: str) -> Law | Frontier:
    """A public law by its name. Raises `ConfigError` for an unknown one."""
    if name not in LAWS:
        raise ConfigError(f"no public scaling law is called {name!r}", hint=f"one of {', '.join(LAWS)}")
    return LAWS[name]()


@dataclass(frozen=True)
class PublicModel:
    """A released base model: parameters, tokens trained on, and its score on MMLU (a share)."""

    name: str
    generation: str  # of data: the same loss by the law is worth more on better data
    parameters: float
    tokens: float
    mmlu: float  # 5-shot
    source: str


_CHANCE = 0.25  # MMLU has four options
_LLAMA2_PAPER = "Llama 2 paper (arXiv 2307.09288), tables 1 and 3"
_LLAMA31_CARD = "model card of Llama 3.1"
MODELS = (
    PublicModel("llama-1-7b", "1", 6.7e9, 1.0e12, 0.351, _LLAMA2_PAPER),
    PublicModel("llama-1-13b", "1", 13.0e9, 1.0e12, 0.469, _LLAMA2_PAPER),
    PublicModel("llama-1-33b", "1", 32.5e9, 1.4e12, 0.578, _LLAMA2_PAPER),
    PublicModel("llama-1-65b", "1", 65.2e9, 1.4e12, 0.634, _LLAMA2_PAPER),
    PublicModel("llama-2-7b", "2", 6.7e9, 2.0e12, 0.453, _LLAMA2_PAPER),
    PublicModel("llama-2-13b", "2", 13.0e9, 2.0e12, 0.548, _LLAMA2_PAPER),
    PublicModel("llama-2-34b", "2", 34e9, 2.0e12, 0.626, _LLAMA2_PAPER),
    PublicModel("llama-2-70b", "2", 69e9, 2.0e12, 0.689, _LLAMA2_PAPER),
    PublicModel("llama-3.1-8b", "3.1", 8.03e9, 15e12, 0.667, _LLAMA31_CARD),
    PublicModel("llama-3.1-70b", "3.1", 70.6e9, 15e12, 0.793, _LLAMA31_CARD),
    PublicModel("llama-3.1-405b", "3.1", 405.9e9, 15.6e12, 0.852, _LLAMA31_CARD),
)


def mmlu(generation: str = "3.1", draws: int = 400) -> Accuracy:
    """MMLU (5-shot, base model) against the loss that `chinchilla()` gives a model's size and tokens.

    Fitted here to the released Llamas: log odds above chance are a line in the loss, one slope for all, one offset for
    each generation of data. Eleven models and four constants, so the interval is wide, and rightly.
    """
    law_ = chinchilla(0)
    loss = np.array([law_.loss(m.parameters, m.tokens).value for m in MODELS])
    share = (np.array([m.mmlu for m in MODELS]) - _CHANCE) / (1 - _CHANCE)
    odds = np.log(share / (1 - share))
    generations = sorted({m.generation for m in MODELS})
    if generation not in generations:
        raise ConfigError(f"no generation {generation!r} of Llama's data", hint=f"one of {', '.join(generations)}")
    columns = [loss - loss.mean(), *(np.array([m.generation == g for m in MODELS], float) for g in generations)]
    design = np.stack(columns, axis=1)
    fitted, *_ = np.linalg.lstsq(design, odds, rcond=None)
    residuals = (odds - design @ fitted) * np.sqrt(len(odds) / (len(odds) - design.shape[1]))
    random = np.random.default_rng(0)
    resampled = design @ fitted + random.choice(residuals, (draws, len(odds)))
    drawn = np.linalg.lstsq(design, resampled.T, rcond=None)[0].T
    which = 1 + generations.index(generation)
    rows = np.stack(
        [
            np.full(draws, _CHANCE),
            np.ones(draws),
            -drawn[:, 0],
            loss.mean() - drawn[:, which] / drawn[:, 0],
        ],
        axis=1,
    )
    accuracy = _CHANCE + (1 - _CHANCE) / (1 + np.exp(-(design @ fitted)))
    scatter = float(np.sqrt(np.sum((accuracy - [m.mmlu for m in MODELS]) ** 2) / (len(odds) - design.shape[1])))
    return Accuracy(
        name="MMLU",
        source="our fit to the Llama 1, 2 and 3.1 models of `public.MODELS`, over the law `chinchilla`",
        floor=_CHANCE, top=1.0, slope=float(-fitted[0]), middle=float(loss.mean() - fitted[which] / fitted[0]),
        draws=rows, scatter=scatter,
    )  # fmt: skip
