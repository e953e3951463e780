"""The launcher: the process that a person started. It keeps the zygote and the supervisor alive, and does nothing else.

It is the parent of both, so that either can die and be started again without the other. Killed itself, it takes
everything along; the same command then goes on from the newest state, which may still lie in shared memory.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from puna import log
from puna.artifacts import WORK
from puna.errors import PunaError
from puna.train.resilience import home
from puna.train.resilience.job import Job
from puna.train.resilience.supervisor import Supervisor
from puna.train.resilience.zygote import die_with_parent

# What every rank needs, and what PyTorch would import in each of them when the first optimiser is made.
PRELOADED = ("torch", "torch._dynamo", "torch.distributed", "puna.train.resilience.guard")
MOST_DEATHS = 50  # of supervisor and zygote together, in a run


def launch(job: Job, out: Path) -> int:
    """Run `job` on this machine until it is finished; the exit status.

    Raises `PunaError` if another launcher works on the same folder.
    """
    (out / WORK).mkdir(parents=True, exist_ok=True)
    with (out / WORK / "launcher.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            hint = "wait for it, or end it; two would write over each other"
            raise PunaError(f"{out} is being trained by another process", hint=hint) from None
        root = home.open_root(home.run_id(out), out)
        for left in (*root.glob("meet-*"), *root.glob("zygote*"), root / "supervisor.json"):
            left.unlink(missing_ok=True)
        status = _Launcher(job, out, root).run()
        if status == 0:
            shutil.rmtree(root, ignore_errors=True)
        return status


class _Launcher:
    def __init__(self, job: Job, out: Path, root: Path):
        self.job, self.out, self.root = job, out, root
        self.asked = False
        self.deaths = 0

    def run(self) -> int:
        log.beside_a_bar()
        self.zygote = self._start_zygote()
        self.supervisor = self._start_supervisor()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)
        try:
            while True:
                status = self._await_death()
                if status is not None:
                    return status
        finally:
            self.zygote.kill()
            self.zygote.wait()
            log.mend_terminal()  # rank 0 may have been killed, and its bar stays

    def _ask(self, number: int, _frame: object) -> None:
        if not self.asked:
            log.info("saving, then ending ...")
        self.asked = True
        with contextlib.suppress(ProcessLookupError):  # it is just being started again, and will be told then
            os.kill(self.supervisor, signal.SIGTERM)

    def _start_zygote(self) -> subprocess.Popen:
        (self.root / "zygote").unlink(missing_ok=True)
        command = [sys.executable, "-m", "puna.train.resilience.zygote", str(self.root / "zygote")]
        command += [*PRELOADED, *self.job.modules]
        return subprocess.Popen(command)

    def _start_supervisor(self, *, takes_over: bool = False) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            die_with_parent()
            status = Supervisor(self.job, self.out, self.root, takes_over=takes_over).run()
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def _await_death(self) -> int | None:
        """Until a child dies; the exit status if the run is over."""
        pid, status = os.wait()
        code = os.waitstatus_to_exitcode(status)
        if pid == self.supervisor:
            if code >= 0 or self.deaths >= MOST_DEATHS:
                return code if code >= 0 else 1
            log.warn(f"the supervisor died of signal {-code}: starting another")
            self.supervisor = self._start_supervisor(takes_over=True)
        elif pid == self.zygote.pid:
            self.zygote.returncode = code
            if code >= 0 or self.deaths >= MOST_DEATHS:  # it could not load what it was told to
                os.kill(self.supervisor, signal.SIGKILL)
                return 1
            log.warn("the process that forks ranks died: starting another")
            self.zygote = self._start_zygote()
        self.deaths += 1
        if self.asked:
            time.sleep(0.1)
            os.kill(self.supervisor, signal.SIGTERM)
        return None
