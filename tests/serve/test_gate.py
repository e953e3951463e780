"""Who may come in, and how the server starts and ends."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from scripted_engine import ScriptedEngine, echo

from puna.errors import ConfigError, PunaError
from puna.serve.gate import OPEN_PATHS, is_local_name
from puna.serve.http import check_address, listen

HERE = Path(__file__).parent
CHAT = {"messages": [{"role": "user", "content": "hello"}]}


def get(server, path="/v1/models", **headers):
    return httpx.get(server.url + path, headers=headers, trust_env=False)


@pytest.mark.parametrize(
    ("host", "accepted"),
    [
        ("127.0.0.1:8000", True),
        ("localhost", True),
        ("LOCALHOST:1", True),
        ("[::1]:8000", True),
        ("evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example:8000", False),
        ("evil.example@127.0.0.1", True),  # the part before @ is no host
        ("127.0.0.1@evil.example", False),
        ("[::1", False),
        ("192.168.0.1", False),
        ("", False),
    ],
)
def test_only_names_of_this_machine_are_local(host, accepted):
    assert is_local_name(host, "127.0.0.1") == accepted


def test_a_rebound_name_and_a_foreign_page_are_refused(serve):
    server = serve()
    own = server.url.removeprefix("http://")
    assert get(server, Host="evil.example").status_code == 403
    assert get(server, "/", Host="evil.example").status_code == 403
    assert get(server, Origin="http://evil.example").status_code == 403
    assert get(server, Origin="null").status_code == 403
    assert get(server, Origin=f"http://{own}").status_code == 200
    assert "access-control-allow-origin" not in get(server, Origin=f"http://{own}").headers


def test_with_a_key_every_route_but_the_page_and_health_needs_it(serve):
    server = serve(api_key="secret")
    for route in server.face.app.routes:
        path = route.path.replace("{model:path}", "tiny").replace("{name}", "calculator")
        method = next(iter(route.methods - {"HEAD"}))
        for header in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "secret"},
            {"Authorization": "Basic secret"},
        ):
            answer = httpx.request(method, server.url + path, json=CHAT, headers=header, trust_env=False)
            assert (answer.status_code == 401) == (path not in OPEN_PATHS), path
        right = {"Authorization": "Bearer secret"}
        assert httpx.request(method, server.url + path, json=CHAT, headers=right, trust_env=False).status_code != 401


def test_openais_client_sends_the_key(client):
    assert client(ScriptedEngine(echo), api_key="secret").models.list().data


def test_an_open_host_needs_a_key():
    with pytest.raises(ConfigError, match="--api-key"):
        check_address("0.0.0.0", None)
    check_address("0.0.0.0", "secret")
    check_address("127.0.0.1", None)
    with pytest.raises(ConfigError):
        check_address("127.0.0.1", "two words")


def test_a_port_in_use_is_named_with_a_way_out():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        taken.listen()
        with pytest.raises(PunaError, match=f"port {port}") as caught:
            listen("127.0.0.1", port)
        assert f"--port {port + 1}" in caught.value.hint


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70000), ("not a host", 8000), ("192.0.2.1", 8000)])
def test_an_address_that_cannot_be_had_is_an_error_of_ours(host, port):
    with pytest.raises(PunaError, match="cannot listen"):
        listen(host, port)


def test_the_page_comes_with_a_policy_that_names_its_own_script(serve):
    answer = get(serve(), "/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy and "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "innerHTML" not in answer.text and "http://www.w3.org" in answer.text
    assert answer.text.count("<script") == answer.text.count("<style") == 1


def test_metrics_count_requests_and_tokens(serve):
    server = serve()
    usage = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, trust_env=False).json()["usage"]
    httpx.post(f"{server.url}/v1/chat/completions", json={}, trust_env=False)
    httpx.get(f"{server.url}/made/up/path", trust_env=False)
    text = get(server, "/metrics").text
    assert 'puna_requests_total{path="/v1/chat/completions",status="200"} 1' in text
    assert 'puna_requests_total{path="/v1/chat/completions",status="400"} 1' in text
    assert 'path="other",status="404"' in text and "made" not in text
    assert f"puna_prompt_tokens_total {usage['prompt_tokens']}" in text
    assert f"puna_completion_tokens_total {usage['completion_tokens']}" in text


PROGRAM = """
from scripted_engine import ScriptedEngine, echo
from puna.serve.http import Face, listen, run
listener = listen("127.0.0.1", 0)
print(listener.getsockname()[1], flush=True)
face = Face(ScriptedEngine(lambda r: "word " * 300, pause_s=0.01), name="tiny")
run(face, listener, host="127.0.0.1")
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_server_ends_its_answers_and_itself_in_one_line(sent):
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parent.parent}{os.pathsep}{HERE}"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    )
    port = int(process.stdout.readline())
    body = {**CHAT, "stream": True}
    try:
        with httpx.stream(
            "POST", f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=20, trust_env=False
        ) as answer:
            lines = answer.iter_lines()
            while '"content": "w"' not in next(lines):
                pass
            process.send_signal(sent)
            rest = "".join(lines)
        assert "shutting down" in rest and "[DONE]" not in rest
        assert process.wait(timeout=10) == 0
        news = process.stderr.read()
        assert "Traceback" not in news and news.splitlines()[-1] == "stopped"
    finally:
        process.kill()
    process.stdout.close()
    process.stderr.close()


def test_the_socket_is_loopback_only_by_default():
    with listen("127.0.0.1", 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1" and listener.family == socket.AF_INET


def answer_to(server, sent: bytes, wait_s: float = 10.0) -> bytes:
    """What a connection that sends only that gets before it is closed."""
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=wait_s) as connection:
        connection.sendall(sent)
        return b"".join(iter(lambda: connection.recv(4096), b""))


def test_a_connection_that_does_not_say_what_it_wants_is_closed(serve, monkeypatch):
    monkeypatch.setattr("puna.serve.patience.HEAD_S", 0.3)
    monkeypatch.setattr("puna.serve.gate.BODY_S", 0.3)
    server = serve(ScriptedEngine(echo, pause_s=0.05))
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    assert answer_to(server, b"") == answer_to(server, head) == b""
    assert b" 408 " in answer_to(server, head + b"Content-Length: 100\r\n\r\n{")
    assert answer_to(server, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /he").count(b"HTTP/1.1") == 1
    answer = httpx.post(server.url + "/v1/chat/completions", json=CHAT, trust_env=False)  # takes 0.8 s
    assert answer.status_code == 200 and answer.elapsed.total_seconds() > 0.5
