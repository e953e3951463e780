"""The server: OpenAI's API for programs, a chat page for people, one engine behind both.

    POST /v1/chat/completions   POST /v1/completions   streamed or whole (`calls` reads, `worker` answers, `replies` writes)
    GET  /v1/models  /v1/models/NAME
    GET  /            the page          GET /puna/info   what the page shows about the model
    GET  /health      is it up          GET /metrics     counts, for Prometheus
    POST /puna/tools/NAME               runs one of the server's own tools on a call that the model made

The page is a client like any other: when an answer is a call of a built-in tool it has the server run it, shows the
result, and sends it back as a tool message. Other clients run their own tools.

It listens on this machine only, unless told otherwise, and then it insists on an API key (`gate`). A client that
disconnects stops its answer. Ctrl-C ends all answers and the server, in one line.
"""

import asyncio
import errno
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Coroutine, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

from puna import __version__, log
from puna.chat import TokenChoice, ToolCall
from puna.config import require
from puna.errors import MissingExtra, PunaError
from puna.inference.setup import Setup
from puna.serve import replies
from puna.serve.calls import Call, chat_call, check_model, completion_call
from puna.serve.fields import ApiError, parse_json
from puna.serve.gate import Gate, is_loopback, read_body
from puna.serve.metrics import Metrics
from puna.serve.page import Page
from puna.serve.toolset import offered
from puna.serve.worker import Ticket, Worker
from puna.tools.agent import execute
from puna.tools.definition import Tool

try:
    import uvicorn
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse, PlainTextResponse
    from starlette.exceptions import HTTPException

    from puna.serve.patience import Patient
except ImportError as error:
    raise MissingExtra(error.name or "fastapi", "serve") from None

MAX_TOOL_RUNS = 8  # at once
CLIENT_GONE = 499  # nginx's status for it; nobody reads it but the metrics


def serve(
    path: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    name: str = "",
    examples: Sequence[str] = (),
    tools: Sequence[Tool] = (),
    setup: Setup | None = None,
) -> None:
    """Serve the checkpoint or quantised artifact at `path` until Ctrl-C.

    `name` is the model's name to clients (the directory's, if empty); `examples` are questions that the page offers,
    `tools` those that it lets the model use, `setup` how the engine is run; its adapters are models to clients.
    Raises `ConfigError` for an open host without a key, and `PunaError` if the port cannot be had.
    """
    check_address(host, api_key)
    setup, name = setup or Setup(), name or path.resolve().name
    check_names(name, [adapter for adapter, _ in setup.adapters])
    with listen(host, port) as listener:
        engine = setup.open(path)
        worker = Worker(engine, slots=setup.slots, queue=setup.queue)
        face = Face(engine, name=name, examples=examples, tools=tools, worker=worker)
        run(face, listener, host=host, api_key=api_key)


def check_address(host: str, api_key: str | None) -> None:
    """The rules about who can reach the server. Raises `ConfigError`."""
    require(
        is_loopback(host) or bool(api_key),
        f"host {host!r} lets other machines in, and there is no API key",
        hint="add --api-key, or keep the default --host 127.0.0.1",
    )
    printable = api_key is None or (api_key.isascii() and api_key.isprintable() and " " not in api_key)
    require(printable, "the API key must be printable ASCII without spaces", hint="e.g. openssl rand -hex 24")


def check_names(name: str, adapters: Sequence[str]) -> None:
    """The model and its adapters are told apart by clients. Raises `ConfigError`."""
    require(
        name not in adapters, f"the model and an adapter are both called {name!r}", hint="give --name, or rename one"
    )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises `PunaError` that says why it cannot be had."""
    require(0 <= port <= 65535, f"cannot listen on {host} port {port}", hint="ports go from 1 to 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except (OSError, OverflowError) as error:
        hints = {
            errno.EADDRINUSE: f"another program listens there; try --port {port + 1 if port < 65535 else 8000}",
            errno.EACCES: "ports below 1024 need privileges; try --port 8000",
        }
        hint = hints.get(getattr(error, "errno", 0), "check --host and --port (1 to 65535)")
        raise PunaError(f"cannot listen on {host} port {port}: {error}", hint=hint) from None
    return listener


def run(face: "Face", listener: socket.socket, *, host: str, api_key: str | None = None) -> None:
    """Serve on a listening socket until the process is interrupted or terminated."""
    config = settings_of(face.behind_gate(host, api_key))
    shown = f"[{host}]" if ":" in host else host
    log.info(f"{face.name} answers at http://{shown}:{listener.getsockname()[1]} (Ctrl-C stops)")
    _Server(config, face.worker).run(sockets=[listener])
    face.worker.close()
    log.info("stopped")


def settings_of(app: Gate) -> uvicorn.Config:
    """How uvicorn serves the application."""
    return uvicorn.Config(
        app,
        http=Patient,
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=5,
    )


class _Server(uvicorn.Server):
    """Uvicorn's server, except that a signal ends it without ending the process, and ends the answers first."""

    def __init__(self, config: uvicorn.Config, worker: Worker):
        super().__init__(config)
        self._worker = worker

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._worker.stop()
        await super().shutdown(sockets)


class Face:
    """The application: routes over one worker."""

    def __init__(
        self,
        engine: Any,
        *,
        name: str,
        examples: Sequence[str] = (),
        tools: Sequence[Tool] = (),
        worker: Worker | None = None,
    ):
        self.engine, self.name, self.examples = engine, name, list(examples)
        self.tools = list(tools) if engine.format.dialect else []
        self.worker = worker or Worker(engine)
        self._tool_runs = 0
        self.metrics = Metrics()
        self.page = Page.read()
        self.started = int(time.time())
        self.app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        self._add_routes()

    def behind_gate(self, host: str, api_key: str | None) -> Gate:
        """The ASGI application with its checks, for a server bound to `host`."""

        async def answer_error(error: ApiError, scope: Any, receive: Any, send: Any) -> None:
            await self._error_response(scope["path"], error)(scope, receive, send)

        return Gate(self.app, host=host, api_key=api_key, answer_error=answer_error)

    def _add_routes(self) -> None:
        app = self.app
        app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        app.add_api_route("/v1/completions", self.completions, methods=["POST"])
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/v1/models/{model:path}", self.model, methods=["GET"])
        app.add_api_route("/puna/info", self.info, methods=["GET"])
        app.add_api_route("/puna/tools/{name}", self.tool, methods=["POST"])
        app.add_api_route("/health", self.health, methods=["GET"])
        app.add_api_route("/metrics", self.prometheus, methods=["GET"])
        app.add_api_route("/", self.index, methods=["GET"])
        app.add_exception_handler(ApiError, self._on_api_error)
        app.add_exception_handler(HTTPException, self._on_http_error)
        app.add_exception_handler(Exception, self._on_failure)

    # Programs

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        return await self._answer(request, is_chat=True)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions"""
        return await self._answer(request, is_chat=False)

    async def models(self, _request: Request) -> Response:
        """GET /v1/models"""
        return JSONResponse({"object": "list", "data": [self._model_card(name) for name in self._models()]})

    async def model(self, model: str) -> Response:
        """GET /v1/models/NAME"""
        check_model(model, self.engine, self.name)
        return JSONResponse(self._model_card(model))

    def _models(self) -> tuple[str, ...]:
        """The model, and the model with each of its adapters."""
        return (self.name, *self.engine.adapters)

    def _model_card(self, model: str) -> dict[str, Any]:
        card = {"id": model, "object": "model", "created": self.started, "owned_by": "puna"}
        return card if model == self.name else {**card, "parent": self.name}

    async def _answer(self, request: Request, *, is_chat: bool) -> Response:
        body = await read_body(request.receive)
        read = chat_call if is_chat else completion_call
        call = await asyncio.to_thread(lambda: read(parse_json(body), self.engine, self.name))
        reply = replies.Reply(call, call.requests[0].adapter or self.name, is_chat=is_chat)
        ticket = self.worker.submit(call.requests)
        path = request.url.path
        if call.stream:
            return EventStream(self._events(call, reply, ticket, path))
        try:
            completions = await while_connected(request.receive, ticket.completions())
        finally:
            self._settle(ticket)
        self._count(path, call, reply.usage(completions))
        return JSONResponse(reply.whole(completions))

    async def _events(self, call: Call, reply: replies.Reply, ticket: Ticket, path: str) -> AsyncIterator[bytes]:
        if reply.is_chat:
            speeches = [replies.Speech(call.tools, self.engine.format.reader(call.tools)) for _ in call.requests]
        else:
            speeches = [replies.Speech(None) for _ in call.requests]
        unsaid: list[list[TokenChoice]] = [[] for _ in call.requests]  # log-probabilities of text that is kept back
        completions = []
        try:
            for chunk in reply.opening():
                yield replies.event(chunk)
            async for index, piece in ticket:
                unsaid[index] += piece.tokens
                if text := speeches[index].say(piece.text):
                    yield replies.event(reply.chunk(index, content=text, tokens=unsaid[index]))
                    unsaid[index] = []
                if piece.completion is not None:
                    completions.append(piece.completion)
                    rest, calls = speeches[index].finish(piece.completion)
                    for chunk in reply.closing(index, rest, calls, piece.completion, unsaid[index]):
                        yield replies.event(chunk)
            if call.include_usage:
                yield replies.event(reply.tally(completions, ticket))
            yield replies.event("[DONE]")
            self._count(path, call, reply.usage(completions))
        except ApiError as error:
            self.metrics.add("puna_requests_total", path=path, status=error.status)
            yield replies.error_event(error)
        finally:
            self._settle(ticket)

    def _settle(self, ticket: Ticket) -> None:
        """However an answer ended, nothing of it goes on."""
        if not ticket.finished:
            self.metrics.add("puna_cancelled_total")
        ticket.cancel()

    def _count(self, path: str, call: Call, usage: dict[str, int]) -> None:
        self.metrics.add("puna_requests_total", path=path, status=200)
        self.metrics.add("puna_prompt_tokens_total", usage["prompt_tokens"])
        self.metrics.add("puna_completion_tokens_total", usage["completion_tokens"])

    # People and machines that watch

    async def index(self, _request: Request) -> Response:
        """GET /"""
        return Response(self.page.html, media_type="text/html", headers={"Content-Security-Policy": self.page.policy})

    async def info(self, _request: Request) -> Response:
        """GET /puna/info"""
        context = self.engine.config.context
        return JSONResponse(
            {
                "model": self.name,
                "adapters": self.engine.adapters,
                "version": __version__,
                "context": context,
                "parameters": self.engine.config.parameters,
                "examples": self.examples,
                "tools": [tool.name for tool in self.tools],
                "tools_system": offered(self.engine.format, (), self.tools)[0].content if self.tools else "",
                "dialog": self.engine.format.name,
            }
        )

    async def tool(self, name: str, request: Request) -> Response:
        """POST /puna/tools/NAME with a call's arguments"""
        arguments = parse_json(await read_body(request.receive))
        if name not in {tool.name for tool in self.tools}:
            raise ApiError(404, f"this server has no tool {name!r}", code="tool_not_found")
        if self._tool_runs >= MAX_TOOL_RUNS:
            raise ApiError(503, "too many tools are running", kind="server_error", code="overloaded")
        self._tool_runs += 1
        try:
            execution = await asyncio.to_thread(execute, ToolCall(name=name, arguments=arguments), self.tools)
        finally:
            self._tool_runs -= 1
        return JSONResponse({"result": execution.result})

    async def health(self, _request: Request) -> Response:
        """GET /health"""
        return JSONResponse({"status": "ok"})

    async def prometheus(self, _request: Request) -> Response:
        """GET /metrics"""
        worker = self.worker
        page = self.metrics.page(waiting=worker.waiting, active=worker.active, engine=self.engine.figures())
        return PlainTextResponse(page)

    # Errors, all in OpenAI's shape

    def _error_response(self, path: str, error: ApiError) -> Response:
        self.metrics.add("puna_requests_total", path=path if path in self._paths() else "other", status=error.status)
        return JSONResponse(error.body(), error.status, headers=error.headers)

    def _paths(self) -> set[str]:
        return {route.path for route in self.app.routes}

    async def _on_api_error(self, request: Request, error: ApiError) -> Response:
        return self._error_response(request.url.path, error)

    async def _on_http_error(self, request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        kept = ApiError(error.status_code, message, headers=dict(error.headers or {}))
        return self._error_response(request.url.path, kept)

    async def _on_failure(self, request: Request, _error: Exception) -> Response:
        failed = ApiError(500, "the server failed on this request", kind="server_error")
        return self._error_response(request.url.path, failed)


class EventStream(Response):
    """A stream of server-sent events that stops when the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes]):
        super().__init__(headers={"X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def write() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with aclosing(self._events) as events:
                async for data in events:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        with suppress(ApiError):  # gone: nobody is left to tell
            await while_connected(receive, write())


async def while_connected(receive: Any, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of `work`, which is cancelled as soon as the client disconnects (then raises `ApiError` 499)."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    both: tuple[Awaitable[Any], ...] = (working, watching)
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(CLIENT_GONE, "the client went away")
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(*both, return_exceptions=True)
