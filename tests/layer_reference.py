"""All layers once more, one gate, one row and one frame at a time: the truth that their tests compare with.

It reads a module's parameters and the sizes of its convolutions, and shares no code with it: no packed convolution, no
padded batch, no mask, no parallel scan.
"""

from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from convrnn import GRU_RCN, Bidirectional, ConvGRU, SepConvGRUCell, StackedGRU_RCN


def convolve(x, weight, depthwise, conv):
    """One gate's convolution of (1, C, *S)."""
    pads = conv.padding
    if pads is None:
        spans = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel, strict=True)]
        pads = [(span // 2, span - span // 2) for span in spans]
    x = F.pad(x, [p for pair in reversed(pads) for p in pair], "constant" if conv.mode == "zeros" else conv.mode)
    f = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()]
    if depthwise is not None:
        return f(f(x, depthwise, None, conv.stride, 0, conv.dilation, x.shape[1]), weight)
    return f(x, weight, None, conv.stride, 0, conv.dilation, conv.groups)


def normalise(x, norm, gate):
    """A GroupNorm of packed gates, for one of them."""
    if norm is None:
        return x
    channels = x.shape[1]
    groups = norm.num_groups * channels // norm.num_channels
    rows = slice(gate * channels, (gate + 1) * channels)
    return F.group_norm(x, groups, norm.weight[rows], norm.bias[rows], norm.eps)


def step(layer, x, h, below=(0.0, 0.0)):
    """x (1, in, *S) and h (1, C, *S') to h'; ``below`` joins what z and r read."""
    size = layer.hidden_size
    ones = (1,) * (x.dim() - 2)

    def rows(packed, gate):
        return packed[gate * size : (gate + 1) * size]

    def of_input(gate):
        out = normalise(convolve(x, rows(layer.W, gate), layer.W_depthwise, layer.input), layer.norm_W, gate)
        return out if layer.bias is None else out + rows(layer.bias, gate).view(1, -1, *ones)

    def of_state(gate):
        return normalise(convolve(h, rows(layer.U, gate), layer.U_depthwise, layer.recurrent), layer.norm_U, gate)

    def candidate(state):
        out = normalise(convolve(state, layer.C, layer.C_depthwise, layer.recurrent), layer.norm_C, 0)
        return out if layer.recurrent_bias is None else out + layer.recurrent_bias.view(1, -1, *ones)

    z, r = (torch.sigmoid(of_input(gate) + below[gate] + of_state(gate)) for gate in (0, 1))
    c = torch.tanh(of_input(2) + (r * candidate(h) if layer.reset_after else candidate(r * h)))
    z = z * (1 - layer.zoneout)
    return (1 - z) * h + z * c


def gru_initial(layer, h):
    return torch.zeros_like(h) if layer.h0 is None else layer.h0.expand_as(h[0])[None]


def packed_rows(projection, frame, gate, gates):
    """One gate of a packed Linear or Conv, of a frame (1, C, *S)."""
    size = projection.weight.shape[0] // gates
    rows = slice(gate * size, (gate + 1) * size)
    if isinstance(projection, torch.nn.Linear):
        out = F.linear(frame, projection.weight[rows])
    else:
        pads = projection.pads
        conv = SimpleNamespace(**{name: getattr(projection, name) for name in ("kernel", "stride", "dilation", "mode")})
        conv.padding, conv.groups = list(zip(pads[::2], pads[1::2], strict=True)), projection.groups
        out = convolve(frame, projection.weight[rows], projection.depthwise, conv)
    if projection.bias is not None:
        out = out + projection.bias[rows].view(1, -1, *(1 for _ in out.shape[2:]))
    return out


def aligned(module, frame):
    return frame if isinstance(module, torch.nn.Identity) else packed_rows(module, frame, 0, 1)


def mingru_step(direction, x, h):
    """x (1, in, *S) and h (1, 1, C, *S') to h'."""
    count = 3 if direction.lstm else 2
    gates = [packed_rows(direction.gate_hidden, x, i, count) for i in range(count)]
    if direction.lstm:
        forget, take = (torch.sigmoid(gate) for gate in gates[:2])
        z = take / (forget + take)
    else:
        z = torch.sigmoid(gates[0])
    v = gates[-1]
    candidate = torch.where(v >= 0, v + 0.5, torch.sigmoid(v))
    return (1 - z[:, None]) * h + (z * candidate)[:, None]


def mingru_initial(direction, h):
    return torch.full_like(h, 0.5) if direction.h0 is None else direction.h0.expand_as(h[0, 0])[None, None]


def turned(cuts, steps):
    """The cuts as the direction from the end meets them: frame t-1 begins anew where frame t does in this one."""
    return [steps - t for t in cuts if t > 0]


def run(step, initial, frames, h, cuts, backward=False):
    """A row's frames, one after another; the states in the order of time, and the last one."""
    if backward:
        out, h = run(step, initial, frames[::-1], h, turned(cuts, len(frames)))
        return out[::-1], h
    out = []
    for t, frame in enumerate(frames):
        h = step(frame, initial(h) if t in cuts else h)
        out.append(h)
    return out, h


def gru_layer(rnn, i, frames, states, cuts):
    """A layer of ConvGRU over a row's frames: its outputs, and the last state of each direction."""
    read = [rnn.norms[i](frame) for frame in frames]
    directions = [rnn.layers[i], *([rnn.backward_layers[i]] if rnn.bidirectional else [])]
    found = [
        run(partial(step, direction), partial(gru_initial, direction), read, h, cuts, backward=j == 1)
        for j, (direction, h) in enumerate(zip(directions, states, strict=True))
    ]
    out = [torch.cat(both, 1) for both in zip(*(outs for outs, _ in found), strict=True)]
    if len(rnn.res_aligns):
        out = [y + aligned(rnn.res_aligns[i], frame) for y, frame in zip(out, frames, strict=True)]
    return out, [h for _, h in found]


def mingru_layer(rnn, i, frames, states, cuts):
    """A layer of the minGRU family over a row's frames: its outputs, and the last state of each direction."""
    layer = rnn.layers[i]
    read = [layer.norm(frame) for frame in frames]
    directions = [layer, *([layer.reverse] if layer.reverse is not None else [])]
    outs, finals = [], []
    for j, (direction, h) in enumerate(zip(directions, states, strict=True)):
        initial = partial(mingru_initial, direction)
        out, h = run(partial(mingru_step, direction), initial, read, h, cuts, backward=j == 1)
        out = [y[:, 0] for y in out]
        outs.append(out if direction.out_proj is None else [packed_rows(direction.out_proj, y, 0, 1) for y in out])
        finals.append(h)
    out = [torch.cat(both, 1) for both in zip(*outs, strict=True)]
    if layer.res_align is not None:
        out = [y + aligned(layer.res_align, frame) for y, frame in zip(out, frames, strict=True)]
    return out, finals


def levels_step(rnn, maps, states):
    """The maps of one frame and the states of all levels of StackedGRU_RCN to the new ones."""
    new = []
    for i, level in enumerate(rnn.levels):
        below = (0.0, 0.0)
        if i > 0:
            pooled = F.adaptive_max_pool2d(new[-1], maps[i].shape[2:])
            below = [convolve(pooled, V, None, rnn.convolution) for V in rnn.bottom_up[i - 1].chunk(2)]
        new.append(step(level, maps[i], states[i], below))
    return new


def both_updates(cell, x, h):
    """A frame through both cells of SepConvGRUCell."""
    for update in (cell.horizontal, cell.vertical):
        h = step(update.layers[0], update.norms[0](x), h)
    return h


def row(rnn, frames, states, cuts):
    """A row's frames: what ``rnn`` returns for each, a list with an entry a level, and its last states."""
    if isinstance(rnn, Bidirectional):
        other, half = rnn.rnn if rnn.backward_rnn is None else rnn.backward_rnn, len(states) // 2
        outs, last = row(rnn.rnn, frames, states[:half], cuts)
        backs, first = row(other, frames[::-1], states[half:], turned(cuts, len(frames)))
        both = [[torch.cat(pair, 1) for pair in zip(*y, strict=True)] for y in zip(outs, backs[::-1], strict=True)]
        return both, last + first
    if isinstance(rnn, StackedGRU_RCN):
        return run(partial(levels_step, rnn), lambda h: [torch.zeros_like(x) for x in h], frames, states, cuts)
    if isinstance(rnn, GRU_RCN):
        out, h = run(partial(step, rnn), torch.zeros_like, frames, states[0], cuts)
        return [[y] for y in out], [h]
    if isinstance(rnn, SepConvGRUCell):
        initial = partial(gru_initial, rnn.horizontal.layers[0])
        out, h = run(partial(both_updates, rnn), initial, frames, states[0], cuts)
        if len(rnn.vertical.res_aligns):
            out = [y + aligned(rnn.vertical.res_aligns[0], x) for y, x in zip(out, frames, strict=True)]
        return [[y] for y in out], [h]
    layer, last, directions = gru_layer if isinstance(rnn, ConvGRU) else mingru_layer, [], len(states) // rnn.num_layers
    for i in range(rnn.num_layers):
        frames, ends = layer(rnn, i, frames, states[directions * i : directions * (i + 1)], cuts)
        last += ends
    return [[y] for y in frames], last


def reference(rnn, x, h=None, lengths=None, reset=None):
    """``rnn(x, h, lengths=, reset=)`` for (B, T, ...), in eval mode and with norms that treat frames one by one.

    x is a list for layers of several levels, and so is the output then; h is a list always.
    """
    maps, h = [x] if isinstance(x, torch.Tensor) else x, rnn.init_hidden_state(x) if h is None else h
    batch, total = maps[0].shape[:2]
    rows, finals = [], []
    for b in range(batch):
        steps = total if lengths is None else int(lengths[b])
        cuts = [] if reset is None else [t for t in range(steps) if reset[b, t]]
        frames = [[level[b : b + 1, t] for level in maps] for t in range(total)]
        frames = [frame[0] if maps[0] is x else frame for frame in frames]
        states = [state[b : b + 1] for state in h]
        outs, last = row(rnn, frames[:steps], states, cuts)
        if steps < total:
            blank = [torch.zeros_like(y) for y in row(rnn, frames[:1], states, [])[0][0]]
            outs = [*outs, *[blank] * (total - steps)]
        rows.append([torch.stack(level, 1) for level in zip(*outs, strict=True)])
        finals.append(last)
    outs = [torch.cat(level) for level in zip(*rows, strict=True)]
    return outs[0] if maps[0] is x else outs, [torch.cat(states) for states in zip(*finals, strict=True)]
