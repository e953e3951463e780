"""How long a short question waits for its first token while a long prompt is read.

    python benchmarks/first_token.py CHECKPOINT                         4,000 tokens, then 20; about a minute for a 1B
    python benchmarks/first_token.py CHECKPOINT --rounds 1 --after 2.5

Requests are served as the server serves them: one thread takes a piece from each of them in turn. The long prompt comes
first and the short one `--after` seconds later, by default after 0.2, 1.1 and 2.3 s in turn. Beside it stand the times of
both prompts alone. Prompts are random letters, new ones each time, so that nothing is found in the cache. Prints a table;
`--into FOLDER` also writes it as JSON.
"""

import argparse
import datetime
import itertools
import json
import random
import statistics
import time
from pathlib import Path

from machine import command, processor, revision

from puna.chat import Request, Sampling
from puna.inference.engine import Engine
from puna.inference.runner import open_runner
from puna.kernels.threads import set_threads, threads
from puna.tokenizer import Tokenizer

AFTER_S = (0.2, 1.1, 2.3)


def letters(count: int) -> Request:
    """A request of `count` tokens, the begin-of-text token among them; its answer has a few."""
    text = "".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=count - 1))
    return Request(prompt=text, sampling=Sampling(max_tokens=4, ignore_end=True))


def waits(engine: Engine, arrivals: list[tuple[float, Request]]) -> list[float]:
    """Seconds from each request's arrival (seconds from the start) to its first token."""
    began = time.perf_counter()
    todo, active, found = dict(enumerate(arrivals)), {}, [0.0] * len(arrivals)
    while todo or active:
        now = time.perf_counter() - began
        for i in [i for i, (at, _) in todo.items() if at <= now]:
            active[i] = engine.stream(todo.pop(i)[1], patient=False)
        for i, pieces in list(active.items()):
            piece = next(pieces)
            if (piece.text or piece.completion) and not found[i]:
                found[i] = time.perf_counter() - began - arrivals[i][0]
            if piece.completion:
                active.pop(i).close()
        if not active:
            time.sleep(0.001)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--long", type=int, default=4000, help="tokens of the long prompt")
    parser.add_argument("--short", type=int, default=20, help="tokens of the short one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--after", type=float, default=None, help="seconds from the long prompt to the short one")
    parser.add_argument(
        "--step-tokens", type=int, default=None, help="tokens that a step reads (default: the engine's)"
    )
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--into", type=Path, default=None)
    options = parser.parse_args()
    if options.threads:
        set_threads(options.threads)
    runner = open_runner(options.checkpoint)
    stepping = {} if options.step_tokens is None else {"step_tokens": options.step_tokens}
    engine = Engine(runner, Tokenizer({bytes([i]): i for i in range(256)}), **stepping)
    waits(engine, [(0.0, letters(options.short))])  # pages of the weights come
    times: dict[str, list[float]] = {"short alone": [], "long alone": [], "short behind": [], "long before": []}
    for _, after in zip(range(options.rounds), itertools.cycle(AFTER_S)):
        after = options.after if options.after is not None else after
        times["short alone"] += waits(engine, [(0.0, letters(options.short))])
        times["long alone"] += waits(engine, [(0.0, letters(options.long))])
        before, behind = waits(engine, [(0.0, letters(options.long)), (after, letters(options.short))])
        times["short behind"].append(behind)
        times["long before"].append(before)
    print(
        f"seconds to the first token; {options.long:,} and {options.short} tokens, {threads()} threads, {processor()}"
    )
    for name, found in times.items():
        print(f"  {name:<14}median {statistics.median(found):7.3f}   " + "  ".join(f"{t:.3f}" for t in found))
    if options.into:
        record = {"command": command(), "revision": revision(), "processor": processor(), "threads": threads()}
        record |= {"long": options.long, "short": options.short, "seconds": times}
        options.into.mkdir(parents=True, exist_ok=True)
        path = options.into / f"first-token-{datetime.date.today()}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(path)


if __name__ == "__main__":
    main()
