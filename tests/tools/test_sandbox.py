"""Programs that misbehave in every way we could think of, against the sandbox. Each one must leave it working."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from puna.errors import ConfigError
from puna.tools import sandbox as module
from puna.tools.sandbox import Sandbox, SandboxConfig, code_interpreter

KERNEL_WALL = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the system call filter")


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as sandbox:
        yield sandbox
        assert sandbox.run("6*7").stdout == "42\n"  # whatever came before


def escaped(name: str) -> str:
    """The way of a program that goes around the import guard and the audit hook's wording to the module `name`."""
    return f"__import__('sys').modules[{name!r}]"


# Honest programs.


def test_the_last_expression_is_shown_as_in_a_notebook(sandbox):
    assert sandbox.run("x = 20\nprint('a')\nx + 1").text == "a\n21"


def test_none_and_statements_show_nothing(sandbox):
    assert sandbox.run("None").text == ""
    assert sandbox.run("x = 3").text == ""


def test_output_keeps_characters_outside_ascii(sandbox):
    assert sandbox.run("print('ñandú 草原 🦙')").stdout == "ñandú 草原 🦙\n"


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("import math; math.comb(10, 3)", "120"),
        ("from datetime import date, timedelta; str(date(2024, 2, 28) + timedelta(days=2))", "'2024-03-01'"),
        ("import datetime; datetime.datetime.strptime('7 March 1999', '%d %B %Y').strftime('%A')", "'Sunday'"),
        ("import re; re.findall(r'\\d+', 'a1b22')", "['1', '22']"),
        ("import collections.abc, statistics; statistics.median([3, 1, 2])", "2"),
        ("import json; json.dumps({'b': 1, 'a': [None]}, sort_keys=True)", '\'{"a": [null], "b": 1}\''),
        ("from dataclasses import dataclass\n@dataclass\nclass P:\n  x: int\nP(3)", "P(x=3)"),
        ("import sys; sys.maxsize > 2**31", "True"),
        ("import hashlib; hashlib.sha256(b'').hexdigest()[:8]", "'e3b0c442'"),
        ("import decimal; decimal.Decimal(1) / 7", "Decimal('0.1428571428571428571428571429')"),
        ("'grüße'.encode('latin-1')", "b'gr\\xfc\\xdfe'"),
        ("[n for n in range(2, 30) if all(n % d for d in range(2, n))]", "[2, 3, 5, 7, 11, 13, 17, 19, 23, 29]"),
    ],
)
def test_the_computing_part_of_the_standard_library_works(sandbox, code, shown):
    assert sandbox.run(code).text == shown


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("1/0", "ZeroDivisionError: division by zero"),
        ("print(", "SyntaxError: '(' was never closed (<code>, line 1)"),
        ("raise KeyError('k')", "KeyError: 'k'"),
        ("input()", "EOFError: EOF when reading a line"),
        ("exit_code = 3; raise SystemExit(exit_code)", "SystemExit: 3"),
        ("import os", "ImportError: module 'os' is not available here"),
        ("import numpy", "ImportError: module 'numpy' is not available here"),
        ("open('/etc/passwd')", "PermissionError: the sandbox refuses open"),
        ("x = '\\ud800'\nx.encode()", "UnicodeEncodeError"),
        ("\x00", "SyntaxError"),
    ],
)
def test_errors_are_told_in_one_line(sandbox, code, error):
    run = sandbox.run(code)
    assert run.error.startswith(error)
    assert run.text.startswith("error: ")
    assert not run.timed_out


def test_output_before_an_error_is_kept(sandbox):
    assert sandbox.run("print(1)\nprint(2)\n1/0").text == "1\n2\nerror: ZeroDivisionError: division by zero"


def test_the_same_program_prints_the_same_in_another_sandbox(sandbox):
    code = "import random\nprint(set('abcdefgh'), random.random(), object(), print, (lambda: 0))"
    with Sandbox() as other:
        first, second = sandbox.run(code), other.run(code)
    assert first == second
    assert not first.error


def test_one_program_does_not_see_another(sandbox):
    sandbox.run("import builtins, math, sys\nleft = 1\nbuiltins.print = None\nmath.pi = 3\nsys.setrecursionlimit(50)")
    assert (
        sandbox.run("import math\nprint(math.pi > 3)\nleft").text
        == "True\nerror: NameError: name 'left' is not defined"
    )


def test_a_one_liner_takes_a_fraction_of_a_start(sandbox):
    def seconds(action, times):
        started = time.monotonic()
        for _ in range(times):
            action()
        return (time.monotonic() - started) / times

    def start():
        with Sandbox() as other:
            other.start()

    assert seconds(lambda: sandbox.run("6 * 7"), 50) < seconds(start, 5) / 2  # about 3 ms and 60 ms on an idle machine


def test_the_environment_is_empty_and_the_directory_is_not_ours(sandbox, monkeypatch):
    monkeypatch.setenv("PUNA_SECRET", "llama")
    with Sandbox() as fresh:
        text = fresh.run(f"print(dict({escaped('os')}.environ), __import__('sys').path)").text
    assert "llama" not in text
    assert "site-packages" not in text
    assert str(Path.cwd()) not in text


# Using up what there is.


@pytest.mark.parametrize(
    "code", ["while True: pass", "9**9**9", "import time; time.sleep(60)", "import re; re.match('(a+)+b', 'a'*40)"]
)
def test_a_program_that_does_not_end_is_ended(code):
    with Sandbox(SandboxConfig(wall_s=0.5)) as sandbox:
        started = time.monotonic()
        run = sandbox.run("print('begun')\n" + code)
        assert run.timed_out
        assert run.stdout == "begun\n"
        assert run.error == "the time limit was exceeded"
        assert time.monotonic() - started < 10


def test_signals_cannot_be_used_to_outlive_the_time_limit():
    code = f"signal = {escaped('signal')}\nfor n in range(1, 65):\n  try: signal.signal(n, signal.SIG_IGN)\n  except (OSError, ValueError): pass\nwhile True: pass"
    with Sandbox(SandboxConfig(cpu_s=1, wall_s=3)) as sandbox:
        assert sandbox.run(code).timed_out


@pytest.mark.parametrize(
    "code",
    [
        "'a' * 10**11",
        "x = []\nwhile True: x.append(bytearray(10**6))",
        "[0] * 10**10",
        "range(10**9) and list(range(10**9))",
    ],
)
def test_a_memory_bomb_is_a_memory_error(sandbox, code):
    assert "MemoryError" in sandbox.run(code).error


def test_deep_recursion_ends_in_an_error(sandbox):
    assert "RecursionError" in sandbox.run("def f(): return f()\nf()").error
    crash = "x = ()\nfor _ in range(10**6): x = (x,)\nhash(x)"  # recursion in C, which nothing counts
    assert sandbox.run(crash).error == "the interpreter ended with signal 11"


@pytest.mark.parametrize(
    "code",
    [
        "(" * 5000 + ")" * 5000,
        "-" * 19_000 + "1",
        "[" * 150 + "]" * 150,
        "+".join(["1"] * 9000),
        "f(" * 5000,
        "lambda:" * 2800 + "0",
        "a" + ".a" * 9000,
    ],
)
def test_a_program_that_strains_the_parser_ends_in_an_error_or_a_result(sandbox, code):
    run = sandbox.run(code)
    assert run.error or run.stdout


def test_giant_output_is_cut(sandbox):
    run = sandbox.run("while True: print('llama ' * 100)")
    assert len(run.stdout) == sandbox.config.output_chars
    assert run.error == "the output was cut at 4,000 characters"


def test_a_giant_exception_text_is_cut(sandbox):
    assert len(sandbox.run("raise ValueError('x' * 10**6)").error) <= 4096


def test_a_giant_program_is_refused(sandbox):
    assert "characters" in sandbox.run("#" * 20_001).error


# Getting out. Each program goes to the module itself, past the import guard, and must be stopped below. They are written
# to do little harm should they succeed: signal 0 asks whether a process could be killed.

ATTACKS = {
    "read a file": f"{escaped('os')}.open('/etc/passwd', 0)",
    "read with io": "import io; io.open('/etc/passwd').read()",
    "read with FileIO": "import io; io.FileIO('/etc/passwd').read()",
    "list a folder": f"{escaped('os')}.listdir('/')",
    "write a file": "open('TARGET', 'w').write('x')",
    "make a folder": f"{escaped('os')}.mkdir('TARGET')",
    "remove a file": f"{escaped('os')}.remove('PRECIOUS')",
    "rename a file": f"{escaped('os')}.rename('PRECIOUS', 'TARGET')",
    "truncate a file": f"{escaped('os')}.truncate('PRECIOUS', 0)",
    "change a file's rights": f"{escaped('os')}.chmod('PRECIOUS', 0)",
    "ask about a file": f"{escaped('os')}.stat('/etc/passwd')",
    "make a pipe": f"{escaped('os')}.mkfifo('TARGET')",
    "start a process": f"{escaped('os')}.fork()",
    "fork bomb": f"for _ in range(50):\n  if {escaped('os')}.fork() == 0: break",
    "run a program": f"{escaped('os')}.execv('/bin/sh', ['sh', '-c', 'touch TARGET'])",
    "run a command": f"{escaped('os')}.system('touch TARGET')",
    "spawn": f"{escaped('os')}.posix_spawn('/bin/sh', ['sh', '-c', 'touch TARGET'], {{}})",
    "kill the zygote": f"{escaped('os')}.kill({escaped('os')}.getppid(), 0)",
    "kill us": f"{escaped('os')}.kill({os.getpid()}, 0)",
    "kill all": f"{escaped('os')}.kill(-1, 0)",
    "load a library": "import ctypes",
    "load a library, hidden": f"{escaped('ctypes')}.CDLL(None).getpid()",
    "raise the limits": f"r = {escaped('resource')}\nr.setrlimit(r.RLIMIT_NOFILE, (99, 99))\nopen('/etc/passwd').read()",
    "machine code": "(lambda: 0).__code__.replace(co_code=b'\\x00' * 8)",
    "walk the subclasses": "[c for c in object.__subclasses__() if c.__name__ == '_wrap_close'][0].__init__.__globals__['system']('touch TARGET')",
    "popen by subclasses": "[c for c in object.__subclasses__() if c.__name__ == 'BuiltinImporter'][0].load_module('posix').system('touch TARGET')",
    "all objects": f"{escaped('gc')}.get_objects()",
    "a thread": f"{escaped('_thread')}.start_new_thread(print, ())",
    "load from bytes": "import importlib; importlib.import_module('socket')",
    "loader": "__loader__.load_module('_socket').socket()",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_the_attempt_is_refused_and_leaves_no_trace(sandbox, name, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("still here")
    before = precious.stat()
    code = ATTACKS[name].replace("TARGET", str(tmp_path / "target")).replace("PRECIOUS", str(precious))
    run = sandbox.run(code + "\nprint('got out')")
    assert run.error and "got out" not in run.stdout
    assert "root:" not in run.stdout
    assert os.listdir(tmp_path) == ["precious"]
    assert (precious.read_text(), precious.stat().st_mode) == ("still here", before.st_mode)
    assert sandbox.run("1 + 1").stdout == "2\n"


# The same without Python's cooperation: what a program could do that has got hold of machine code, tried from C.


@KERNEL_WALL
@pytest.mark.parametrize(
    "call",
    [
        "open(b'/etc/passwd', 0)",
        "unlink(b'PRECIOUS')",
        "mkdir(b'TARGET', 511)",
        "stat(b'/etc/passwd', None)",
        "socket(2, 1, 0)",
        "fork()",
        "execv(b'/bin/true', None)",
        "kill(0, 0)",
        "ptrace(16, 1, None, None)",
        "setrlimit(7, None)",
        "unshare(0x10000000)",
        "prctl(38, 1, 0, 0, 0)",
        "dup(1)",
        "chdir(b'/')",
    ],
)
def test_the_kernel_refuses_even_c_code(call, tmp_path, kernel_walls_alone):
    """The child with every wall but the audit hook and the import guard, calling libc directly."""
    precious = tmp_path / "precious"
    precious.write_text("still here")
    call = call.replace("TARGET", str(tmp_path / "target")).replace("PRECIOUS", str(precious))
    run = kernel_walls_alone.run(
        f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nlibc.{call}, ctypes.get_errno()"
    )
    assert run.stdout == "(-1, 1)\n", run  # 1 is EPERM
    assert os.listdir(tmp_path) == ["precious"]


@contextmanager
def with_zygote(path: Path, *changes: tuple[str, str]):
    """A sandbox whose zygote lacks something."""
    source = module.ZYGOTE.read_text()
    for old, new in changes:
        assert source.count(old) == 1
        source = source.replace(old, new)
    path.write_text(source)
    with Sandbox() as sandbox:
        with pytest.MonkeyPatch.context() as patch:  # for the start alone: other tests start the real one
            patch.setattr(module, "ZYGOTE", path)
            sandbox.start()
        yield sandbox


@pytest.fixture(scope="module")
def kernel_walls_alone(tmp_path_factory):
    changes = [
        ("    guard_imports()\n    sys", "    import ctypes\n    sys"),
        ("    sys.addaudithook(make_hook())\n", ""),
        ('"NOFILE": (0, 0), ', ""),
    ]
    with with_zygote(tmp_path_factory.mktemp("zygote") / "zygote.py", *changes) as sandbox:
        yield sandbox


def test_without_the_kernels_wall_the_audit_hook_still_refuses_what_python_audits(tmp_path):
    not_audited = {"ask about a file", "make a pipe", "a thread"}
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "precious").write_text("still here")
    change = ("platform.machine() not in SYSTEM_CALLS", "True")
    with with_zygote(tmp_path / "zygote.py", change) as sandbox:
        assert sandbox.walls == ("limits", "audit")
        assert sandbox.run("sum(range(10))").stdout == "45\n"
        for name in sorted(ATTACKS.keys() - not_audited):
            code = ATTACKS[name].replace("TARGET", str(folder / "target"))
            run = sandbox.run(code.replace("PRECIOUS", str(folder / "precious")))
            assert run.error and not run.stdout, name
    assert os.listdir(folder) == ["precious"]
    assert (folder / "precious").read_text() == "still here"


@KERNEL_WALL
def test_linux_has_the_system_call_filter(sandbox):
    assert {"limits", "audit", "seccomp"} <= set(sandbox.start().walls)


def test_sockets_are_refused(sandbox):
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    run = sandbox.run(f"import _socket\ns = _socket.socket()\ns.connect(('127.0.0.1', {port}))\nprint('out')")
    assert run.error and not run.stdout
    server.close()


# Breaking the report.


def test_leaving_at_once_is_reported(sandbox):
    assert sandbox.run(f"{escaped('os')}._exit(3)").error == "the interpreter ended with status 3"


def test_closing_standard_output_loses_only_what_would_follow(sandbox):
    assert sandbox.run("import sys\nprint('a')\nsys.stdout.close()").stdout == "a\n"
    assert sandbox.run(f"print('a')\n{escaped('os')}.close(1)\n{escaped('os')}.close(2)").stdout == "a\n"


def test_a_program_that_closes_its_pipes_and_goes_on_is_ended():
    with Sandbox(SandboxConfig(wall_s=0.5)) as sandbox:
        assert sandbox.run(f"{escaped('os')}.close(1)\n{escaped('os')}.close(2)\nwhile True: pass").timed_out


def test_replacing_what_reports_does_not_let_the_program_into_the_zygote(sandbox):
    code = f"os = {escaped('os')}\nos._exit = os.write = lambda *a: None\nimport sys, json\njson.dumps = None\nsys.stdout = None"
    sandbox.run(code)
    assert sandbox.run("1").stdout == "1\n"


def test_an_exception_that_cannot_be_shown_is_still_an_error(sandbox):
    assert sandbox.run("class E(Exception):\n  def __str__(self): 1/0\nraise E").error


def test_a_crash_of_the_interpreter_is_reported(sandbox):
    run = sandbox.run(f"{escaped('ctypes')}.string_at(0)")
    assert run.error


# The life of the sandbox itself.


def test_a_lost_interpreter_is_replaced():
    with Sandbox() as sandbox:
        sandbox.start()
        sandbox._process.kill()
        sandbox._process.wait()
        assert sandbox.run("1").error == "the interpreter was lost"
        assert sandbox.run("1").stdout == "1\n"


def test_closing_ends_the_process():
    sandbox = Sandbox().start()
    process = sandbox._process
    sandbox.close()
    # It also ends by itself, once nobody can write to it: either may be first.
    assert process.returncode in (0, -signal.SIGKILL)


def test_threads_share_one_sandbox(sandbox):
    results: dict[int, str] = {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: sandbox.run(f"{i}+1").stdout})) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: f"{i + 1}\n" for i in range(8)}


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="cpu_s=0"):
        SandboxConfig(cpu_s=0)
    with pytest.raises(ConfigError, match="memory_bytes"):
        SandboxConfig(memory_bytes=1 << 20)


def test_the_tool_takes_code_and_gives_text(sandbox):
    tool = code_interpreter(sandbox)
    assert tool.call({"code": "2**10"}) == "1024"
    assert tool.call({"code": "1/0"}) == "error: ZeroDivisionError: division by zero"
    assert tool.call({"query": "1"}) == "error: argument 'code' is missing"


@KERNEL_WALL
def test_no_program_outlives_the_process_that_asked():
    script = (
        "from puna.tools.sandbox import *\n"
        "sandbox = Sandbox(SandboxConfig(cpu_s=60, wall_s=60)).start()\n"
        "print(sandbox._process.pid, flush=True)\n"
        "sandbox.run('while True: pass')"
    )
    asker = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    zygote = int(asker.stdout.readline())
    children = Path(f"/proc/{zygote}/task/{zygote}/children")
    assert wait_for(lambda: children.read_text().strip())
    program = int(children.read_text())
    asker.kill()
    asker.communicate()
    assert wait_for(lambda: not alive(zygote) and not alive(program))


def wait_for(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
