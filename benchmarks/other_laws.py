"""Would another law, or another count of N, predict a study's runs better? By leaving out, on the runs of a result.

    python benchmarks/other_laws.py benchmarks/results/scaling-2026-11-22.json

For each law: the error on sizes left out in turn (mean, worst), on the largest budget left out, and on the run that no fit has seen.
To choose by the last would be to fit it; choose by the first two.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from puna.scaling import parametric
from puna.scaling.family import counted, of_size
from puna.scaling.points import Points

N0, D0 = 1e5, 2e6  # the middle of the runs
Model = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def tied(p: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    """One exponent for both."""
    return np.exp(p[0]) + np.exp(p[1]) * (n / N0) ** -np.exp(p[2]) + np.exp(p[3]) * (d / D0) ** -np.exp(p[2])


def power(p: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    """A power of the sum, without a constant (Kaplan et al. 2020, arXiv 2001.08361)."""
    return (np.exp(p[0]) * (n / N0) ** -np.exp(p[1]) + np.exp(p[2]) * (d / D0) ** -np.exp(p[3])) ** np.exp(p[4])


def quadratic(p: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    """A quadratic in the logarithms: no law at all."""
    x, y = np.log(n / N0), np.log(d / D0)
    return np.exp(p[0] + p[1] * x + p[2] * y + p[3] * x**2 + p[4] * y**2 + p[5] * x * y)


MODELS: dict[str, tuple[Model, list[float]]] = {
    "one exponent": (tied, [0, -1, -0.7, -1]),
    "power of a sum": (power, [-1, -1, -1, -1, -0.5]),
    "quadratic": (quadratic, [0.7, -0.1, -0.1, 0, 0, 0]),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    found = json.loads(parser.parse_args().result.read_text())
    points, fitted = found["points"], np.array([p["fitted"] for p in found["points"]])
    n, d, c, b, y = (np.array([p[k] for p in points]) for k in ("parameters", "tokens", "flops", "budgets", "loss"))
    vocabulary = found["plan"]["study"]["grid"]["vocab_size"]
    shapes = [of_size(x, vocab_size=vocabulary, context=128) for x in n]
    sizes = {"matrices": n, "all": np.array([float(s.parameters) for s in shapes]), "flops / 6 D": c / 6 / d,
             "body": np.array([float(counted(s).body) for s in shapes])}  # fmt: skip
    print(f"{'law':<16}{'N counts':<13}{'sizes out':>18}{'largest budget out':>20}{'unseen':>9}")
    for law in ("E + A/N^a + B/D^b", *MODELS):
        for counts, size in sizes.items():

            def errors(known: np.ndarray, hidden: np.ndarray, law: str = law, size: np.ndarray = size) -> np.ndarray:
                return predicted(law, size, d, c, b, y, known, hidden) / y[hidden] - 1

            out = np.abs(np.concatenate([errors(fitted & (n != s), fitted & (n == s)) for s in np.unique(n[fitted])]))
            largest = b == b[fitted].max()
            last = np.abs(errors(fitted & ~largest, fitted & largest))
            print(f"{law[:15]:<16}{counts:<13}{out.mean():>8.2%} {out.max():>8.2%}{last.mean():>11.2%} {last.max():>8.2%}"
                  f"{errors(fitted, ~fitted)[0]:>9.2%}")  # fmt: skip
    return 0


def predicted(
    law: str,
    n: np.ndarray,
    d: np.ndarray,
    c: np.ndarray,
    b: np.ndarray,
    y: np.ndarray,
    known: np.ndarray,
    hidden: np.ndarray,
) -> np.ndarray:
    """Losses of the hidden runs by a law of the known ones."""
    if law not in MODELS:
        fit = parametric.fit(Points.of(n[known], d[known], y[known], flops=c[known], budgets=b[known]), draws=0)
        return fit.e + fit.a * n[hidden] ** -fit.alpha + fit.b * d[hidden] ** -fit.beta
    model, start = MODELS[law]
    residual = lambda p: np.log(model(p, n[known], d[known]) / y[known])  # noqa: E731
    return model(least_squares(residual, start, loss="soft_l1", f_scale=0.01, max_nfev=400).x, n[hidden], d[hidden])


if __name__ == "__main__":
    raise SystemExit(main())
