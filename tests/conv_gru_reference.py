"""ConvGRU once more, one gate, one row and one episode at a time: the truth that its tests compare with.

It reads a module's parameters and the sizes of its convolutions, and shares no code with it: no packed convolution, no
padded batch, no mask.
"""

import itertools

import torch
import torch.nn.functional as F


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


def step(layer, x, h):
    """x (1, in, *S) and h (1, C, *S') to h'."""
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

    z, r = (torch.sigmoid(of_input(gate) + of_state(gate)) for gate in (0, 1))
    c = torch.tanh(of_input(2) + (r * candidate(h) if layer.reset_after else candidate(r * h)))
    z = z * (1 - layer.zoneout)
    return (1 - z) * h + z * c


def run(layer, frames, h, cuts, backward):
    """A row's frames, episode by episode; the outputs in the order of time, and the last state."""
    starts = [0, *(t for t in cuts if t > 0), len(frames)]
    episodes = [list(range(a, b)) for a, b in itertools.pairwise(starts)]
    fresh = [0 in cuts] + [True] * (len(episodes) - 1)
    if backward:
        episodes, fresh = [episode[::-1] for episode in episodes[::-1]], [False] + [True] * (len(episodes) - 1)
    out = [None] * len(frames)
    for episode, anew in zip(episodes, fresh, strict=True):
        if anew:
            h = torch.zeros_like(h) if layer.h0 is None else layer.h0.expand_as(h[0])[None]
        for t in episode:
            h = out[t] = step(layer, frames[t], h)
    return out, h


def reference(rnn, x, h=None, lengths=None, reset=None):
    """``rnn(x, h, lengths=, reset=)`` for (B, T, ...), in eval mode and with GroupNorms."""
    h = rnn.init_hidden_state(x) if h is None else h
    rows, finals = [], []
    for b in range(x.shape[0]):
        steps = x.shape[1] if lengths is None else int(lengths[b])
        cuts = [] if reset is None else [t for t in range(steps) if reset[b, t]]
        frames, states = [x[b : b + 1, t] for t in range(steps)], []
        for i, layer in enumerate(rnn.layers):
            read = [rnn.norms[i](frame) for frame in frames]
            out, state = run(layer, read, h[rnn.directions * i][b : b + 1], cuts, False)
            states.append(state)
            if rnn.directions == 2:
                back, state = run(rnn.backward_layers[i], read, h[2 * i + 1][b : b + 1], cuts, True)
                states.append(state)
                out = [torch.cat(pair, 1) for pair in zip(out, back, strict=True)]
            if len(rnn.res_aligns):
                out = [y + rnn.res_aligns[i](frame) for y, frame in zip(out, frames, strict=True)]
            frames = out
        finals.append(states)
        size = list(h[-1].shape[2:])
        blank = x.new_zeros(1, rnn.directions * rnn.hidden_sizes[-1], *size)
        rows.append(torch.stack([*frames, *[blank] * (x.shape[1] - steps)], 1))
    return torch.cat(rows), [torch.cat(states) for states in zip(*finals, strict=True)]
