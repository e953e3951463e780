"""The process in which model-written code runs: warmed once, forked for each program.

Starting Python costs tens of milliseconds, forking a Python that is already warm costs about one. So this script is
started once by `sandbox.Sandbox`, imports what programs may use, and then serves requests on file descriptor 0 (a
socket), one at a time:

    request   {"code", "cpu_s", "wall_s", "memory_bytes", "output_bytes"}
    reply     {"stdout", "error", "ended"}        ended: ok | time | output | status N | signal N
    framing   4 bytes of length, big-endian, then JSON

For each request it forks a child, which puts up its walls, runs the program and dies. Between the fork and the
program's first instruction the walls go up in this order, and none can be taken down again:

    file descriptors   all closed but 0 (nothing to read), 1 (output pipe) and 2 (error pipe)
    resource limits    CPU seconds, address space, no new descriptors, no new processes, no file growth, no core
    seccomp            the kernel refuses every system call that is not in `SYSTEM_CALLS`: no files, no sockets, no
                       processes, no signals. It holds even for machine code. Linux on x86-64 and 64-bit ARM
    audit hook         Python refuses the same things earlier and in words; alone it is guidance, not a wall

The namespaces (no network, no other process's shared memory) are entered once, before the first fork, where the kernel
lets an ordinary user do so. The script imports nothing of ours: it runs under `-P -s -S`, with no site-packages.
"""

import ast
import builtins
import errno
import gc
import importlib
import json
import os
import platform
import resource
import select
import signal
import sys
import time
import warnings

# What a program may import. All of it is loaded before the first fork, so that a program never needs a file.
MODULES = [
    "__future__", "abc", "array", "base64", "binascii", "bisect", "calendar", "cmath", "collections",
    "collections.abc", "colorsys", "contextlib", "copy", "dataclasses", "datetime", "decimal", "difflib", "enum",
    "fractions", "functools", "graphlib", "hashlib", "heapq", "io", "itertools", "json", "keyword", "math",
    "numbers", "operator", "pprint", "random", "re", "statistics", "string", "struct", "sys", "textwrap", "time",
    "types", "typing", "unicodedata", "zlib",
]  # fmt: skip
# What those import lazily, when one of their functions is called.
LAZY = [
    "_strptime", "encodings.ascii", "encodings.cp1252", "encodings.latin_1", "encodings.rot_13", "encodings.utf_16",
    "locale",
]  # fmt: skip

# Python's audit events that a program may cause; every other one is refused (docs.python.org, "Audit events table").
EVENTS = [
    "array.__new__", "builtins.id", "builtins.input", "builtins.input/result", "compile", "exec",
    "object.__delattr__", "object.__getattr__", "object.__setattr__", "sys._getframe", "sys.unraisablehook",
    "time.sleep",
]  # fmt: skip

# Machine -> the kernel's name of it (AUDIT_ARCH_…) and the system calls that a program may make, by number.
SYSTEM_CALLS = {
    "x86_64": (0xC000003E, [
        0, 1, 3, 5, 8,  # read write close fstat lseek
        9, 10, 11, 25, 28, 12,  # mmap mprotect munmap mremap madvise brk
        13, 14, 15, 131, 219,  # rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack restart_syscall
        202, 24, 23, 270, 7, 271,  # futex sched_yield select pselect6 poll ppoll
        35, 230, 228, 229, 96, 100, 98,  # nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday times getrusage
        39, 318, 60, 231,  # getpid getrandom exit exit_group
    ]),
    "aarch64": (0xC00000B7, [
        63, 64, 57, 80, 62,  # read write close fstat lseek
        222, 226, 215, 216, 233, 214,  # mmap mprotect munmap mremap madvise brk
        134, 135, 139, 132, 128,  # rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack restart_syscall
        98, 124, 72, 73,  # futex sched_yield pselect6 ppoll
        101, 115, 113, 114, 169, 153, 165,  # nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday times getrusage
        172, 278, 93, 94,  # getpid getrandom exit exit_group
    ]),
}  # fmt: skip

CLONE_NEWUSER, CLONE_NEWIPC, CLONE_NEWNET = 0x10000000, 0x08000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38


def main() -> None:
    """Say which walls there are, then serve until the other side closes the socket."""
    for name in MODULES + LAZY:
        importlib.import_module(name)
    warnings.simplefilter("ignore")
    kernel = Kernel()
    gc.collect()
    gc.freeze()  # the fork shares these pages as long as no collection touches them
    send({"namespaces": kernel.enter_namespaces(), "seccomp": kernel.filter is not None})
    while (request := receive()) is not None:
        send(serve(request, kernel))


class Kernel:
    """The two doors to Linux that Python's standard library lacks: `unshare` and `prctl`.

    `filter` is None, and nothing is done, on other systems and other processors.
    """

    def __init__(self) -> None:
        self.filter = None
        if sys.platform != "linux" or platform.machine() not in SYSTEM_CALLS:
            return
        try:
            import ctypes
        except ImportError:
            return
        architecture, allowed = SYSTEM_CALLS[platform.machine()]
        program = seccomp_program(architecture, allowed)
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.filter = ctypes.create_string_buffer(program, len(program))
        # struct sock_fprog {unsigned short len; struct sock_filter *filter;}, the pointer aligned to 8
        packed = (len(program) // 8).to_bytes(8, "little") + ctypes.addressof(self.filter).to_bytes(8, "little")
        self.fprog = ctypes.create_string_buffer(packed, 16)
        self.long = ctypes.c_ulong
        # A filter at address 0 is a bad address (EFAULT) to a kernel that knows filters, and a bad request to others.
        self.libc.prctl(PR_SET_SECCOMP, self.long(2), self.long(0), self.long(0), self.long(0))
        if ctypes.get_errno() != errno.EFAULT:
            self.filter = None

    def enter_namespaces(self) -> bool:
        """A network without interfaces and an empty IPC space, owned by a user namespace of our own."""
        return self.filter is not None and self.libc.unshare(CLONE_NEWUSER | CLONE_NEWIPC | CLONE_NEWNET) == 0

    def confine(self) -> None:
        """Die with the zygote, gain no privileges by exec, and accept the filter: for good, for this process."""
        if self.filter is None:
            return
        none = self.long(0)
        self.libc.prctl(PR_SET_PDEATHSIG, self.long(signal.SIGKILL), none, none, none)
        self.libc.prctl(PR_SET_NO_NEW_PRIVS, self.long(1), none, none, none)
        if self.libc.prctl(PR_SET_SECCOMP, self.long(2), self.fprog, none, none) != 0:
            raise OSError("the kernel did not accept the system call filter")


def seccomp_program(architecture: int, allowed: list[int]) -> bytes:
    """The filter in classic BPF: instructions of (code u16, jump if true u8, jump if false u8, constant u32)."""
    load, jump_equal, give = 0x20, 0x15, 0x06
    kill, permit, refuse = 0x80000000, 0x7FFF0000, 0x00050000 | 1  # 1 is EPERM
    program = [(load, 0, 0, 4), (jump_equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    for number in allowed:
        program += [(jump_equal, 0, 1, number), (give, 0, 0, permit)]
    program.append((give, 0, 0, refuse))
    return b"".join(
        code.to_bytes(2, "little") + bytes([true, false]) + constant.to_bytes(4, "little")
        for code, true, false, constant in program
    )


def serve(request: dict, kernel: Kernel) -> dict:
    """Fork a child for one program, collect what it writes, and see that it dies."""
    output_read, output_write = os.pipe()
    error_read, error_write = os.pipe()
    child = os.fork()
    if child == 0:
        run_child(request, kernel, output_write, error_write)
    os.close(output_write)
    os.close(error_write)
    deadline = time.monotonic() + request["wall_s"]
    try:
        written, reason = collect({output_read: request["output_bytes"], error_read: 4096}, deadline)
        ended = reap(child, reason, deadline)
    finally:
        os.close(output_read)
        os.close(error_read)
    stdout, error = (written[fd].decode("utf-8", "replace") for fd in (output_read, error_read))
    return {"stdout": stdout, "error": error, "ended": ended}


def collect(limits: dict[int, int], deadline: float) -> tuple[dict[int, bytes], str]:
    """Read the pipes until they are closed; the reason is `time` or `output` where they were not read to the end."""
    written = dict.fromkeys(limits, b"")
    poll = select.poll()
    for fd in limits:
        poll.register(fd, select.POLLIN)
    poll.register(0, 0)  # no events but the hang-up: whoever asked is gone
    unclosed = len(limits)
    while unclosed:
        left = deadline - time.monotonic()
        if left <= 0:
            return written, "time"
        for fd, _ in poll.poll(left * 1000):
            if fd == 0:
                return written, "nobody asks"
            block = os.read(fd, 65536)
            if not block:
                poll.unregister(fd)
                unclosed -= 1
            written[fd] += block
            if len(written[fd]) > limits[fd]:
                written[fd] = written[fd][: limits[fd]]
                return written, "output"
    return written, ""


def reap(child: int, reason: str, deadline: float) -> str:
    """How the child ended; it is killed if it has not ended by `deadline`, or at once if there already is a reason."""
    pid = 0
    while not reason and not pid:
        pid, status = os.waitpid(child, os.WNOHANG)
        if not pid and time.monotonic() > deadline:
            reason = "time"
        elif not pid:
            time.sleep(0.0002)
    if not pid:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if reason:
        return reason
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return "time" if number in (signal.SIGXCPU, signal.SIGKILL) else f"signal {number}"
    return f"status {os.WEXITSTATUS(status)}" if os.WEXITSTATUS(status) else "ok"


def run_child(request: dict, kernel: Kernel, output: int, error: int) -> None:
    """The child's whole life. Whatever happens, it never returns into the zygote's loop."""
    write, leave = os.write, os._exit  # the program may replace those in `os`
    try:
        put_up_walls(request, kernel, output, error)
        stdout = sys.stdout
        report = run_program(request["code"])
        write(2, report.encode("utf-8", "replace")[:4096])
        if not stdout.closed:
            stdout.flush()
    except BaseException as failure:  # the walls could not be put up, or the program has broken what reports on it
        write(2, type(failure).__name__.encode())
    finally:
        leave(0)


def put_up_walls(request: dict, kernel: Kernel, output: int, error: int) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    for fd, place in ((nothing, 0), (output, 1), (error, 2)):
        os.dup2(fd, place)
    os.closerange(3, 1024)  # the zygote opens only a handful
    sys.stdin = open(0)  # noqa: SIM115
    sys.stdout = sys.stderr = open(1, "w", buffering=1, encoding="utf-8", errors="replace")  # noqa: SIM115
    cpu, memory = request["cpu_s"], request["memory_bytes"]
    limits = {"CPU": (cpu, cpu + 1), "NOFILE": (0, 0), "NPROC": (0, 0), "FSIZE": (0, 0), "CORE": (0, 0)}
    if sys.platform == "linux":  # macOS does not keep this one
        limits["AS"] = (memory, memory)
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), limit)
    kernel.confine()
    sys.modules["random"].seed(0)  # the same program prints the same, each time
    guard_imports()
    sys.addaudithook(make_hook())


def make_hook():
    """The audit hook. What it needs is bound here, out of reach of a program that changes the builtins."""
    allowed, refusal = frozenset(EVENTS), PermissionError

    def hook(event, _arguments):
        if event not in allowed:
            raise refusal("the sandbox refuses " + event)

    return hook


def guard_imports() -> None:
    """Let the program import what is in `MODULES`, and tell it in words about the rest."""
    load, allowed, refusal = builtins.__import__, frozenset(MODULES + LAZY), ImportError

    def guarded(name, globals=None, locals=None, fromlist=(), level=0):
        if globals is not None and globals.get("__name__") == "__main__" and name not in allowed:
            raise refusal(f"module {name!r} is not available here")
        return load(name, globals, locals, fromlist, level)

    builtins.__import__ = guarded


def run_program(code: str) -> str:
    """Run a program as a notebook does: a last line that is an expression is shown. Returns the error, or nothing."""
    scope = {"__name__": "__main__", "__builtins__": builtins}
    try:
        tree = ast.parse(code, "<code>")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "<code>", "exec"), scope)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "<code>", "eval"), scope)
            if value is not None:
                print(repr(value))
    except SystemExit as end:
        return "" if end.code in (None, 0) else f"SystemExit: {end.code}"
    except BaseException as failure:
        message = str(failure)
        return type(failure).__name__ + (f": {message}" if message else "")
    return ""


def send(value: dict) -> None:
    body = json.dumps(value).encode()
    block = len(body).to_bytes(4, "big") + body
    while block:
        block = block[os.write(0, block) :]


def receive() -> dict | None:
    """The next request, or None when the other side has closed the socket."""
    head = read_exactly(4)
    return None if head is None else json.loads(read_exactly(int.from_bytes(head, "big")))


def read_exactly(count: int) -> bytes | None:
    block = b""
    while len(block) < count:
        part = os.read(0, count - len(block))
        if not part:
            return None
        block += part
    return block


if __name__ == "__main__":
    main()
