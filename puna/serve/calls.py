"""From OpenAI's requests to ours: the JSON of a call becomes the `chat.Request`s that answer it.

    messages[] + tools[]  -> Dialog        system and developer -> system, tool -> ipython (Llama 3.1's role for results)
    temperature, stop, …  -> Sampling      and the form of the answer (`settings.py`)
    n, prompt[]           -> one Request per choice, seeds seed, seed + 1, …

What cannot be honoured is refused, never dropped: a prompt longer than the context, an option this server does not
have, an image. Fan-out is bounded (`MAX_CHOICES`), since each choice occupies the engine.
"""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, get_args

from puna import chat
from puna.chat import Dialog, Message, Request, ToolCall
from puna.errors import PunaError
from puna.serve import settings
from puna.serve.fields import ApiError, Fields, parse_json, refuse
from puna.tokenizer.calls import BUILTIN_TOOLS, CODE_INTERPRETER, write_call
from puna.tokenizer.formats import DialogFormat

MAX_CHOICES = 16  # of one call: n, times the number of prompts
MAX_MESSAGES = 2048
MAX_TOOLS = 64
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for /v1/completions
TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
CALL_ID = re.compile(f"call_({'|'.join(get_args(chat.Dialect))})_[0-9a-f]{{24}}")
# Fields that concern OpenAI's own service (billing, storage, caching): accepted, without effect on the answer.
SERVICE_FIELDS = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
)


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call to the API, checked: what to ask the engine, and how the client wants the answer."""

    requests: tuple[Request, ...]  # one per choice
    prompt_tokens: int  # each distinct prompt counted once
    stream: bool
    include_usage: bool
    tools: frozenset[str] = frozenset()  # functions that the client can run
    echo: tuple[str, ...] = ()  # per choice, what goes before the completion


def chat_call(body: Any, engine: Any, model: str) -> Call:
    """The call in the body of POST /v1/chat/completions. Raises `ApiError`."""
    fields = Fields(body)
    adapter = check_model(fields.text("model", model), engine, model)
    tools = _tools(fields)
    dialog = _dialog(fields, tools, engine.format)
    request = _request(fields, engine, adapter, logprobs=settings.chat_logprobs(fields), dialog=dialog)
    if tools and request.structure:
        refuse("tools and a form of the answer exclude each other: a call has a form of its own", "response_format")
    limit = fields.integer("max_completion_tokens", 1, 1_000_000)
    older = fields.integer("max_tokens", 1, 1_000_000)
    choices = fields.integer("n", 1, MAX_CHOICES) or 1
    stream, include_usage = _streaming(fields)
    fields.unsupported("modalities", ["text"])
    for absent in ("audio", "prediction", "functions", "function_call", "web_search_options", "reasoning_effort"):
        fields.unsupported(absent)
    fields.done()
    count = _count(engine, request, "messages")
    request = _limited(request, limit or older, engine.config.context - count)
    return Call(
        requests=_choices(request, choices),
        prompt_tokens=count,
        stream=stream,
        include_usage=include_usage,
        tools=frozenset(tool["name"] for tool in tools),
    )


def completion_call(body: Any, engine: Any, model: str) -> Call:
    """The call in the body of POST /v1/completions. Raises `ApiError`."""
    fields = Fields(body)
    adapter = check_model(fields.text("model", model), engine, model)
    prompts = _prompts(fields)
    logprobs = settings.completion_logprobs(fields)
    echo = fields.flag("echo")
    asked = _request(fields, engine, adapter, logprobs=logprobs, prompt_logprobs=logprobs if echo else None)
    limit = fields.integer("max_tokens", 1, 1_000_000) or DEFAULT_COMPLETION_TOKENS
    choices = fields.integer("n", 1, MAX_CHOICES) or 1
    if choices * len(prompts) > MAX_CHOICES:
        refuse(f"{len(prompts)} prompts with n={choices}: at most {MAX_CHOICES} answers in one call", "n")
    stream, include_usage = _streaming(fields)
    fields.unsupported("best_of", 1, instead="ask for n answers and choose")
    fields.unsupported("suffix", "", instead="the model only continues a text at its end")
    fields.done()
    requests: list[Request] = []
    counts = []
    for prompt in prompts:
        request = dataclasses.replace(asked, prompt=prompt)
        counts.append(_count(engine, request, "prompt"))
        request = _limited(request, limit, engine.config.context - counts[-1])
        requests += _choices(request, choices)
    return Call(
        requests=tuple(requests),
        prompt_tokens=sum(counts),
        stream=stream,
        include_usage=include_usage,
        echo=tuple(r.prompt or "" for r in requests) if echo else (),
    )


def prompt_tokens(format: DialogFormat, request: Request) -> int:
    """The length of a request's prompt, with everything that the dialog format adds. Raises `PunaError`."""
    if request.prompt is not None:
        return 1 + len(format.tokenizer.encode(request.prompt))  # begin_of_text
    return len(format.render(request.dialog).ids)


def check_model(asked: str, engine: Any, model: str) -> str | None:
    """The adapter that a client asks for by the name of a model; None for the model itself. Raises `ApiError`."""
    if asked == model:
        return None
    if asked not in engine.adapters:
        has = ", ".join(map(repr, (model, *engine.adapters)))
        message = f"the model {asked!r} does not exist; this server has {has}"
        raise ApiError(404, message, param="model", code="model_not_found")
    return asked


def _request(fields: Fields, engine: Any, adapter: str | None, *, dialog: Dialog = (), **wanted: Any) -> Request:
    """A request without a prompt, drawn as the call says and with the log-probabilities `wanted`."""
    drawn = settings.sampling(fields, engine.tokenizer.vocab_size)
    fields.ignore(*SERVICE_FIELDS)
    structure = settings.structure(fields)
    if structure is not None:
        try:
            engine.check_form(structure)
        except PunaError as error:
            refuse(str(error), "response_format")
    return Request(
        dialog=dialog,
        sampling=dataclasses.replace(drawn, **wanted),
        structure=structure,
        owner=settings.owner(fields),
        adapter=adapter,
    )


def _streaming(fields: Fields) -> tuple[bool, bool]:
    stream = fields.flag("stream")
    given = fields.take("stream_options")
    if given is None:
        return stream, False
    if not stream:
        refuse("stream_options goes with stream=true", "stream_options")
    options = Fields(given, "stream_options")
    include_usage = options.flag("include_usage")
    options.ignore("include_obfuscation")
    options.done()
    return stream, include_usage


def _prompts(fields: Fields) -> list[str]:
    value = fields.take("prompt")
    prompts = [value] if isinstance(value, str) else value
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) for p in prompts):
        refuse("prompt must be a string or an array of strings (token ids are not accepted)", "prompt", "invalid_type")
    return prompts


def _count(engine: Any, request: Request, param: str) -> int:
    """The prompt's length in tokens. Raises `ApiError` where it leaves no room for an answer."""
    try:
        count = prompt_tokens(engine.format, request)
    except PunaError as error:
        refuse(str(error), param)
    if count >= engine.config.context:
        refuse(
            f"this model's maximum context length is {engine.config.context} tokens, but the {param} "
            f"{'have' if param == 'messages' else 'has'} {count} tokens; shorten it: nothing is cut off silently",
            param,
            "context_length_exceeded",
        )
    return count


def _limited(request: Request, limit: int | None, room: int) -> Request:
    """An answer ends at the client's limit or where the context does, with finish_reason "length" in both cases."""
    sampling = dataclasses.replace(request.sampling, max_tokens=min(limit or room, room))
    return dataclasses.replace(request, sampling=sampling)


def _choices(request: Request, count: int) -> tuple[Request, ...]:
    seeds = ((request.sampling.seed + i) % 2**63 for i in range(count))
    return tuple(
        dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, seed=seed)) for seed in seeds
    )


def _tools(fields: Fields) -> list[dict[str, Any]]:
    """The functions on offer, as {name, description, parameters}; none if tool_choice is "none"."""
    functions = []
    for i, item in enumerate(fields.array("tools", longest=MAX_TOOLS)):
        tool = Fields(item, f"tools[{i}]")
        if tool.text("type") != "function":
            refuse("only tools of type 'function' are supported", tool.name("type"))
        function = Fields(tool.take("function"), tool.name("function"))
        name = function.text("name")
        if not TOOL_NAME.fullmatch(name):
            refuse(f"{name!r} cannot be a function's name: letters, digits, _ . - (at most 64)", function.name("name"))
        description = function.text("description", "")
        parameters = function.take("parameters", {"type": "object", "properties": {}})
        Fields(parameters, function.name("parameters"))
        function.unsupported("strict", False, instead="arguments follow the schema as well as the model can")
        function.done()
        tool.done()
        functions.append({"name": name, "description": description, "parameters": parameters})
    choice = fields.take("tool_choice", "auto")
    if choice not in ("auto", "none"):
        refuse("tool_choice must be 'auto' or 'none': a call cannot be forced", "tool_choice", "unsupported_parameter")
    return functions if choice == "auto" else []


def _dialog(fields: Fields, tools: list[dict[str, Any]], format: DialogFormat) -> Dialog:
    items = fields.array("messages", longest=MAX_MESSAGES)
    if not items:
        refuse("messages must hold at least one message", "messages", "missing_required_parameter")
    offered = {tool["name"] for tool in tools}
    call_ids: set[str] = set()
    dialog = []
    for i, item in enumerate(items):
        message = Fields(item, f"messages[{i}]")
        dialog.append(_message(message, format.dialect or "json", offered, call_ids))
        message.done()
    try:
        return format.offer(tuple(dialog), tools)
    except PunaError as error:
        refuse(str(error), "tools", "unsupported_parameter")


def _message(fields: Fields, usual: chat.Dialect, offered: set[str], call_ids: set[str]) -> Message:
    role = fields.text("role")
    fields.ignore("name")
    if role in ("system", "developer"):
        return chat.system(_content(fields))
    if role == "user":
        return chat.user(_content(fields))
    if role == "assistant":
        fields.ignore("refusal", "annotations", "reasoning_content")
        fields.unsupported("audio")
        fields.unsupported("function_call")
        calls = _tool_calls(fields, usual, offered, call_ids)
        return chat.assistant(_content(fields, required=not calls), *calls)
    if role == "tool":
        call = fields.text("tool_call_id")
        if call not in call_ids:
            refuse(f"no earlier message has a tool call with the id {call!r}", fields.name("tool_call_id"))
        return chat.tool_result(_content(fields))
    refuse(f"{role!r} is not a role: system, developer, user, assistant or tool", fields.name("role"), "invalid_value")


def _content(fields: Fields, *, required: bool = True) -> str:
    """A string, or the texts of its parts put together."""
    content = fields.take("content")
    if content is None and not required:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        refuse(f"{fields.name('content')} must be a string or an array of parts", fields.name("content"))
    texts = []
    for i, item in enumerate(content):
        part = Fields(item, f"{fields.name('content')}[{i}]")
        if (kind := part.text("type")) != "text":
            refuse(f"this model reads text only, not {kind!r}", part.name("type"), "unsupported_content")
        texts.append(part.text("text"))
        part.done()
    return "".join(texts)


def _tool_calls(fields: Fields, usual: chat.Dialect, offered: set[str], call_ids: set[str]) -> list[ToolCall]:
    calls = []
    for i, item in enumerate(fields.array("tool_calls", longest=MAX_TOOLS)):
        entry = Fields(item, f"{fields.name('tool_calls')}[{i}]")
        entry.ignore("type", "index")
        id = entry.text("id")
        call_ids.add(id)
        function = Fields(entry.take("function"), entry.name("function"))
        name, arguments = function.text("name"), function.text("arguments")
        try:
            parsed = parse_json(arguments.encode())
        except ApiError:
            parsed = None
        if not isinstance(parsed, dict):
            refuse(f"{function.name('arguments')} must be a JSON object in a string", function.name("arguments"))
        calls.append(_call(name, parsed, _dialect(id) or _guessed(name, parsed, usual, offered)))
        function.done()
        entry.done()
    return calls


def _dialect(id: str) -> chat.Dialect | None:
    """How the model wrote a call that comes back in the history, as the id says that `replies.tool_calls` gave it."""
    found = CALL_ID.fullmatch(id)
    return found[1] if found else None  # type: ignore[return-value]  (the pattern names the dialects)


def _guessed(name: str, arguments: dict[str, Any], usual: chat.Dialect, offered: set[str]) -> chat.Dialect:
    """The dialect of a call that another server's id names: the client keeps only name and arguments."""
    if name in offered:
        return usual
    if name == CODE_INTERPRETER and arguments.keys() == {"code"}:
        return "python"
    return "builtin" if name in BUILTIN_TOOLS else usual


def _call(name: str, arguments: dict[str, Any], dialect: chat.Dialect) -> ToolCall:
    """The call, in `dialect` if that can say it, else in JSON, which says any."""
    call = ToolCall(name=name, arguments=arguments, dialect=dialect)
    try:
        write_call(call)
    except PunaError:
        return dataclasses.replace(call, dialect="json")
    return call
