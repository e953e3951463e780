"""Commands for runs in progress: where their time went, and a node that is wanted for maintenance."""

import argparse
import time
from pathlib import Path
from typing import Any

from puna.artifacts import WORK
from puna.errors import ArtifactError


def add(commands: Any, add_command: Any) -> None:
    """Add this file's commands to the parser."""
    goodput = add_command(
        commands,
        "goodput",
        _goodput,
        "Say where every second of a training run went, and what each fault cost.",
        "example:\n  puna goodput out/pretrain       also writes out/pretrain/goodput.svg, the run on its time axis",
    )
    goodput.add_argument("path", type=Path, help="the run's folder, while it runs or afterwards")
    watch = add_command(
        commands,
        "watch",
        _watch,
        "Write a run's page: its curves with the faults on them, and where its time went. Until it ends, or Ctrl-C.",
        "example:\n  puna watch out/pretrain         open out/pretrain/watch.html in a browser; it reads itself again",
    )
    watch.add_argument("path", type=Path, help="the run's folder, while it runs or afterwards")
    watch.add_argument(
        "--tensorboard", action="store_true", help="also write the curves for TensorBoard, to PATH/tensorboard"
    )
    watch.add_argument("--once", action="store_true", help="write the page as the run is now, and end")
    drain = add_command(
        commands,
        "drain",
        _drain,
        "Ask a run to leave a node: it saves, and goes on elsewhere or ends.",
        "examples:\n  puna drain out/pretrain node-7\n  puna drain out/pretrain node-7 --undo",
    )
    drain.add_argument("path", type=Path, help="the run's folder")
    drain.add_argument("node", help="the node's name, as `puna goodput` and the ledger call it")
    drain.add_argument("--undo", action="store_true", help="the node may be used again, from the next start on")


def _goodput(options: argparse.Namespace) -> int:
    from puna.train.resilience import goodput, ledger

    if not (options.path / ledger.LEDGER).is_file():
        hint = "give the folder of a run that was started by puna pretrain or torchrun"
        raise ArtifactError(f"{options.path} has no {ledger.LEDGER}", hint=hint)
    if not ledger.read(options.path):
        hint = "it is written from the first step on; look again in a moment"
        raise ArtifactError(f"{options.path / ledger.LEDGER} has no whole line yet", hint=hint)
    account, picture = goodput.write(options.path)
    print(ledger.table(account))
    print(f"\n{picture}")
    return 0


def _watch(options: argparse.Namespace) -> int:
    from puna.train.resilience import page
    from puna.train.resilience.curves import Curves

    print(page.write(options.path))
    curves = Curves(options.path) if options.tensorboard else None
    while True:
        over = options.once or page.is_over(options.path)
        page.write(options.path)
        if curves is not None:
            curves.follow()
        if over:
            return 0
        time.sleep(page.AGAIN_S)


def _drain(options: argparse.Namespace) -> int:
    from puna.train.resilience.supervisor import DRAIN

    if not (options.path / WORK).is_dir():
        raise ArtifactError(f"{options.path} is not a run in progress", hint="give the folder that the run writes to")
    folder = options.path / WORK / DRAIN
    folder.mkdir(exist_ok=True)
    if options.undo:
        (folder / options.node).unlink(missing_ok=True)
    else:
        (folder / options.node).touch()
    return 0
