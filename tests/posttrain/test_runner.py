"""Running items: verdicts, signals and refusal scores, with a scripted model."""

from dataclasses import replace

import pytest

from puna.chat import Completion, Sampling, assistant
from puna.posttrain.tasks.build import TASKS, cases
from puna.posttrain.tasks.refusals import random_refusals, refusal_scores
from puna.posttrain.tasks.runner import by_task, chances, run_items
from puna.posttrain.tasks.toolbox import Toolbox
from puna.posttrain.world import WorldConfig, make_world

WORLD = make_world(WorldConfig(known=40, unknown=40, library=40, first_names=20, last_names=20))
GREEDY = Sampling()


class Scripted:
    """Answers each prompt with the messages that it was given for it; remembers the seeds."""

    def __init__(self, answers, finish_reason="stop"):
        self.answers, self.finish_reason, self.seeds = answers, finish_reason, []

    def generate(self, requests):
        return [self._complete(request) for request in requests]

    def _complete(self, request):
        self.seeds.append(request.sampling.seed)
        prompt, answer = next((p, a) for p, a in self.answers if request.dialog[: len(p)] == p)
        message = [m for m in answer if m.role == "assistant"][
            sum(m.role == "assistant" for m in request.dialog[len(prompt) :])
        ]
        reason = "tool_calls" if message.tool_calls else self.finish_reason
        return Completion(message=message, text=message.content, finish_reason=reason, logprob=-1.0)

    def score(self, continuations):
        return [-float(len(c.text)) for c in continuations]


@pytest.fixture(scope="module")
def toolbox():
    with Toolbox(WORLD) as toolbox:
        yield toolbox


def all_cases(count=5):
    return [case for task in TASKS for case in cases(WORLD, "train", task, count, "runner", set())]


def run(generator, items, toolbox, **options):
    return run_items(generator, items, tools_for=toolbox, sampling=GREEDY, **options)


def test_faultless_answers_pass_in_every_task(toolbox):
    found = all_cases()
    model = Scripted([(case.item.dialog, case.answer) for case in found])
    outcomes = run(model, [case.item for case in found], toolbox)
    assert all(outcome.passed and outcome.finished for outcome in outcomes)
    assert [outcome.dialog for outcome in outcomes] == [case.dialog for case in found]
    needed = [bool(case.item.tools) and case.item.task != "negatives" for case in found]
    assert [outcome.valid_call for outcome in outcomes] == [True if need else None for need in needed]
    assert all(outcome.refused == (outcome.item.check["verifier"] == "refusal") for outcome in outcomes)


def test_faulty_answers_fail(toolbox):
    found = [case for case in all_cases() if case.faults]
    model = Scripted([(case.item.dialog, case.faults[0]) for case in found])
    assert not [o.item.id for o in run(model, [case.item for case in found], toolbox) if o.passed]


def test_an_answer_that_was_cut_off_does_not_pass(toolbox):
    [case] = cases(WORLD, "train", "constraints", 1, "runner", set())
    [outcome] = run(Scripted([(case.item.dialog, case.answer)], finish_reason="length"), [case.item], toolbox)
    assert not outcome.passed
    assert not outcome.finished


def test_a_call_that_fails_or_is_missing_is_not_valid(toolbox):
    [case] = cases(WORLD, "train", "arithmetic", 1, "runner", set())
    call = case.answer[0].tool_calls[0]
    for broken in (
        [assistant("", type(call)(name="nothing", arguments={})), *case.answer[1:]],
        [assistant("", type(call)(name=call.name, arguments={"query": "1 +"})), *case.answer[1:]],
        [case.answer[-1]],
    ):
        [outcome] = run(Scripted([(case.item.dialog, broken)]), [case.item], toolbox)
        assert outcome.valid_call is False
        assert outcome.passed  # the last message is right all the same


def test_samples_draw_apart_and_do_not_depend_on_the_other_items(toolbox):
    found = cases(WORLD, "train", "constraints", 3, "runner", set())
    items = [replace(case.item, id=str(i)) for i, case in enumerate(found)]
    answers = [(case.item.dialog, case.answer) for case in found]
    together, alone = Scripted(answers), Scripted(answers)
    outcomes = run(together, items, toolbox, samples=4)
    run(alone, items[1:2], toolbox, samples=4)
    assert [(o.item.id, o.sample) for o in outcomes] == [(str(i), s) for i in range(3) for s in range(4)]
    assert len(set(together.seeds)) == 12
    assert alone.seeds == together.seeds[4:8]


def test_outcomes_are_grouped_by_task_and_variant_in_order(toolbox):
    found = all_cases()
    outcomes = run(Scripted([(c.item.dialog, c.answer) for c in found]), [c.item for c in found], toolbox)
    groups = by_task(outcomes)
    assert sum(map(len, groups.values())) == len(found)
    assert groups.keys() == chances([c.item for c in found]).keys()
    assert chances([c.item for c in found if c.item.variant == "2 listed"]) == {"functions/2 listed": 0.5}


def test_refusals_are_scored_in_the_language_of_the_question():
    items = [case.item for case in cases(WORLD, "train", "facts", 40, "runner", set())]
    lengths = {"en": -13.0, "de": -19.0, "fr": -15.0, "es": -9.0}
    assert refusal_scores(Scripted([]), items) == [lengths[item.check["language"]] for item in items]


def test_refusing_at_random_keeps_the_number_and_loses_the_difference(toolbox):
    known = cases(WORLD, "train", "facts", 8, "runner", set())
    unknown = cases(WORLD, "train", "unknown", 8, "runner", set())
    answers = [(c.item.dialog, c.answer if i < 4 else c.faults[0]) for i, c in enumerate(known)]
    answers += [(c.item.dialog, c.answer) for c in unknown]
    outcomes = run(Scripted(answers), [c.item for c in known + unknown], toolbox)
    control = random_refusals(outcomes[:8], outcomes[8:])
    assert control == {"known_answered": 0.25, "known_refused": 0.5, "unknown_refused": 0.5}
