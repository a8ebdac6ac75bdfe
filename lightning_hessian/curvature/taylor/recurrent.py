"""LSTM, GRU and RNN written with functions that have rules. The fused kernels have no second forward derivative."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = tuple[Tensor, ...]
"""h, and for an LSTM c: tensors of shape (batch, width)."""

Cell = Callable[[Tensor, State, Sequence[Tensor], Tensor | None], State]
"""(x W' + b of one time step, the state, the weights for h, the bias for h) -> the next state."""


def lstm_cell(x: Tensor, state: State, weights: Sequence[Tensor], bias: Tensor | None) -> State:
    """c' = f c + i g and h' = o tanh(c'), or its projection."""
    h, c = state
    width = c.size(-1)
    gates, g, o = (x + F.linear(h, weights[0], bias)).split([2 * width, width, width], -1)
    i, f = gates.sigmoid().chunk(2, -1)
    c = f * c + i * g.tanh()
    h = o.sigmoid() * c.tanh()
    return h if len(weights) == 1 else F.linear(h, weights[1]), c


def gru_cell(x: Tensor, state: State, weights: Sequence[Tensor], bias: Tensor | None) -> State:
    """h' = n + z (h - n) with n = tanh(x_n + r h_n)."""
    (h,) = state
    width = h.size(-1)
    x_gates, x_n = x.split([2 * width, width], -1)
    h_gates, h_n = F.linear(h, weights[0], bias).split([2 * width, width], -1)
    r, z = (x_gates + h_gates).sigmoid().chunk(2, -1)
    n = (x_n + r * h_n).tanh()
    return (n + z * (h - n),)


def simple_cell(activation: Callable[[Tensor], Tensor]) -> Cell:
    """h' = activation(x + h W' + b)."""
    return lambda x, state, weights, bias: (activation(x + F.linear(state[0], weights[0], bias)),)


def recurrent(cell: Cell) -> Callable[..., tuple[Tensor, ...]]:
    """Return a function with the signature of ``torch.lstm`` and its kin, for padded and packed sequences."""

    def function(input: Tensor, second: Any, *rest: Any) -> tuple[Tensor, ...]:
        if isinstance(rest[0], list | tuple) and isinstance(rest[1], bool):
            starts, (parameters, has_biases, layers, dropout, training, both_ways, batch_first) = second, rest
            x = input.transpose(0, 1) if batch_first else input
            sizes = None
        else:
            starts, parameters, has_biases, layers, dropout, training, both_ways = rest
            x, sizes, batch_first = input, second.tolist(), False
        starts = (starts,) if isinstance(starts, Tensor) else starts
        directions = 2 if both_ways else 1
        each = len(parameters) // (layers * directions)
        ends = []
        for layer in range(layers):
            if layer and dropout and training:
                x = F.dropout(x, dropout)
            outputs = []
            for direction in range(directions):
                place = layer * directions + direction
                of_layer = parameters[place * each : (place + 1) * each]
                start = tuple(part[place] for part in starts)
                output, end = _one_way(cell, x, sizes, start, of_layer, has_biases, direction == 1)
                outputs.append(output)
                ends.append(end)
            x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        return x.transpose(0, 1) if batch_first else x, *map(torch.stack, zip(*ends, strict=True))

    return function


def _one_way(
    cell: Cell, x: Tensor, sizes: list[int] | None, start: State, parameters: Sequence[Tensor], has_biases: bool,
    backward: bool,
) -> tuple[Tensor, State]:  # fmt: skip
    """The outputs over time, and the last state."""
    of_input, of_state, *others = parameters
    biases, others = (others[:2], others[2:]) if has_biases else ((None, None), others)
    x = F.linear(x, of_input, biases[0])

    def step(x: Tensor, state: State) -> State:
        return cell(x, state, [of_state, *others], biases[1])

    steps = x.unbind(0) if sizes is None else x.split(sizes)
    outputs, end = (_against if backward else _along)(steps, start, step)
    return torch.stack(outputs) if sizes is None else torch.cat(outputs), end


def _along(steps: Sequence[Tensor], state: State, step: Callable[[Tensor, State], State]) -> tuple[list[Tensor], State]:
    """Forward in time. The batch of a packed sequence shrinks: an ended sequence keeps its state."""
    outputs, ended = [], []
    for x in steps:
        if (left := len(x)) < len(state[0]):
            ended.append(tuple(part[left:] for part in state))
            state = tuple(part[:left] for part in state)
        state = step(x, state)
        outputs.append(state[0])
    return outputs, _joined(state, *reversed(ended))


def _against(
    steps: Sequence[Tensor], start: State, step: Callable[[Tensor, State], State]
) -> tuple[list[Tensor], State]:
    """Backward in time. The batch of a packed sequence grows: a shorter one begins later."""
    state, outputs = tuple(part[: len(steps[-1])] for part in start), []
    for x in reversed(steps):
        if (size := len(x)) > (before := len(state[0])):
            state = _joined(state, tuple(part[before:size] for part in start))
        state = step(x, state)
        outputs.append(state[0])
    return outputs[::-1], state


def _joined(*states: State) -> State:
    return states[0] if len(states) == 1 else tuple(map(torch.cat, zip(*states, strict=True)))
