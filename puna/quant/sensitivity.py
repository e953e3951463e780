"""What quantising one matrix alone would cost, predicted for every matrix and form from one pass forth and back.

Let a change of the weights move the log-probability of a token y by s(y). For small changes

    KL(p || p')  =  1/2 E over y ~ p of s(y)^2                (Fisher's information)

and to first order s is the gradient of log p(y) times the change. So one token is drawn from the model's own prediction
at each place (its expected gradient is zero, hence the squares of places add up in expectation), the sum of their
log-probabilities is differentiated with respect to the output of each matrix, g_t, and for a change D of a matrix whose
inputs are x_t a row of the sample has

    s  =  sum over its places t of  g_t . D x_t               damage = 1/2 mean over rows of s^2 / places in a row

in nats for each token: what `quality.py` would measure as KL if this matrix alone were quantised. Damages of different
matrices add up as far as their errors are unrelated. The pass back goes layer by layer as the pass forth does; memory is
the sample's hidden states at every layer, and one layer.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna.log import progress
from puna.model.llama import Block, attend_with
from puna.model.sizes import LlamaConfig
from puna.quant.forms import UNQUANTISED, Form
from puna.quant.groups import dequantise_matrix, quantise_matrix
from puna.quant.layers import (
    EMBEDDING,
    OUTPUT,
    Reader,
    batches,
    block_of,
    embed,
    matrices_of,
    normalised,
    output_name,
    positions_at_once,
    rotation_of,
    through,
)

ROW = 64  # tokens: many short rows, since each gives one sample of s

Damages = dict[str, dict[Form, float]]


def measure_damages(
    config: LlamaConfig, reader: Reader, tokens: Tensor, forms: Sequence[Form], seed: int = 0
) -> Damages:
    """Meta's name of each matrix -> form -> predicted KL in nats per token, on `tokens` (rows, length)."""
    rotation = rotation_of(config, tokens.shape[1])
    with progress("sensitivity", 2 * config.n_layers + 2, unit="passes through a layer") as done:
        states = [embed(reader, tokens)]
        for index in range(config.n_layers):
            states.append(states[-1].clone())
            through(block_of(reader, config, index), states[-1], rotation)
            done.advance()
        gradient, scores = _through_output(config, reader, states.pop(), forms, seed)
        done.advance()
        for index in reversed(range(config.n_layers)):
            block = block_of(reader, config, index)
            gradient, linear = _back(block, index, states.pop(), gradient, rotation)
            for name, (inputs, outputs) in linear.items():
                weight = reader(name)
                scores[name] = {f: _scores(inputs @ _change(weight, f).T, outputs) for f in forms}
            done.advance()
        weight = reader(EMBEDDING)
        for form in forms:
            found = _scores(F.embedding(tokens, _change(weight, form)), gradient)
            ours = scores.setdefault(EMBEDDING, {})
            ours[form] = ours.get(form, 0) + found  # a tied matrix acts at both ends
        done.advance()
    return {
        name: {form: float(0.5 * s.square().mean() / tokens.shape[1]) for form, s in by_form.items()}
        for name, by_form in scores.items()
    }


def _change(weight: Tensor, form: Form) -> Tensor:
    if form.bits == UNQUANTISED:
        return weight.bfloat16().float() - weight
    return dequantise_matrix(quantise_matrix(weight, form.bits, form.group_size, offset=form.offset)) - weight


def _scores(changes: Tensor, gradients: Tensor) -> Tensor:
    """s of each row of the sample, from what the matrix's outputs (rows, length, ·) change by and their gradients."""
    return (changes * gradients).sum((1, 2), dtype=torch.float64)


@torch.no_grad()
def _through_output(
    config: LlamaConfig, reader: Reader, hidden: Tensor, forms: Sequence[Form], seed: int
) -> tuple[Tensor, dict[str, dict[Form, Tensor]]]:
    """The gradient at the last layer's output, and the output matrix's own scores."""
    weight, rows, length = reader(output_name(config)), *hidden.shape[:2]
    final = normalised(reader, config, hidden).flatten(0, 1)
    step = positions_at_once(config)
    scores = {}
    back = torch.empty_like(final)
    for form in forms:
        change = _change(weight, form)
        generator = torch.Generator().manual_seed(seed)  # the same draws for each form
        found = []
        for start in range(0, len(final), step):
            part = final[start : start + step]
            chances = (part @ weight.T).softmax(-1)
            drawn = torch.multinomial(chances, 1, generator=generator)
            slope = -chances.scatter_add_(1, drawn, torch.full_like(drawn, -1.0, dtype=chances.dtype))
            back[start : start + step] = slope @ weight
            found.append(((part @ change.T) * slope).sum(-1, dtype=torch.float64))
        scores[form] = torch.cat(found).unflatten(0, (rows, length)).sum(1)
    with torch.enable_grad():
        leaf = hidden.clone().requires_grad_()
        normalised(reader, config, leaf).backward(back.unflatten(0, (rows, length)))
    return leaf.grad, {EMBEDDING if config.tied else OUTPUT: scores}


def _back(
    block: Block, index: int, hidden: Tensor, gradient: Tensor, rotation: Tensor
) -> tuple[Tensor, Mapping[str, tuple[Tensor, Tensor]]]:
    """The gradient before a layer, and each matrix's inputs and output gradients, (rows, length, ·)."""
    matrices = matrices_of(block, index)
    inputs: dict[str, list[Tensor]] = {name: [] for name in matrices}
    outputs: dict[str, list[Tensor]] = {name: [] for name in matrices}

    def watch(name: str):
        def hook(_module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
            inputs[name].append(given[0].detach())
            made.register_hook(outputs[name].append)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in matrices.items()]
    before = torch.empty_like(gradient)
    with torch.enable_grad():
        for rows in batches(*hidden.shape[:2]):
            leaf = hidden[rows].clone().requires_grad_()
            block(leaf, rotation, attend_with(None)).backward(gradient[rows])
            before[rows] = leaf.grad
    for handle in handles:
        handle.remove()
    return before, {name: (torch.cat(inputs[name]), torch.cat(outputs[name])) for name in matrices}
