"""How likely a text is: the sum of log p(token | everything before it), exact, for texts of any length.

A text that fits the context is read once. A longer one is read in windows of W = context tokens that end half a window
apart, and each token is scored in the first window that reaches it:

    window 1   |============|              scores its tokens, each with all that precedes it
    window 2        |=====:::::::|         scores the second half, each with at least W/2 tokens before it
    window 3              |=====:::::::|

Every window begins with the text's first token (the begin-of-text token), as every text did in training.
Windows of all texts are sorted by length, so that a runner may read similar ones together (`torch_scoring.py`).
"""

from collections.abc import Iterator, Sequence

from puna.inference.spans import Runner, Window


def windows(text: int, ids: list[int], given: int, context: int) -> Iterator[Window]:
    """The windows that score ids[given:], each token once. `given` is at least 1: the first token has no context."""
    begin = given
    while begin < len(ids):
        end = min(len(ids), max(context + 1, begin + max(1, context // 2)))
        start = max(0, end - 1 - context)
        yield Window(text, [ids[0], *ids[start + 1 : end]], end - begin)
        begin = end


def log_likelihoods(runner: Runner, texts: Sequence[tuple[list[int], int]], vocab_size: int) -> list[float]:
    """For each (ids, given) the sum of log p over ids[given:], in nats."""
    todo = [w for i, (ids, given) in enumerate(texts) for w in windows(i, ids, given, runner.config.context)]
    todo.sort(key=lambda w: len(w.tokens))
    sums = [0.0] * len(texts)
    for window, value in zip(todo, runner.log_likelihoods(todo, vocab_size)):
        sums[window.text] += value
    return sums
