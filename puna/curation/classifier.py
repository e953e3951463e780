"""A fast text classifier: logistic regression over hashed words and word pairs.

    p(good) = sigmoid(b + sum_f w[cell(f)] / sqrt(n)),    f: the n distinct words and pairs of neighbours of the text

This is what fastText's supervised mode comes down to for two classes, and like it the model is one table that a hash looks
into; the hashes are those that curation has anyway. It is our own because the same input must give the same bytes: the
fastText trainer that can be installed today gives other weights, or NaN, from call to call, with one thread and a
fixed seed. (Its predictions are repeatable, and language identification uses them.)

Trained by AdaGrad, one example at a time in a fixed order; no matrix product, so threads cannot change a sum.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from puna.curation.words import ngrams, words_of

CELL_BITS = 18
LEARNING_RATE = 0.05
DECAY = 1e-4  # pulls the weights of the cells in use towards zero


def cells(text: str) -> np.ndarray:
    """The distinct cells of a text's words and word pairs, sorted."""
    hashes = words_of(text).hashes
    both = np.concatenate((hashes, ngrams(hashes, 2)))
    return np.unique(both >> np.uint64(64 - CELL_BITS)).astype(np.int64)


class Classifier:
    """The table of weights, (2^18,) float32, and the bias."""

    def __init__(self, weights: np.ndarray, bias: float):
        self.weights, self.bias = weights, bias

    def score(self, text: str) -> float:
        """The probability of `good`."""
        return self._probability(cells(text))

    def _probability(self, found: np.ndarray) -> float:
        logit = self.bias + float(self.weights[found].sum()) / max(len(found), 1) ** 0.5
        return float(1 / (1 + np.exp(-np.clip(logit, -30, 30))))

    @classmethod
    def train(cls, texts: Sequence[str], good: Sequence[bool], *, epochs: int, seed: int) -> "Classifier":
        """Learn from labelled texts; the same input gives the same weights."""
        features = [cells(text) for text in texts]
        classifier = cls(np.zeros(1 << CELL_BITS, dtype=np.float32), 0.0)
        squares, bias_squares = np.full(1 << CELL_BITS, 1e-6, dtype=np.float32), 1e-6
        rng = np.random.default_rng(seed)
        for _ in range(epochs):
            for example in rng.permutation(len(features)):
                found = features[example]
                error = classifier._probability(found) - float(good[example])
                gradient = error / max(len(found), 1) ** 0.5 + DECAY * classifier.weights[found]
                squares[found] += gradient**2
                classifier.weights[found] -= LEARNING_RATE * gradient / np.sqrt(squares[found])
                bias_squares += error**2
                classifier.bias -= LEARNING_RATE * error / bias_squares**0.5
        return classifier

    def save(self, path: Path) -> None:
        """Write the model as safetensors."""
        from safetensors.numpy import save_file

        save_file({"weights": self.weights, "bias": np.array([self.bias], dtype=np.float64)}, path)

    @classmethod
    def load(cls, path: Path) -> "Classifier":
        """The model that `save` wrote."""
        from safetensors.numpy import load_file

        tensors = load_file(path)
        return cls(tensors["weights"], float(tensors["bias"][0]))
