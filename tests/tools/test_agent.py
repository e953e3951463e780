"""The agent loop with models that follow a script."""

import random
from dataclasses import replace

import pytest

from puna.chat import Completion, Sampling, ToolCall, assistant, system, tool_result, user
from puna.errors import ConfigError
from puna.tools.agent import Outcome, derive_seed, execute, run_dialogs
from puna.tools.calculator import calculator
from puna.tools.invented import invented_function
from puna.tools.sandbox import Sandbox, code_interpreter
from puna.tools.search import SearchIndex, search_tool

CALCULATOR = calculator()
SUM = invented_function("tolvi", "add")


def calculation(query):
    return ToolCall(name="wolfram_alpha", arguments={"query": query}, dialect="builtin")


class Script:
    """A model that answers each dialog by `reply(request) -> Message or Completion`, and remembers what it was asked."""

    def __init__(self, reply):
        self.reply = reply
        self.batches = []

    def generate(self, requests):
        self.batches.append(list(requests))
        return [self._completion(self.reply(request)) for request in requests]

    def score(self, continuations):
        raise NotImplementedError

    def _completion(self, reply):
        if isinstance(reply, Completion):
            return reply
        reason = "tool_calls" if reply.tool_calls else "stop"
        return Completion(message=reply, text=reply.content, finish_reason=reason, completion_tokens=3, logprob=-1.5)


def calculates_then_answers(request):
    last = request.dialog[-1]
    if last.role == "user":
        return assistant("", calculation(last.content))
    return assistant(f"It is {last.content}.")


def run_one(generator, dialog, tools, **options) -> Outcome:
    return run_dialogs(generator, [dialog], tools, **options)[0]


def test_a_call_is_run_and_its_result_appended():
    outcome = run_one(Script(calculates_then_answers), (user("3 * 4"),), [CALCULATOR])
    assert outcome.dialog == (
        user("3 * 4"),
        assistant("", calculation("3 * 4")),
        tool_result("12"),
        assistant("It is 12."),
    )
    assert (outcome.finish_reason, outcome.valid, outcome.answer) == ("stop", True, "It is 12.")
    assert [(e.result, e.accepted) for e in outcome.executions] == [("12", True)]
    assert (outcome.turns, outcome.completion_tokens, outcome.logprob) == (2, 6, -3.0)


def test_an_answer_without_a_call_ends_at_once():
    outcome = run_one(Script(lambda request: assistant("Hello.")), (system("Be kind."), user("Hi")), [CALCULATOR])
    assert outcome.dialog[-1] == assistant("Hello.")
    assert outcome.turns == 1 and outcome.valid and not outcome.executions


def test_dialogs_are_served_in_batches_and_come_back_in_order():
    def reply(request):
        depth = int(request.dialog[0].content)
        asked = sum(message.role == "ipython" for message in request.dialog)
        return assistant("", calculation(f"{asked} + 1")) if asked < depth else assistant(f"done {depth}")

    model = Script(reply)
    outcomes = run_dialogs(model, [(user(str(n)),) for n in (2, 0, 3, 1)], [CALCULATOR])
    assert [len(batch) for batch in model.batches] == [4, 3, 2, 1]
    assert [outcome.answer for outcome in outcomes] == ["done 2", "done 0", "done 3", "done 1"]
    assert [len(outcome.executions) for outcome in outcomes] == [2, 0, 3, 1]


def test_a_model_that_does_not_stop_calling_is_stopped():
    model = Script(lambda request: assistant("", calculation("1")))
    outcome = run_one(model, (user("go"),), [CALCULATOR], max_calls=3)
    assert len(outcome.executions) == 3
    assert outcome.finish_reason == "tool_calls" and not outcome.valid and outcome.answer == ""
    assert outcome.dialog[-1].tool_calls  # the call that was not run


def test_no_calls_may_be_allowed():
    outcome = run_one(Script(calculates_then_answers), (user("1"),), [CALCULATOR], max_calls=0)
    assert outcome.finish_reason == "tool_calls" and not outcome.executions


def test_several_calls_in_one_message_are_run_in_order():
    def reply(request):
        if request.dialog[-1].role == "user":
            return assistant("", calculation("1"), calculation("2"))
        return assistant(request.dialog[-2].content + request.dialog[-1].content)

    assert run_one(Script(reply), (user("go"),), [CALCULATOR]).answer == "12"
    assert run_one(Script(reply), (user("go"),), [CALCULATOR], max_calls=1).executions == ()


def test_a_truncated_call_is_not_run():
    call = assistant("", calculation("1"))
    model = Script(lambda request: Completion(message=call, text="", finish_reason="length"))
    outcome = run_one(model, (user("go"),), [CALCULATOR])
    assert outcome.finish_reason == "length" and not outcome.executions and not outcome.valid


def test_a_message_that_promises_a_call_without_one_is_not_valid():
    model = Script(lambda request: Completion(message=assistant("hm"), text="hm", finish_reason="tool_calls"))
    assert not run_one(model, (user("go"),), [CALCULATOR]).valid


@pytest.mark.parametrize(
    ("call", "result"),
    [
        (ToolCall(name="nope", arguments={}), "error: no function 'nope'; available: wolfram_alpha, tolvi"),
        (ToolCall(name="tolvi", arguments={"a": 1}), "error: argument 'b' is missing"),
        (ToolCall(name="tolvi", arguments={"a": 1, "b": "2"}), "error: argument 'b' must be an integer, not \"2\""),
    ],
)
def test_a_wrong_call_is_told_to_the_model_which_may_mend_it(call, result):
    right = ToolCall(name="tolvi", arguments={"a": 1, "b": 2})

    def reply(request):
        results = [message.content for message in request.dialog if message.role == "ipython"]
        return assistant("", call if not results else right) if len(results) < 2 else assistant(results[-1])

    outcome = run_one(Script(reply), (user("go"),), [CALCULATOR, SUM])
    assert [(e.result, e.accepted) for e in outcome.executions] == [(result, False), ("3", True)]
    assert outcome.answer == "3" and not outcome.valid


def test_a_tool_that_fails_on_accepted_arguments_leaves_the_call_valid():
    outcome = run_one(Script(calculates_then_answers), (user("1/0"),), [CALCULATOR])
    assert outcome.answer == "It is error: division by zero." and outcome.valid


def test_every_dialog_has_its_own_tools():
    call = ToolCall(name="tolvi", arguments={"a": 20, "b": 5})

    def reply(request):
        return assistant("", call) if request.dialog[-1].role == "user" else assistant(request.dialog[-1].content)

    sets = [[SUM], [], [invented_function("tolvi", "subtract"), CALCULATOR]]
    answers = [outcome.answer for outcome in run_dialogs(Script(reply), [(user("go"),)] * 3, sets)]
    assert answers == ["25", "error: no function 'tolvi'; available: none", "15"]


def test_the_builtin_tools_are_reached_in_their_dialects():
    search = search_tool(SearchIndex([("Ana", "Ana was born in Lima.")]))
    with Sandbox() as sandbox:
        tools = [CALCULATOR, search, code_interpreter(sandbox)]
        calls = [
            calculation("6*7"),
            ToolCall(name="brave_search", arguments={"query": "Ana born"}, dialect="builtin"),
            ToolCall(name="code_interpreter", arguments={"code": "print('a' * 3)"}, dialect="python"),
        ]
        assert [execute(call, tools).result for call in calls] == ["42", "Ana: Ana was born in Lima.", "aaa"]


def gambles(request):
    """A model whose every word depends on the seed of the request and on what was said."""
    draw = random.Random(f"{request.sampling.seed} {request.dialog}")
    if draw.random() < 0.6:
        return assistant("", calculation(f"{draw.randrange(100)} + {draw.randrange(100)}"))
    return assistant(str(draw.random()))


DIALOGS = [(user(f"question {i % 3}"),) for i in range(12)]


def test_sampling_repeats_exactly_and_the_seed_matters():
    first = run_dialogs(Script(gambles), DIALOGS, [CALCULATOR], sampling=Sampling(seed=1))
    assert first == run_dialogs(Script(gambles), DIALOGS, [CALCULATOR], sampling=Sampling(seed=1))
    assert first != run_dialogs(Script(gambles), DIALOGS, [CALCULATOR], sampling=Sampling(seed=2))
    assert len({str(outcome.dialog) for outcome in first}) == len(DIALOGS)  # equal questions are drawn independently


def test_a_dialog_with_its_own_seed_does_not_depend_on_the_others():
    seeds = [Sampling(seed=i, temperature=0.7) for i in range(len(DIALOGS))]
    together = run_dialogs(Script(gambles), DIALOGS, [CALCULATOR], sampling=seeds)
    alone = [
        run_one(Script(gambles), dialog, [CALCULATOR], sampling=[s]) for dialog, s in zip(DIALOGS, seeds, strict=True)
    ]
    assert together == alone


def test_each_turn_draws_with_another_seed_and_the_same_settings():
    model = Script(calculates_then_answers)
    settings = Sampling(temperature=0.5, top_p=0.9, max_tokens=77, stop=("\n",), seed=5)
    run_dialogs(model, DIALOGS, [CALCULATOR], sampling=settings)
    requests = [request for batch in model.batches for request in batch]
    assert len({request.sampling.seed for request in requests}) == len(requests) == 24
    assert {replace(request.sampling, seed=0) for request in requests} == {replace(settings, seed=0)}


def test_derived_seeds_are_fixed_for_ever():
    """A change here would change every sampled dialog."""
    assert derive_seed(0, 0) == derive_seed(0, 0)
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert 0 <= derive_seed(2**62) < 2**63


def test_lists_of_the_wrong_length_are_refused():
    with pytest.raises(ConfigError, match="2 sets of tools"):
        run_dialogs(Script(gambles), DIALOGS, [[], [CALCULATOR]])
    with pytest.raises(ConfigError, match="1 samplings"):
        run_dialogs(Script(gambles), DIALOGS, [CALCULATOR], sampling=[Sampling()])
    with pytest.raises(ConfigError, match="max_calls"):
        run_dialogs(Script(gambles), DIALOGS, [CALCULATOR], max_calls=-1)


def test_no_dialogs_are_no_outcomes():
    model = Script(gambles)
    assert run_dialogs(model, [], [CALCULATOR]) == [] and not model.batches
