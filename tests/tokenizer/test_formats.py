"""The dialog format of a model: the peer's tokens, what a checkpoint gets by default, tools, and history that returns."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from puna.chat import ToolCall, assistant, system, tool_result, user
from puna.errors import ConfigError, DataError
from puna.inference.text import TextStream
from puna.tokenizer import Tokenizer, load_tokenizer
from puna.tokenizer.bpe import SPECIALS
from puna.tokenizer.calls import PYTHON_TAG
from puna.tokenizer.export import CHAT_TEMPLATE
from puna.tokenizer.formats import FORMATS, NONE, Signs, dialog_format, likely

WEATHER = {
    "name": "get_weather",
    "description": "The weather of a place",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
PYTHONIC = "[get_weather(city='Lima'), get_weather(city=\"L'Aquila\")]"
LLAMA_2_TEMPLATE = (
    "{%- set said = namespace(opening='') -%}{%- for m in messages -%}{%- if m.role == 'system' -%}"
    "{%- set said.opening = '<<SYS>>\\n' + m.content + '\\n<</SYS>>\\n\\n' -%}{%- elif m.role == 'user' -%}"
    "{{- bos_token }}[INST] {{ (said.opening + m.content).strip() }} [/INST]{%- set said.opening = '' -%}"
    "{%- else -%}{{- ' ' + m.content.strip() + ' ' + eos_token -}}{%- endif -%}{%- endfor -%}"
)


@pytest.fixture(scope="module")
def pieces(llama_model):
    """A SentencePiece vocabulary as Llama 2 has it."""
    return load_tokenizer(llama_model)


@pytest.fixture(scope="module")
def peer(pieces):
    """The same vocabulary in `transformers`, made from scores as its own converter makes it: by the order of joins."""
    ids = {piece.text: id for id, piece in enumerate(pieces.pieces)}
    joins = []
    for id, (text, score, kind) in enumerate(pieces.pieces):
        if kind == 1:
            splits = [(text[:n], text[n:]) for n in range(1, len(text))]
            joins += [(-score, id, pair) for pair in splits if ids.keys() >= set(pair)]
    merges = [pair for _, _, pair in sorted(joins)]
    library = Library(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=library,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=LLAMA_2_TEMPLATE,
    )


said = st.text(alphabet="abcdefghijklmn .,\n\tßä山[]/INS<>", max_size=30).filter(
    lambda t: "s>" not in t and "k>" not in t
)


@settings(max_examples=60)
@given(st.none() | said, st.lists(said, min_size=1, max_size=5))
def test_llama_2s_tokens_are_those_of_transformers(pieces, peer, opening, turns):
    messages = [(user, assistant)[n % 2](text) for n, text in enumerate(turns)]
    dialog = (*([system(opening)] if opening is not None else []), *messages)
    given_to_peer = [{"role": m.role, "content": m.content} for m in dialog]
    format = dialog_format(pieces)
    expected = peer.apply_chat_template(given_to_peer, return_dict=False)
    assert format.name == "llama2"
    assert format.render(dialog, answer=messages[-1].role == "user").ids == expected


def test_llama_2_says_an_answer_again_with_the_ids_it_was_drawn_with(pieces):
    format = dialog_format(pieces)
    question = (user("Where is the herd?"),)
    prompt = format.render(question).ids
    drawn = [*pieces.encode("It isn't easy to find 🦙. "), pieces.eos]
    message = format.parse(drawn)
    assert message.content == "It isn't easy to find 🦙. "
    assert format.render((*question, message), answer=False).ids == prompt + drawn


@settings(max_examples=200)
@given(st.data())
def test_a_streamed_text_is_the_decoded_one_whatever_ids_are_drawn(pieces, data):
    """Control pieces, halves of characters and spaces in all places."""
    odd = [pieces.bos, pieces.unk, *pieces.encode("  🦙 山é")]
    ids = data.draw(st.lists(st.sampled_from(odd) | st.integers(0, pieces.vocab_size - 1), max_size=12))
    stream, spoken = TextStream((), pieces.errors), False
    text = ""
    for id in ids:
        text += stream.push(pieces.decode_bytes([id]) if spoken else pieces.first_bytes(id))
        spoken = spoken or bool(pieces.decode_bytes([id]))
    assert text + stream.finish() == pieces.decode(ids)


@pytest.mark.parametrize("text", ["  two spaces", "word", "", "\n", "é山🦙", "a  b"])
def test_a_text_that_goes_on_gets_no_space_of_its_own(pieces, text):
    assert pieces.decode_bytes(pieces.encode("so") + pieces.encode_more(text)).decode() == " so" + text


def test_an_unknown_format_says_which_there_are(tokenizer, pieces):
    with pytest.raises(ConfigError, match="did you mean 'pythonic'"):
        dialog_format(tokenizer, "pythonik")
    with pytest.raises(ConfigError, match="use llama2 or raw"):
        dialog_format(pieces, "meta")
    for name in FORMATS:
        assert dialog_format(tokenizer, name).name == name


RELEASED = Signs(context=131_072, outputs=128_256, rope_factor=8.0)


@pytest.mark.parametrize(
    "signs, name",
    [
        (Signs(), "meta"),
        (RELEASED, "meta"),
        (replace(RELEASED, template=CHAT_TEMPLATE), "meta"),
        (replace(RELEASED, template="... Cutting Knowledge Date: builtin_tools ..."), "huggingface"),
        (replace(RELEASED, rope_factor=32.0), "pythonic"),
        (replace(RELEASED, title="meta-llama/Llama-3.3-70B-Instruct"), "pythonic"),
        (replace(RELEASED, rope_factor=0.0, context=8192), "llama3"),
        (replace(RELEASED, template="<|im_start|>{{ role }}"), NONE),
    ],
)
def test_what_a_byte_level_checkpoint_says_decides(tokenizer, signs, name):
    assert likely(tokenizer, signs) == name


def test_a_vocabulary_that_reserves_the_tag_is_3_0s(tokenizer):
    names = [f"<|reserved_special_token_9{n:02}|>" if n in (8, 10) else name for n, name in enumerate(SPECIALS)]
    assert likely(Tokenizer(tokenizer.ranks, names)) == "llama3"


@pytest.mark.parametrize(
    "signs, name",
    [
        (Signs(context=4096), "llama2"),
        (Signs(context=2048), NONE),
        (Signs(context=2048, template="[INST] {{ content }} [/INST]"), "llama2"),
        (Signs(context=4096, template="<|user|>\n{{ content }}"), NONE),
    ],
)
def test_what_a_sentencepiece_checkpoint_says_decides(pieces, signs, name):
    assert likely(pieces, signs) == name


def test_a_base_model_refuses_a_dialog_and_raw_continues_it(pieces, tokenizer):
    with pytest.raises(DataError, match="base model"):
        dialog_format(pieces, NONE).render((user("hi"),))
    for vocabulary in (pieces, tokenizer):
        raw = dialog_format(vocabulary, "raw")
        ids = raw.render((user("Once upon"), assistant(" a time"), user("and then"))).ids
        assert ids[0] == vocabulary.bos and vocabulary.decode(ids[1:]) == "Once upon a time\nand then"


@pytest.mark.parametrize("name", ["llama3", "llama2", "raw"])
def test_a_format_without_tools_refuses_them_and_reads_no_call(tokenizer, pieces, name):
    format = dialog_format(pieces if name == "llama2" else tokenizer, name)
    assert format.dialect is None
    with pytest.raises(DataError, match="has no tools"):
        format.offer((user("hi"),), [WEATHER])
    with pytest.raises(DataError, match="tool"):
        format.render((user("hi"), assistant("", ToolCall(name="f", arguments={})), user("so")))
    text = f'{{"name": "f", "parameters": {{}}}}{PYTHON_TAG}print(1)'
    assert format.parse_text(text) == assistant(text)
    reader = format.reader({"f"})
    assert "".join([*itertools.chain.from_iterable(map(reader.feed, text)), *reader.finish()]) == text


@pytest.mark.parametrize(
    "name, asked",
    [
        ("meta", "Return function calls in JSON format."),
        ("function", '<function=example_function_name>{"example_name": "example_value"}</function>'),
        ("pythonic", "[func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)]"),
    ],
)
def test_functions_are_described_in_the_words_of_their_calls(tokenizer, name, asked):
    offered, question = dialog_format(tokenizer, name).offer((system("Be kind."), user("hi")), [WEATHER])
    assert asked in offered.content and '"get_weather"' in offered.content
    assert offered.content.endswith("\n\nBe kind.") and question == user("hi")


def test_hugging_faces_format_offers_functions_where_its_template_does(tokenizer):
    from puna.tokenizer.chat_template import HuggingFace
    from puna.tokenizer.dialog import render

    dialog = (system("Be kind."), user("hi"))
    format = dialog_format(tokenizer, "huggingface")
    offered = format.offer(dialog, [WEATHER], builtins=("brave_search",))
    style = HuggingFace(functions=(WEATHER,), builtins=("brave_search",))
    assert format.render(offered) == render(tokenizer, dialog, answer=True, style=style)
    assert format.render(dialog) == render(tokenizer, dialog, answer=True, style=HuggingFace())
    answer = assistant("", ToolCall(name="get_weather", arguments={"city": "Lima"}))
    whole = (*offered, answer, tool_result("rain"))
    expected = render(tokenizer, (*dialog, answer, tool_result("rain")), answer=True, style=style)
    assert format.render(whole) == expected


HISTORY = [
    ("meta", '{"name": "get_weather", "parameters": {"city": "Lima"}}; {"name": "g", "parameters": {}}'),
    ("huggingface", 'Well.<|python_tag|>{"name": "get_weather", "parameters": {"city": "Lima"}}'),
    ("huggingface", '{"name": "f", "parameters": {"n": 1}}; {"name": "g", "parameters": {}}'),
    ("function", '<function=get_weather>{"city": "Lima"}</function>'),
    ("pythonic", PYTHONIC),
    ("pythonic", '<|python_tag|>brave_search.call(query="who said \\"hello\\"")'),
    ("meta", "<|python_tag|>print(6 * 7)"),
]


@pytest.mark.parametrize("name, text", HISTORY)
def test_history_has_the_ids_that_the_model_drew(tokenizer, name, text):
    format = dialog_format(tokenizer, name)
    question = format.offer((user("hi"),), [WEATHER])
    prompt = format.render(question).ids
    first, *tagged = text.split(PYTHON_TAG)
    drawn = tokenizer.encode(first)
    for part in tagged:
        drawn += [tokenizer.python_tag, *tokenizer.encode(part)]
    message = format.parse([*drawn, tokenizer.eot])
    assert message == format.parse_text(text) and message.tool_calls
    assert format.render((*question, message), answer=False).ids[: len(prompt + drawn)] == prompt + drawn
