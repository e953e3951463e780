"""What is learnt, and what is not: masks, packing, losses."""

import contextlib
import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from train_world import TOY, dialog

from puna import chat
from puna.errors import ConfigError, DataError
from puna.kernels.attention import attention
from puna.kernels.cross_entropy import cross_entropy
from puna.model.llama import Llama, attend_with, document_mask
from puna.model.reward import RewardModel
from puna.parallel import whole
from puna.parallel.whole import WholeReading
from puna.tokenizer.bpe import Tokenizer
from puna.train.data import micro_batches
from puna.train.objectives.dpo import DpoData, DpoObjective, encode_pairs, encode_side
from puna.train.objectives.lm import LmObjective
from puna.train.objectives.reward import RewardData, RewardObjective, dialog_rows
from puna.train.objectives.rows import Rows
from puna.train.objectives.sft import SftData, SftObjective, encode_dialogs
from puna.train.phases import Position
from puna.train.schedule import Course, Schedule


@pytest.fixture(scope="module")
def tokenizer(world):
    return Tokenizer.load(world.tokenizer.path)


@pytest.fixture(scope="module")
def model():
    return Llama(TOY).init_weights(0)


def test_chunked_cross_entropy_equals_the_plain_one_with_its_gradients(monkeypatch):
    monkeypatch.setattr("puna.kernels.cross_entropy.CHUNK", 7)
    torch.manual_seed(0)
    hidden, output = torch.randn(50, 16, requires_grad=True), torch.randn(33, 16, requires_grad=True)
    targets, weights = torch.randint(0, 33, (50,)), (torch.rand(50) > 0.4).float() * torch.rand(50)
    cross_entropy(hidden, output, targets, weights).mul(3).backward()
    ours = hidden.grad.clone(), output.grad.clone()
    hidden.grad = output.grad = None
    losses = torch.nn.functional.cross_entropy(hidden @ output.t(), targets, reduction="none")
    (losses * weights).sum().mul(3).backward()
    torch.testing.assert_close(ours[0], hidden.grad)
    torch.testing.assert_close(ours[1], output.grad)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_written_out_attention_equals_the_fused_one(heads, kv_heads, masked):
    torch.manual_seed(0)
    q = torch.randn(2, 12, heads, 8)
    k, v = torch.randn(2, 12, kv_heads, 8), torch.randn(2, 12, kv_heads, 8)
    mask = document_mask(torch.tensor([[0] * 5 + [1] * 7, [3] * 12])) if masked else None
    torch.testing.assert_close(attention(q, k, v, mask, impl="reference"), attention(q, k, v, mask, impl="sdpa"))


def test_a_packed_row_gives_each_document_what_it_gets_alone(model):
    first, second = torch.randint(0, 528, (1, 9)), torch.randint(0, 528, (1, 14))
    packed = torch.cat([first, second], 1)
    documents = torch.tensor([[0] * 9 + [1] * 14])
    rows = Rows(tokens=packed, targets=packed, documents=documents, weights=torch.ones(1, 23))
    together = WholeReading(model, rows).hidden
    for tokens, part in ((first, together[:, :9]), (second, together[:, 9:])):
        alone = model.hidden(tokens, torch.arange(tokens.shape[1])[None], attend_with(None))
        torch.testing.assert_close(part, alone, atol=1e-5, rtol=1e-5)


def test_the_first_token_of_a_document_is_never_a_target(world):
    data = LmObjective(sequence_length=48, rows=8).data([world.tokens], world.tokenizer.path, 0)
    for step in range(4):
        rows = data.batch(range(step * 8, step * 8 + 8), Position())
        starts = rows.documents[:, 1:] != rows.documents[:, :-1]
        assert starts.any() and not rows.weights[:, :-1][starts].any()


def test_a_batch_is_a_function_of_its_numbers(world):
    objective = LmObjective(sequence_length=32, rows=4)
    a, b = (objective.data([world.tokens], world.tokenizer.path, 3) for _ in range(2))
    a.batch(range(44, 48), Position())
    assert torch.equal(a.batch(range(20, 24), Position()).tokens, b.batch(range(20, 24), Position()).tokens)


def test_one_epoch_visits_each_sample_once(world):
    data = LmObjective(sequence_length=32, rows=1).data([world.tokens], world.tokenizer.path, 0)
    shards = data.sources["data"].shards
    count = shards.samples(32)
    seen = {data.batch([i], Position()).tokens.numpy().tobytes() for i in range(count)}
    every = {shards.sample(i, 32)[0][:-1].tobytes() for i in range(count)}
    assert seen == every


def test_only_what_the_assistant_says_is_learnt(tokenizer):
    call = chat.ToolCall(name="wolfram_alpha", arguments={"query": "2+2"}, dialect="builtin")
    conversation = (
        chat.system("Tools: wolfram_alpha"),
        chat.user("What is 2+2?"),
        chat.assistant("", call),
        chat.tool_result("four-from-the-tool"),
        chat.assistant("It is 4."),
        chat.user("assistant"),
        chat.assistant("Yes."),
    )
    [(ids, weights)] = encode_dialogs(tokenizer, [conversation])
    learnt = tokenizer.decode([i for i, w in zip(ids, weights) if w])
    for said in ("wolfram_alpha.call", "It is 4.", "Yes."):
        assert said in learnt
    for unsaid in ("four-from-the-tool", "What is", "Tools:"):
        assert unsaid not in learnt
    assert sum(ids[i] in tokenizer.stop_ids for i, w in enumerate(weights) if w) == 3, "each end is learnt"


def test_a_dialog_without_an_assistant_is_an_error_not_a_row_of_zeros(tokenizer):
    with pytest.raises(DataError, match="nothing to learn"):
        encode_dialogs(tokenizer, [(chat.user("hello"),)])


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=60), seed=st.integers(0, 5))
def test_packing_keeps_every_dialog_whole_once_per_epoch(lengths, seed):
    encoded = [([i + 10] * n, [1.0] * n) for i, n in enumerate(lengths)]
    data = SftData(SftObjective(sequence_length=39, rows=1), encoded, seed)
    epoch = data._pack(0)
    assert sorted(d for row in epoch for d in row) == list(range(len(lengths)))
    assert all(sum(lengths[d] for d in row) <= 40 for row in epoch)
    row = data.batch([0])
    for document in set(row.documents[0].tolist()) - {-1}:
        assert len(set(row.tokens[0][row.documents[0] == document].tolist())) == 1


def test_a_dialog_that_does_not_fit_is_left_out_and_counted(capsys):
    data = SftData(SftObjective(sequence_length=9, rows=1), [([1] * 11, [1.0] * 11), ([2] * 10, [1.0] * 10)], 0)
    assert data.notes == {"dialogs": 1, "dialogs_too_long": 1}
    assert "1 of 2 dialogs are longer than 10 tokens" in capsys.readouterr().err
    with pytest.raises(DataError, match="no dialog fits"):
        SftData(SftObjective(sequence_length=9, rows=1), [([1] * 11, [1.0] * 11)], 0)


def test_dpo_contrasts_bodies_and_keeps_ends_in_the_likelihood(tokenizer):
    prompt, answer = dialog(3)[:1], dialog(3)[1:]
    side = encode_side(tokenizer, prompt, answer)
    contrasted = tokenizer.decode([i for i, c in zip(side.ids, side.contrast) if c])
    assert contrasted == "It has 3 legs."
    assert [i for i, c, k in zip(side.ids, side.contrast, side.likelihood) if k and not c] == [tokenizer.eot]


def test_dpo_refuses_the_mask_without_the_likelihood_term():
    with pytest.raises(ConfigError, match="unlearns the end"):
        DpoObjective(nll_share=0.0)
    DpoObjective(nll_share=0.0, mask_format_tokens=False)


def test_a_reward_does_not_depend_on_padding_or_the_batch(model):
    judge = RewardModel(model)
    torch.nn.init.normal_(judge.head.weight)
    short, long = [5, 6, 7], list(range(20, 60))

    def rewards(dialogs):
        rows, last = dialog_rows(dialogs)
        return WholeReading(judge, rows).rewards(last)

    with torch.no_grad():
        alone = rewards([short])
        beside = rewards([short, long])[:1]
    torch.testing.assert_close(alone, beside, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("objective", [DpoObjective(sequence_length=96), RewardObjective(sequence_length=96)])
def test_micro_batches_of_pairs_give_the_loss_notes_and_gradients_of_the_whole_step(world, objective, monkeypatch):
    monkeypatch.setattr(whole, "products_in_bf16", lambda _device: contextlib.nullcontext())
    lines = [json.loads(line) for line in world.preferences.file("preferences.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):  # chosen answers of all lengths: a mean over micro-batches is none over tokens
        line["chosen"][0]["content"] *= 1 + i % 4
    pairs = encode_pairs(lines, Tokenizer.load(world.tokenizer.path))
    found = []
    for most in (0, 3, 1):
        body = Llama(TOY).init_weights(0)
        judged = isinstance(objective, RewardObjective)
        model = RewardModel(body) if judged else body
        if judged:
            torch.nn.init.ones_(model.head.weight)
        data = (RewardData if judged else DpoData)(objective, pairs, 0)
        placement = whole.Whole(model)
        data.prepare(placement)
        loss, notes = placement.backward(data, [data.batch(part) for part in micro_batches(range(8), most)])
        found.append((loss, notes, {n: p.grad for n, p in placement.named_parameters()}))
    for loss, notes, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        assert notes == pytest.approx(found[0][1], rel=1e-4, abs=1e-6)
        for name, gradient in gradients.items():
            wanted = found[0][2][name]
            assert (gradient - wanted).abs().max() <= 2e-5 * wanted.abs().max(), name


@given(steps=st.integers(1, 500), share=st.floats(0, 1), warmup=st.integers(0, 50))
def test_the_learning_rate_rises_falls_and_ends_near_zero(steps, share, warmup):
    schedule = Schedule(peak=1.0, warmup_steps=min(warmup, steps), anneal_share=share, averaged=4)
    course = Course.of(schedule, steps * 64, 64)
    rates = [course.learning_rate(s * 64, 64) for s in range(steps)]
    assert all(0 < r <= 1.0 + 1e-9 for r in rates)
    after = rates[schedule.warmup_steps :]
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(after))
    moments = [s for s in range(steps) if course.is_averaged(s * 64, 64)]
    assert len(moments) <= 4 and (not moments or moments[-1] == steps - 1)


def test_a_broken_line_is_named(tmp_path):
    from puna.train.objectives.sft import read_lines

    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"a": 1}) + "\n{broken\n")
    with pytest.raises(DataError, match=r"x\.jsonl:2 is not JSON"):
        read_lines(path)
