"""Fetching, against a small hub that runs on this machine: what is fetched, what is checked, and what goes wrong."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": bytes(range(256)) * 400,
    "pytorch_model.bin": b"a pickle",
    "modeling.py": b"print('code')",
    "original/params.json": b"{}",
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download asks for. `faults` changes what it serves."""

    faults: ClassVar[set] = set()
    asked: ClassVar[list] = []

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urlsplit(self.path).path
        self.asked.append(path)
        if "gated" in self.faults:
            return self.answer(403, headers={"X-Error-Code": "GatedRepo"})
        if "gone" in self.faults:
            return self.answer(404, headers={"X-Error-Code": "RepoNotFound"})
        if path.startswith("/api/models/"):
            listed = [self.entry(name) for name in FILES]
            if "/tree/" in path:
                return self.json([{**entry, "type": "file", "path": entry["rfilename"]} for entry in listed])
            return self.json({"id": "owner/model", "sha": COMMIT, "private": False, "siblings": listed})
        name = path.partition(f"/resolve/{COMMIT}/")[2] or path.partition("/resolve/main/")[2]
        if name not in FILES:
            return self.answer(404, headers={"X-Error-Code": "EntryNotFound"})
        body = FILES[name]
        if "damaged" in self.faults and name.endswith(".safetensors"):
            body = b"\1" + body[1:]
        etag = hashlib.sha256(FILES[name]).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(body))}
        wanted = self.headers.get("Range")
        if wanted and self.command == "GET":
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            body, whole = body[int(first) : int(last) + 1 if last else None], len(body)
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(body) - 1}/{whole}"
            return self.answer(206, body, headers)
        return self.answer(200, body, headers)

    def json(self, value):
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json", "X-Repo-Commit": COMMIT})

    def entry(self, name):
        body = FILES[name]
        entry = {"rfilename": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest(), "blobId": "x"}
        if name.endswith((".safetensors", ".bin")):
            digest = hashlib.sha256(body).hexdigest()
            entry["lfs"] = {"sha256": digest, "oid": digest, "size": len(body), "pointerSize": 100}
        return entry


@pytest.fixture
def hub():
    Hub.faults, Hub.asked = set(), []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Hub, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


SCRIPT = """
import sys
from pathlib import Path
from puna.errors import PunaError
from puna.model.pull import PullConfig, pull
try:
    print(pull(sys.argv[1], Path(sys.argv[2]), PullConfig(original="original" in sys.argv)))
except PunaError as error:
    sys.exit(f"error: {error}")
"""


def pulled(endpoint, out, *more, name="owner/model", **environment):
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(out.parent / "home"), "HF_HUB_DISABLE_XET": "1", **environment}
    without = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    command = [sys.executable, "-c", SCRIPT, name, str(out), *more]
    return subprocess.run(command, capture_output=True, text=True, env=without | settings, timeout=120)


def test_weights_and_settings_are_fetched_and_neither_pickles_nor_code(hub, tmp_path):
    done = pulled(hub[1], tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert {name for name in found if not name.startswith(".cache")} == {"config.json", "model.safetensors"}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_the_original_folder_comes_when_asked_for(hub, tmp_path):
    done = pulled(hub[1], tmp_path / "out", "original")
    assert done.returncode == 0 and done.stdout.strip().endswith("original")
    assert (tmp_path / "out" / "original" / "params.json").is_file()


def test_a_file_that_is_not_what_the_hub_says_is_removed_and_named(hub, tmp_path):
    Hub.faults = {"damaged"}
    done = pulled(hub[1], tmp_path / "out")
    assert done.returncode != 0 and "SHA-256" in done.stderr and "model.safetensors" in done.stderr
    assert not (tmp_path / "out" / "model.safetensors").exists()
    Hub.faults = set()
    assert pulled(hub[1], tmp_path / "out").returncode == 0


@pytest.mark.parametrize(
    ("fault", "words"),
    [("gated", ("is gated", "HF_TOKEN")), ("gone", ("no such model", "spelling"))],
)
def test_refusals_say_what_to_do(hub, tmp_path, fault, words):
    Hub.faults = {fault}
    done = pulled(hub[1], tmp_path / "out")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_offline_nothing_is_asked(hub, tmp_path):
    done = pulled(hub[1], tmp_path / "out", HF_HUB_OFFLINE="1")
    assert done.returncode != 0 and "HF_HUB_OFFLINE" in done.stderr and not Hub.asked


def test_an_unreachable_hub_and_a_wrong_name_are_told(tmp_path):
    done = pulled("http://127.0.0.1:9", tmp_path / "out")
    assert done.returncode != 0 and "cannot be reached" in done.stderr, done.stderr
    for wrong in ("llama", "../x", "owner/a--b", "owner/.hidden", "a/b/c"):
        told = pulled("http://127.0.0.1:9", tmp_path / "out", name=wrong).stderr
        assert "owner/model" in told and "Traceback" not in told
