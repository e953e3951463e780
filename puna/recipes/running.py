"""What every recipe does around its stages: one run at a time in a folder, the account at the end, the way to go on."""

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from puna import artifacts, config, log
from puna.artifacts import Artifact
from puna.errors import ArtifactError

Keep = Callable[[Artifact], Artifact]
Finish = Callable[..., Artifact]


@contextmanager
def running(name: str, settings: Any, out: Path) -> Iterator[tuple[Keep, Finish]]:
    """Hold the folder `out` for this run.

    Gives `keep(artifact)`, through which each stage's result passes into the report, and `finish(write_report, config,
    model=...)`, which writes the report, `run.json`, and says how to go on.
    """
    out.mkdir(parents=True, exist_ok=True)
    with held(out / ".lock", out):
        started = time.monotonic()
        complete = _complete(out, settings)
        if not complete:
            log.info(f"puna run {name}: writing to {out}; Ctrl-C and the same command continues")
        made: list[Artifact] = []

        def keep(artifact: Artifact) -> Artifact:
            made.append(artifact)
            if not complete:
                log.info(f"  {artifact.path.relative_to(out)}: {log.duration(artifact.manifest['seconds'])}")
            return artifact

        def finish(write_report: Any, report_config: Any, *, model: Artifact) -> Artifact:
            report = write_report(report_config, made, out=out / "report")
            for file in ("report.html", "report.json"):
                with artifacts.replacing(out / file) as temporary:
                    shutil.copyfile(report.file(file), temporary)
            record = {
                "recipe": name,
                "model": model.path.relative_to(out).as_posix(),
                "report": "report",
                "config": config.to_json(settings),
            }
            artifacts.write_atomic(out / "run.json", json.dumps(record, indent=1))
            _farewell(out, complete, time.monotonic() - started)
            return report

        yield keep, finish


def _complete(out: Path, settings: Any) -> bool:
    record = out / "run.json"
    return record.is_file() and json.loads(record.read_text())["config"] == config.to_json(settings)


def _farewell(out: Path, complete: bool, seconds: float) -> None:
    if complete:
        log.info(f"{out} is complete, nothing to do")
    else:
        log.info(f"done in {log.duration(seconds)}")
    print(f"report:  {out / 'report.html'}")
    print(f"chat:    puna chat {out}")
    print(f"serve:   puna serve {out}")


@contextmanager
def held(path: Path, out: Path) -> Iterator[None]:
    """A lock that the kernel drops when the process ends, however it ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            hint = "wait for it, or choose another place with out=PATH"
            raise ArtifactError(f"another run is writing to {out}", hint=hint) from None
        yield
