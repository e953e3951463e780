"""The whole line at toy size: it ends, it is not done twice, kills change nothing, and mistakes end in one message."""

import json
import os
import random
import signal
import subprocess
import sys

import pytest

from puna import artifacts

SMALL = """
curation.heldout_share=0.2 mix.max_bytes=300000 mix.max_epochs=40 tokenizer.vocab_size=768 tokenizer.sample_bytes=1000000
world.known=80 world.unknown=80 world.library=40 world.words=200
world.functions=200 pretrain.model.vocab_size=768 pretrain.model.dim=32 pretrain.model.n_layers=2 pretrain.model.n_heads=2
pretrain.model.n_kv_heads=1 pretrain.model.head_dim=16 pretrain.model.ffn_dim=64
pretrain.steps=12 pretrain.save_every_steps=3 pretrain.lm.validation_rows=4 sft.steps=6 sft.save_every_steps=2
round.sft.steps=6 round.sft.save_every_steps=2 round.reward.steps=2 round.dpo.steps=3 round.sample.max_tokens=8
round.sample.samples=2 evaluate.max_tokens=8 round.evaluate.max_tokens=8 dialogs.choices=8 bits.heldout.max_bytes=4096
bits_bf16.heldout.max_bytes=4096 baselines.heldout.max_bytes=4096
""".split()
COUNTS = {"demonstrations": 8, "prompts": 4, "dev": 2, "evaluation": 3}
TRANSCRIPTS = "arithmetic lookup interpreter functions constraints facts".split()
SMALL += [f"transcripts.counts.{task}=20" for task in TRANSCRIPTS]
TASKS = "arithmetic arithmetic_without_tool lookup interpreter functions constraints facts unknown negatives".split()
SMALL += [f"dialogs.{name}.{task}={count}" for name, count in COUNTS.items() for task in TASKS]


def corpus(folder):
    """A few hundred short documents in plain English, with duplicates and rubbish among them."""
    rng = random.Random(0)
    words = (
        "the a river stone house bird walks sings near old new water light and with of to in for that has been".split()
    )
    folder.mkdir()
    lines = []
    for i in range(300):
        sentences = [" ".join(rng.choices(words, k=rng.randint(8, 16))).capitalize() + "." for _ in range(12)]
        lines.append(json.dumps({"text": f"Chapter {i}\n\n" + "\n".join(sentences), "source": "tales"}))
    lines += lines[:20] + ["{broken", '{"text": 3}']
    (folder / "tales.jsonl").write_text("\n".join(lines))
    return folder


def command(data, out, *more):
    return [sys.executable, "-m", "puna.cli", "run", "tiny", f"data={data}", f"out={out}", *SMALL, *more]


def run(data, out, *more):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command(data, out, *more), capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    data = corpus(folder / "data")
    done = run(data, folder / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    return data, folder / "out", done


def final_weights(out) -> str:
    model = json.loads((out / "run.json").read_text())["model"]
    return artifacts.hash_file(out / model / "model.safetensors")


def test_it_ends_with_a_report_and_says_how_to_go_on(finished):
    _, out, done = finished
    assert (out / "report.html").is_file() and json.loads((out / "report.json").read_text())["headlines"]
    assert f"puna chat {out}" in done.stdout and "report.html" in done.stdout


def test_again_it_does_nothing_and_says_so(finished):
    data, out, _ = finished
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    done = run(data, out)
    assert done.returncode == 0 and "nothing to do" in done.stderr
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}


def test_another_setting_in_the_same_place_stops_with_the_field(finished):
    data, out, _ = finished
    done = run(data, out, "pretrain.steps=13")
    assert done.returncode == 3 and "steps: 12 -> 13" in done.stderr and "Traceback" not in done.stderr


def test_killed_again_and_again_it_ends_with_the_same_weights(finished, tmp_path):
    data, out, _ = finished
    again, rng, kills = tmp_path / "killed", random.Random(7), 0
    for _ in range(40):
        process = subprocess.Popen(
            command(data, again),
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        try:
            process.wait(timeout=rng.uniform(1.5, 5) if kills < 10 else 600)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    assert process.returncode == 0 and kills >= 2
    assert final_weights(again) == final_weights(out)


def test_show_prints_the_lineage_to_the_raw_data(finished):
    data, out, _ = finished
    shown = subprocess.run([sys.executable, "-m", "puna.cli", "show", str(out)], capture_output=True, text=True)
    assert shown.returncode == 0
    for word in ("checkpoint, made by train", "made by curate", "made by train_tokenizer", str(data)):
        assert word in shown.stdout


def test_chat_answers_a_pipe(finished):
    _, out, _ = finished
    command = [sys.executable, "-m", "puna.cli", "chat", str(out), "--max-tokens", "4", "--seed", "1"]
    done = subprocess.run(command, input="hello\n", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_flipped_bit_in_the_final_checkpoint_is_found(finished, tmp_path):
    import shutil

    _, out, _ = finished
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    model = copy / json.loads((copy / "run.json").read_text())["model"] / "model.safetensors"
    data = bytearray(model.read_bytes())
    data[-5] ^= 1
    model.write_bytes(data)
    done = subprocess.run([sys.executable, "-m", "puna.cli", "chat", str(copy), "hi"], capture_output=True, text=True)
    assert done.returncode == 3 and "damaged" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["pretrain.stpes=3"], "did you mean 'steps'?"),
        (["data=/nowhere/at/all"], "does not exist"),
        (["pretrain.steps=many"], "expected a value of type int"),
    ],
)
def test_a_mistake_ends_in_one_message(arguments, said, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "puna.cli", "run", "tiny", f"out={tmp_path / 'x'}", *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and said in done.stderr and "Traceback" not in done.stderr


def test_an_output_that_cannot_be_a_folder_is_said(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = subprocess.run(
        [sys.executable, "-m", "puna.cli", "run", "tiny", f"out={tmp_path / 'file' / 'x'}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "Traceback" not in done.stderr and "hint" in done.stderr


def test_an_empty_and_a_single_document_corpus_are_refused(tmp_path):
    empty, single = tmp_path / "empty", tmp_path / "single"
    empty.mkdir()
    single.mkdir()
    (single / "one.txt").write_text("Only one short text is here, and it is not enough to hold any of it out.\n" * 5)
    for data in (empty, single):
        done = run(data, tmp_path / f"out-{data.name}")
        assert done.returncode == 4 and "hint" in done.stderr and "Traceback" not in done.stderr, done.stderr[-500:]
