import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from scripted_engine import ScriptedEngine, echo

pytest.importorskip("fastapi")


@dataclass
class Running:
    """A real server on a loopback port."""

    url: str
    face: Any
    engine: ScriptedEngine


@contextmanager
def running(
    engine: ScriptedEngine, *, api_key: str | None = None, tools: Sequence[Any] = (), **settings: Any
) -> Iterator[Running]:
    import uvicorn

    from puna.serve.http import Face, listen, settings_of
    from puna.serve.worker import Worker

    listener = listen("127.0.0.1", 0)
    examples = ["Who lives in Tarma?", "What is 12 * (3 + 4)?"]
    face = Face(engine, name="tiny", examples=examples, tools=tools, worker=Worker(engine, **settings))
    app = face.behind_gate("127.0.0.1", api_key)
    config = settings_of(app)
    config.timeout_graceful_shutdown = 1
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", face, engine)
    finally:
        server.should_exit = True
        face.worker.close()
        thread.join(timeout=10)
        listener.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Running]]:
    """`serve(engine, ...)` starts a server that ends with the test."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        yield lambda engine=None, **settings: stack.enter_context(running(engine or ScriptedEngine(echo), **settings))


@pytest.fixture
def client(serve) -> Callable[..., Any]:
    """`client(engine, ...)` is OpenAI's own client, talking to a new server."""
    openai = pytest.importorskip("openai")

    def connect(engine: ScriptedEngine | None = None, **settings: Any) -> Any:
        server = serve(engine, **settings)
        key = settings.get("api_key") or "none"
        return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=20)

    return connect
