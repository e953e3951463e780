"""The same tokenizer in Hugging Face's form, so that released tools can use our checkpoints.

Hugging Face's `tokenizers` knows neither byte strings nor ranks. Bytes are written as printable characters (a table
from GPT-2: printable ones stand for themselves, the others are moved to U+0100 and up), and merging follows a list of
pairs. From ranks that list is: every way to split a token into two tokens, in the order of the tokens' ranks. A single
split for each token would not do, since merging by rank joins *any* two neighbours whose concatenation is a token.
With `ignore_merges` a pre-token that is itself a token becomes it at once, as in tiktoken.

`tokenizer_config.json` carries a chat template that gives the format of `dialog.py`. It differs in two ways that a
template cannot help: a special token's name in a message's text becomes the special token (ours stays text), and where
a message begins with line ends, they join the header's two into one token (ours are encoded apart, so that the prompt
before an answer never depends on the answer).
"""

import json
from pathlib import Path
from typing import Any

from puna import artifacts
from puna.tokenizer.bpe import Tokenizer
from puna.tokenizer.calls import BUILTIN_TOOLS
from puna.tokenizer.pretokens import PATTERN

BOS = "<|begin_of_text|>"


def byte_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte: the character -> the byte, in the characters' order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(moved)}


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """All pairs of tokens whose concatenation is a token, in the order of its rank."""
    found = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(left, right) for left, right in splits if left in ranks and right in ranks]
        found += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return found


def write_hugging_face(out: Path, tokenizer: Tokenizer, *, context: int) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json` into the directory `out`."""
    names = {"bos_token": BOS, "eos_token": "<|eot_id|>", "pad_token": _name_of(tokenizer, tokenizer.pad)}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": context,
        "added_tokens_decoder": {str(tokenizer.special(n)): _added(n) for n in tokenizer.special_names},
        "chat_template": CHAT_TEMPLATE,
    }
    for name, content in (
        ("tokenizer.json", tokenizer_json(tokenizer)),
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", names),
    ):
        artifacts.write_atomic(out / name, json.dumps(content, ensure_ascii=False, indent=1))


def _name_of(tokenizer: Tokenizer, special: int) -> str:
    return tokenizer.special_names[special - len(tokenizer.ranks)]


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of `tokenizer.json`."""
    character = {byte: c for c, byte in byte_alphabet().items()}

    def written(token: bytes) -> str:
        return "".join(character[b] for b in token)

    bos = {"SpecialToken": {"id": BOS, "type_id": 0}}
    text = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": tokenizer.special(name), **_added(name)} for name in tokenizer.special_names],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
                byte_level,
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text[0]],
            "pair": [bos, text[0], {"SpecialToken": {"id": BOS, "type_id": 1}}, text[1]],
            "special_tokens": {BOS: {"id": BOS, "ids": [tokenizer.bos], "tokens": [BOS]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {written(token): rank for token, rank in sorted(tokenizer.ranks.items(), key=lambda i: i[1])},
            "merges": [[written(left), written(right)] for left, right in merges(tokenizer.ranks)],
        },
    }


def _added(name: str) -> dict[str, Any]:
    """How a special token is declared: found as it is written, without touching the text around it."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"content": name, **flags}


# Llama 3.1's format in Jinja, as `dialog.render` writes it. Tool calls are given as OpenAI's protocol does, and their
# dialect follows from the name: the code interpreter's is Python, a built-in tool's its own, any other's JSON.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- set role = 'ipython' if message.role == 'tool' else message.role %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
    {{- message.content or '' }}
    {%- set state = namespace(end='<|eot_id|>', after_json=false, first=not message.content) %}
    {%- for item in message.tool_calls or [] %}
        {%- set call = item.function or item %}
        {%- if call.name == 'code_interpreter' %}
            {{- '<|python_tag|>' + call.arguments.code }}
            {%- set state.end = '<|eom_id|>' %}
            {%- set state.after_json = false %}
        {%- elif call.name in BUILTIN_TOOLS %}
            {{- '<|python_tag|>' + call.name + '.call(' }}
            {%- for key, value in call.arguments.items() %}
                {{- key + '=' + (value | tojson) + (')' if loop.last else ', ') }}
            {%- else %}
                {{- ')' }}
            {%- endfor %}
            {%- set state.end = '<|eom_id|>' %}
            {%- set state.after_json = false %}
        {%- else %}
            {{- '; ' if state.after_json else '' if state.first else '<|python_tag|>' }}
            {{- '{"name": ' + (call.name | tojson) + ', "parameters": ' + (call.arguments | tojson) + '}' }}
            {%- set state.after_json = true %}
        {%- endif %}
        {%- set state.first = false %}
    {%- endfor %}
    {{- state.end }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""".replace("BUILTIN_TOOLS", repr(list(BUILTIN_TOOLS)))
