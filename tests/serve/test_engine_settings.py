"""The engine's settings as given on the command line, as clients of the server meet them."""

import json
import sys
from pathlib import Path

import httpx
import openai
import pytest
import torch
from safetensors.torch import save_file

from puna.cli import main, parser, talking
from puna.errors import ArtifactError, ConfigError
from puna.inference.setup import Setup
from puna.model.checkpoint import save_model
from puna.model.llama import Llama
from puna.model.sizes import LlamaConfig
from puna.serve.http import check_names
from puna.tokenizer import Tokenizer
from puna.tokenizer.bpe import write_ranks

CONFIG = LlamaConfig(
    dim=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, ffn_dim=64, vocab_size=512, context=256, rope_theta=5e5
)
HELLO = [{"role": "user", "content": "hello hello hello"}]
ASKED = {"messages": HELLO, "temperature": 0, "max_tokens": 40}


def sharp_model(seed: int) -> Llama:
    model = Llama(CONFIG).init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in (w for w in model.parameters() if w.ndim == 2):
            weight.normal_(0.0, 0.3, generator=generator)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """`big`, `small` (another model of its vocabulary), and the adapter `odd` for them."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer({bytes([i]): i for i in range(256)})
    write_ranks(folder / "tokenizer.model", tokenizer.ranks)
    for seed, name in enumerate(("big", "small")):
        save_model(sharp_model(seed), folder, folder / name)
    (folder / "odd").mkdir()
    stem = "base_model.model.model.layers.0.mlp.down_proj"
    factors = {f"{stem}.lora_A.weight": torch.randn(2, 64), f"{stem}.lora_B.weight": torch.randn(32, 2)}
    save_file(factors, folder / "odd" / "adapter_model.safetensors")
    (folder / "odd" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8}))
    return folder


def setup_of(*flags: str) -> Setup:
    return talking._setup(parser().parse_args(["serve", "PATH", *flags]))


@pytest.fixture
def opened(models, serve):
    """`opened("--flag", ...)` serves `big`: the official client, and the metrics."""

    def open_(*flags: str):
        setup = setup_of(*flags)
        server = serve(setup.open(models / "big"), slots=setup.slots, queue=setup.queue)
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)

        def metrics() -> dict[str, int]:
            lines = httpx.get(f"{server.url}/metrics", trust_env=False).text.splitlines()
            return {name: int(value) for name, value in (line.split() for line in lines if line[0] != "#")}

        return client, metrics

    return open_


def test_the_cache_has_the_size_that_was_asked_for_and_int8_takes_less(opened):
    _, plain = opened("--cache-tokens", "200")
    assert plain()["puna_cache_tokens"] == 208
    client, small = opened("--cache-tokens", "200", "--kv", "int8")
    assert small()["puna_cache_tokens"] == 208
    assert small()["puna_cache_bytes"] < 0.6 * plain()["puna_cache_bytes"]
    _, sized = opened("--cache", "0.1MB", "--kv", "int8")
    assert 80_000 < sized()["puna_cache_bytes"] <= 100_000
    assert client.chat.completions.create(model="tiny", **ASKED).usage.completion_tokens > 0
    with pytest.raises(openai.BadRequestError, match="208"):
        client.completions.create(model="tiny", prompt="x" * 220)


def test_guesses_by_lookup_or_by_a_draft_change_no_answer_and_are_counted(opened, models):
    client, metrics = opened()
    plain = client.chat.completions.create(model="tiny", **ASKED)
    assert metrics()["puna_guessed_total"] == 0
    for flags in (("--lookahead", "5"), ("--draft", str(models / "big"))):
        client, metrics = opened(*flags)
        assert client.chat.completions.create(model="tiny", **ASKED).choices == plain.choices
        assert metrics()["puna_guessed_total"] > 0
    # The draft is the model itself.
    assert metrics()["puna_guessed_right_total"] > 0.7 * metrics()["puna_guessed_total"] - 8


def test_an_adapter_is_a_model_to_clients(opened, models):
    client, _ = opened("--adapter", f"odd={models / 'odd'}")
    listed = client.models.list().data
    assert [(m.id, getattr(m, "parent", None)) for m in listed] == [("tiny", None), ("odd", "tiny")]
    assert client.models.retrieve("odd").id == "odd"
    plain, odd, again = (client.chat.completions.create(model=m, **ASKED) for m in ("tiny", "odd", "tiny"))
    assert (plain.model, odd.model) == ("tiny", "odd")
    said = [answer.choices[0].message.content for answer in (plain, odd, again)]
    assert said[0] == said[2] != said[1]
    streamed = client.chat.completions.create(model="odd", stream=True, **ASKED)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == said[1]
    with pytest.raises(openai.NotFoundError, match="'tiny', 'odd'"):
        client.chat.completions.create(model="even", **ASKED)
    with pytest.raises(ConfigError, match="both called 'odd'"):
        check_names("odd", ["odd"])


def test_the_queue_is_as_long_as_was_asked(opened):
    client, _ = opened("--slots", "1", "--queue", "2")
    with pytest.raises(openai.InternalServerError, match="at most 2"):
        client.completions.create(model="tiny", prompt="a", n=3)
    assert len(client.completions.create(model="tiny", prompt="a", n=2).choices) == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--threads", "0"), "threads=0"),
        (("--threads", "two"), "--threads='two'"),
        (("--lookahead", "-1"), "lookahead=-1"),
        (("--slots", "0"), "slots=0"),
        (("--queue", "-1"), "queue=-1"),
        (("--kv", "int3"), "--kv='int3'"),
        (("--cache", "much"), "--cache 'much'"),
        (("--cache-tokens", "0"), "--cache-tokens '0'"),
        (("--cache", "1GB", "--cache-tokens", "9"), "given twice"),
        (("--adapter", "odd"), "NAME=FOLDER"),
        (("--adapter", "a=x", "--adapter", "a=y"), "two adapters"),
        (("--adapter", " =x"), "' '"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_with_what_is_accepted(models, capsys, flags, said):
    assert main(["serve", str(models / "big"), *flags]) == 2
    news = capsys.readouterr().err
    assert said in news and "hint: " in news and "Traceback" not in news


def test_what_the_machine_cannot_hold_or_find_is_refused_before_it_serves(models):
    with pytest.raises(ConfigError, match="of memory"):
        setup_of("--cache", "9000TB").open(models / "big")
    with pytest.raises(ConfigError, match="of memory"):
        setup_of("--cache-tokens", "1e15").open(models / "big")
    with pytest.raises(ConfigError, match="less than a block"):
        setup_of("--cache", "9").open(models / "big")
    with pytest.raises(ArtifactError, match="nowhere"):
        setup_of("--adapter", f"a={models / 'nowhere'}").open(models / "big")
    with pytest.raises(ConfigError, match="guesses nothing"):
        setup_of("--draft", str(models / "small"), "--lookahead", "0")


def test_the_chat_answers_with_an_adapter_and_without(models, monkeypatch, capsys):
    import io

    lines = "hello\n/adapter off\nhello\n/adapter even\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), write_through=True))
    flags = ["--temperature", "0", "--max-tokens", "8", "--adapter", f"odd={models / 'odd'}"]
    assert main(["chat", str(models / "big"), *flags]) == 1  # the last line is refused
    assert "adapter: off (loaded: odd)" in (news := capsys.readouterr().err)
    assert "no adapter 'even'" in news
