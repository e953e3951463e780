"""Calibration: layer by layer, each matrix rounded for the inputs that the quantised layers before it give.

For layer i, with the sample's hidden states as the quantised layers 0 ... i-1 leave them:

    run the original layer, and gather H = mean of x x^T at the input of each matrix
    round the matrices (`gptq.py`), write them
    run the quantised layer: the hidden states of the next

What is written is not computed again: a resumed run carries the sample through the finished layers, and goes on with the
same numbers. In memory are one layer, four matrices H, and the hidden states.
"""

from pathlib import Path

import torch
from torch import Tensor

from puna.log import track
from puna.model.convert import hf_name
from puna.model.llama import Block, attend_with
from puna.model.sizes import LlamaConfig
from puna.model.weights import Weights
from puna.quant.forms import UNQUANTISED, Form
from puna.quant.gptq import calibrated
from puna.quant.layers import (
    OUTPUT,
    Reader,
    batches,
    block_of,
    embed,
    matrices_of,
    normalised,
    rotation_of,
    through,
)
from puna.quant.parts import Written, write_nearest, write_packed

# Matrices with the same input share its H: the one that is watched for each.
_INPUT_OF = {"wq": "wq", "wk": "wq", "wv": "wq", "wo": "wo", "w1": "w1", "w3": "w1", "w2": "w2"}


@torch.no_grad()
def calibrate(
    config: LlamaConfig, weights: Weights, reader: Reader, forms: dict[str, Form], tokens: Tensor, work: Path
) -> None:
    """Write every matrix of the layers, and an output matrix of its own, into `work`. `forms` are by Hugging Face's names.

    The embedding must be there already: its quantised rows are what the first layer reads.
    """
    written = Written(work, config, forms, reader)
    rotation = rotation_of(config, tokens.shape[1])
    hidden = embed(written, tokens)
    for index in track(range(config.n_layers), "calibrate", unit="layers"):
        names = [n for n in forms if n.startswith(f"model.layers.{index}.")]
        if not all((work / name).is_file() for name in names):
            block = block_of(reader, config, index)
            _round_layer(block, index, weights, forms, hidden, rotation, work)
            del block
        through(block_of(written, config, index), hidden, rotation)
    output = hf_name(OUTPUT)
    if output in forms and not (work / output).is_file() and forms[output].bits != UNQUANTISED:
        final = normalised(reader, config, hidden)
        _round(weights, output, forms[output], _second_moments(final), work / output)


def _round_layer(
    block: Block, index: int, weights: Weights, forms: dict[str, Form], hidden: Tensor, rotation: Tensor, work: Path
) -> None:
    moments = _gather(block, index, hidden, rotation)
    for ours in matrices_of(block, index):
        name = hf_name(ours)
        if (work / name).is_file():
            continue
        if forms[name].bits == UNQUANTISED:
            write_nearest(weights, name, forms[name], work / name)
        else:
            _round(weights, name, forms[name], moments[_INPUT_OF[ours.split(".")[-2]]], work / name)


def _round(weights: Weights, name: str, form: Form, moments: Tensor, out: Path) -> None:
    weight = weights.read(name).float()
    packed, way = calibrated(weight, form, moments)
    write_packed(weight, packed, name, form, way, out)


def _gather(block: Block, index: int, hidden: Tensor, rotation: Tensor) -> dict[str, Tensor]:
    """H of the inputs of `wq`, `wo`, `w1` and `w2`."""
    sums: dict[str, Tensor] = {}

    def watch(key: str):
        def hook(_module, given: tuple[Tensor, ...], _made: Tensor) -> None:
            x = given[0].flatten(0, 1)
            sums[key] = sums.get(key, 0) + x.T @ x

        return hook

    watched = {n.split(".")[-2]: m for n, m in matrices_of(block, index).items()}
    handles = [watched[key].register_forward_hook(watch(key)) for key in sorted(set(_INPUT_OF.values()))]
    for rows in batches(*hidden.shape[:2]):
        block(hidden[rows], rotation, attend_with(None))
    for handle in handles:
        handle.remove()
    count = hidden.shape[0] * hidden.shape[1]
    return {key: total / count for key, total in sums.items()}


def _second_moments(inputs: Tensor) -> Tensor:
    flat = inputs.flatten(0, 1)
    return flat.T @ flat / len(flat)
