"""Surfaces whose truth is known: losses by a law, at grids of which every fit should find the optimum."""

from dataclasses import dataclass

import numpy as np

from puna.scaling.envelope import TrainingCurve
from puna.scaling.points import Points

BUDGETS = np.geomspace(6e18, 1e21, 6)


@dataclass(frozen=True)
class Surface:
    e: float
    a: float
    alpha: float
    b: float
    beta: float

    def loss(self, n, d):
        return self.e + self.a / n**self.alpha + self.b / d**self.beta

    def best(self, flops):
        """N* by the closed form (C = 6 N D)."""
        factor = (self.alpha * self.a / (self.beta * self.b)) ** (1 / (self.alpha + self.beta))
        return factor * (flops / 6) ** (self.beta / (self.alpha + self.beta))

    @property
    def exponent(self):
        return self.beta / (self.alpha + self.beta)

    def points(self, *, noise=0.0, seed=0, budgets=BUDGETS, sizes=7, width=8.0, offset=1.0):
        """An isoFLOP grid: `sizes` models around `offset` times the best, from 1/width to width times that."""
        random = np.random.default_rng(seed)
        n = np.concatenate([offset * self.best(c) * np.geomspace(1 / width, width, sizes) for c in budgets])
        c = np.repeat(budgets, sizes)
        loss = self.loss(n, c / 6 / n) * np.exp(noise * random.standard_normal(len(n)))
        return Points.of(n, c / 6 / n, loss, budgets=c)

    def curves(self, *, noise=0.0, seed=0, sizes=14):
        """Training curves without a schedule: a run is high or low as a whole."""
        random = np.random.default_rng(seed)
        made = []
        for n in self.best(1e20) * np.geomspace(1 / 30, 30, sizes):
            d = np.geomspace(1e18, 3e21, 150) / 6 / n
            loss = self.loss(n, d) * np.exp(noise * random.standard_normal())
            made.append(TrainingCurve(parameters=float(n), tokens=d, loss=loss))
        return made


CHINCHILLA = Surface(1.8172, 482.01, 0.3478, 2085.43, 0.3658)
LOPSIDED = Surface(1.7, 400.0, 0.45, 900.0, 0.28)  # its sections are no parabolas
