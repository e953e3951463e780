"""What the server has done, in the text format that Prometheus reads."""

from collections import Counter
from collections.abc import Mapping

MEANINGS = {
    "puna_requests_total": ("counter", "Requests answered, by path and HTTP status."),
    "puna_prompt_tokens_total": ("counter", "Prompt tokens of finished answers."),
    "puna_completion_tokens_total": ("counter", "Tokens drawn in finished answers."),
    "puna_cancelled_total": ("counter", "Answers given up because the client went away."),
    "puna_requests_waiting": ("gauge", "Answers that have not begun."),
    "puna_requests_active": ("gauge", "Answers that are being written."),
    "puna_cache_tokens": ("gauge", "Tokens whose keys and values the cache has room for."),
    "puna_cache_tokens_held": ("gauge", "Of those, what the answers under way hold."),
    "puna_cache_bytes": ("gauge", "Memory that the cache takes when all of it has been used."),
    "puna_preemptions_total": ("counter", "Answers that gave up their room in the cache, and were read anew."),
    "puna_guessed_total": ("counter", "Tokens that were guessed ahead."),
    "puna_guessed_right_total": ("counter", "Of those, the ones that were right."),
}


class Metrics:
    """Counts, kept by the event loop's thread alone."""

    def __init__(self) -> None:
        self._values: Counter[tuple[str, str]] = Counter()

    def add(self, name: str, amount: int = 1, **labels: object) -> None:
        """Count; `labels` split a count, e.g. by status."""
        self._values[name, _labels(labels)] += amount

    def page(self, *, waiting: int, active: int, engine: Mapping[str, int]) -> str:
        """The body of GET /metrics; `engine` are its own figures."""
        now = {**self._values, ("puna_requests_waiting", ""): waiting, ("puna_requests_active", ""): active}
        for name, value in engine.items():
            counts = name if f"puna_{name}" in MEANINGS else f"{name}_total"
            now[f"puna_{counts}", ""] = value
        lines = []
        for name, (kind, meaning) in MEANINGS.items():
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{labels} {value}" for (counted, labels), value in sorted(now.items()) if counted == name]
        return "\n".join(lines) + "\n"


def _labels(labels: dict[str, object]) -> str:
    return "{" + ",".join(f'{key}="{value}"' for key, value in labels.items()) + "}" if labels else ""
