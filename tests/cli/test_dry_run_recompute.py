"""`puna pretrain --dry-run` knows what the settings recompute."""

import re

from puna.cli import main


def total(capsys, *more: str) -> float:
    assert main(["pretrain", "llama-3.2-1b", "lm.rows=8", *more, "--dry-run"]) == 0
    return float(re.search(r"parameters; ([\d.]+) =", capsys.readouterr().out)[1])


def test_what_is_made_again_is_not_held(capsys):
    held = [total(capsys, f"speed.recompute={mode}") for mode in ("none", "selective", "full")]
    assert held[0] > held[1] > held[2]
