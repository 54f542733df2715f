"""Layers of every kind refuse each bad argument with its name, what was expected and what came."""

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from convrnn import (
    GRU_RCN,
    Bidirectional,
    ConvGRU,
    ConvGRU1d,
    ConvGRUCell,
    MinConv1dGRU,
    MinConv2dGRU,
    MinConv2dGRUCell,
    MinConv3dGRU,
    MinGRU,
    MinGRUCell,
    MinLSTM,
    SepConvGRUCell,
    StackedGRU_RCN,
)


class MakesNorm(torch.nn.Module):
    def forward(self, channels):
        return torch.nn.GroupNorm(1, channels)


RNN = {"input_size": 4, "hidden_sizes": [4, 6], "kernel_sizes": 3}

CONSTRUCTORS = [
    ({"input_size": 0}, ValueError, "input_size must be at least 1, got 0"),
    ({"input_size": 2.0}, TypeError, "input_size must be an int, got 2.0"),
    ({"hidden_sizes": []}, ValueError, "hidden_sizes must hold one size per layer, got an empty list"),
    ({"hidden_sizes": [4, -1]}, ValueError, r"hidden_sizes\[1\] must be at least 1, got -1"),
    (
        {"kernel_sizes": [3]},
        ValueError,
        "kernel_sizes must be an int or hold one entry for each of the 2 layers, got 1",
    ),
    (
        {"kernel_sizes": (3, 5), "hidden_sizes": 4},
        ValueError,
        r"each of the 1 layers, got 2: \(3, 5\); for a size in each dimension, the same in every layer, write \[\(3, 5\)\]$",
    ),
    ({"kernel_sizes": (3, 5), "hidden_sizes": [4] * 3}, ValueError, r"got 2: .* write \[\(3, 5\)\] \* 3$"),
    (
        {"recurrent_kernel_sizes": [1, 3], "hidden_sizes": 4},
        ValueError,
        r"recurrent_kernel_sizes .* write \[\(1, 3\)\]$",
    ),
    ({"strides": (1, 2), "hidden_sizes": 4}, ValueError, r"strides .* got 2: \(1, 2\); .* write \[\(1, 2\)\]$"),
    ({"paddings": (1, 2), "hidden_sizes": 4}, ValueError, r"paddings .* write \[\(1, 2\)\]$"),
    ({"dilations": (1, 2), "hidden_sizes": 4}, ValueError, r"dilations .* write \[\(1, 2\)\]$"),
    ({"recurrent_dilations": (1, 2), "hidden_sizes": 4}, ValueError, r"recurrent_dilations .* write \[\(1, 2\)\]$"),
    ({"groups": (1, 2), "hidden_sizes": 4}, ValueError, r"groups must be .* got 2: \(1, 2\)$"),
    ({"kernel_sizes": [(3, 5), (3, 5)], "hidden_sizes": 4}, ValueError, r"kernel_sizes .* \(3, 5\)\]$"),
    ({"kernel_sizes": [3, (1, 2, 3)]}, ValueError, r"kernel_sizes\[1\] must be an int or a pair"),
    ({"kernel_sizes": "3"}, TypeError, "kernel_sizes must be an int, got '3'"),
    ({"recurrent_kernel_sizes": 0}, ValueError, "recurrent_kernel_sizes must be at least 1, got 0"),
    ({"strides": [1, 0]}, ValueError, r"strides\[1\] must be at least 1, got 0"),
    ({"paddings": -1}, ValueError, "paddings must be at least 0, got -1"),
    ({"paddings": "valid"}, ValueError, "paddings must be 'same', got 'valid'"),
    ({"dilations": 0}, ValueError, "dilations must be at least 1, got 0"),
    ({"recurrent_dilations": [1]}, ValueError, "recurrent_dilations must be an int or hold one entry"),
    ({"groups": 3}, ValueError, "groups must divide the 4 -> 4 channels of layer 0, got 3"),
    ({"groups": [1, 2, 1]}, ValueError, "groups must be an int or hold one entry for each of the 2 layers"),
    ({"recurrent_groups": [2, 4]}, ValueError, "recurrent_groups must divide the 6 -> 6 channels of layer 1, got 4"),
    ({"groups": 2, "separable": True}, ValueError, "groups must be 1 with separable=True, got 2"),
    ({"separable": 1}, TypeError, "separable must be a bool, got 1"),
    ({"padding_mode": "mirror"}, ValueError, "padding_mode must be 'zeros' or 'reflect' .* got 'mirror'"),
    ({"bias": None}, TypeError, "bias must be a bool, got None"),
    ({"reset_after": "yes"}, TypeError, "reset_after must be a bool, got 'yes'"),
    ({"norm": "batch"}, ValueError, "norm must be None, 'layer', 'group' or a callable .* got 'batch'"),
    ({"cell_norm": 3}, ValueError, "cell_norm must be None, 'layer', 'group' or a callable .* got 3"),
    ({"norm": MakesNorm()}, TypeError, "norm must be a name or a callable .* got the Module MakesNorm"),
    ({"cell_norm": MakesNorm()}, TypeError, "cell_norm must be a name or a callable .* got the Module MakesNorm"),
    ({"norm": lambda channels: channels}, TypeError, "norm must return a Module for a number of channels, got int"),
    ({"residual": 0}, TypeError, "residual must be a bool, got 0"),
    ({"dropout": 1.5}, ValueError, r"dropout must lie in \[0, 1\], got 1.5"),
    ({"recurrent_dropout": "0.1"}, TypeError, "recurrent_dropout must be a float, got '0.1'"),
    ({"zoneout": -0.1}, ValueError, r"zoneout must lie in \[0, 1\], got -0.1"),
    ({"gate_bias": "forget"}, ValueError, "gate_bias must be 'chrono', got 'forget'"),
    ({"gate_bias": None}, TypeError, "gate_bias must be a float or 'chrono', got None"),
    ({"gate_bias": "chrono"}, ValueError, "chrono_max must be an int with gate_bias='chrono', got None"),
    ({"gate_bias": "chrono", "chrono_max": 2}, ValueError, "chrono_max must be at least 3, got 2"),
    ({"chrono_max": 9}, ValueError, "chrono_max must be None without gate_bias='chrono', got 9"),
    ({"gate_bias": -1.0, "bias": False}, ValueError, "gate_bias must be 0 with bias=False, got -1.0"),
    ({"learn_h0": 2}, TypeError, "learn_h0 must be a bool, got 2"),
    ({"bidirectional": "both"}, TypeError, "bidirectional must be a bool, got 'both'"),
    ({"batch_first": 1}, TypeError, "batch_first must be a bool, got 1"),
]


@pytest.mark.parametrize(
    ("arguments", "error", "message"), CONSTRUCTORS, ids=lambda x: "-".join(x) if type(x) is dict else ""
)
def test_constructors(arguments, error, message):
    with pytest.raises(error, match=message):
        ConvGRU(**{**RNN, **arguments})


X = torch.zeros(2, 3, 4, 5, 5)
H = [torch.zeros(2, 4, 5, 5), torch.zeros(2, 6, 5, 5)]
FLAGS = torch.zeros(2, 3, dtype=torch.bool)

CALLS = [
    (lambda rnn: rnn([1.0]), TypeError, "x must be a Tensor .* got list"),
    (lambda rnn: rnn(X.long()), TypeError, "x must be a floating-point Tensor, got torch.int64"),
    (
        lambda rnn: rnn(X.double()),
        TypeError,
        "x must have the dtype of the parameters torch.float32, got torch.float64",
    ),
    (lambda rnn: rnn(X[0, 0]), ValueError, r"x must be \(B, T, input_size, \*S\) or .* got shape \[4, 5, 5\]"),
    (lambda rnn: rnn(X[:, :, :3]), ValueError, r"x must be .* 4 channels, got shape \[2, 3, 3, 5, 5\]"),
    (lambda rnn: rnn(X[:, 0, :3]), ValueError, r"x must be .* 4 channels, got shape \[2, 3, 5, 5\]"),
    (lambda rnn: rnn(X, H[0]), TypeError, "h must be a list of 2 Tensors, got Tensor"),
    (lambda rnn: rnn(X, H[:1]), ValueError, "h must hold 2 states, got 1"),
    (lambda rnn: rnn(X, [H[0], H[0]]), ValueError, r"h\[1\] must have shape \[2, 6, 5, 5\], got \[2, 4, 5, 5\]"),
    (lambda rnn: rnn(X, [H[0][:1], H[1]]), ValueError, r"h\[0\] must have shape \[2, 4, 5, 5\], got \[1, 4, 5, 5\]"),
    (lambda rnn: rnn(X, [H[0], None]), TypeError, r"h\[1\] must be a Tensor of shape \[2, 6, 5, 5\], got NoneType"),
    (lambda rnn: rnn(X, [H[0].int(), H[1]]), TypeError, r"h\[0\] must be float32, .* got torch.int32"),
    (lambda rnn: rnn(X, [H[0].to("meta"), H[1]]), ValueError, r"h\[0\] must be on the device of x \(cpu\), got meta"),
    (lambda rnn: rnn(X, lengths=[1, 2]), TypeError, r"lengths must be an integer Tensor of shape \[2\], got list"),
    (lambda rnn: rnn(X, lengths=torch.ones(2)), TypeError, "lengths must be an integer Tensor, got torch.float32"),
    (lambda rnn: rnn(X, lengths=torch.ones(3).long()), ValueError, r"lengths must have shape \[2\], got \[3\]"),
    (lambda rnn: rnn(X, reset=FLAGS.int()), TypeError, "reset must be a bool Tensor, got torch.int32"),
    (lambda rnn: rnn(X, reset=FLAGS.T), ValueError, r"reset must have shape \[2, 3\], got \[3, 2\]"),
    (lambda rnn: rnn(X, reset=FLAGS.to("meta")), ValueError, r"reset must be on the device of x \(cpu\), got meta"),
    (lambda rnn: rnn.step(X), ValueError, r"x must be one frame \(B, 4, \*S\), got shape"),
    (
        lambda rnn: ConvGRU(4, 4, 3, bidirectional=True).step(X[:, 0]),
        ValueError,
        "step must be called on a layer of one",
    ),
    (lambda rnn: ConvGRU(4, 4, 3, padding_mode="reflect")(X[..., :1]), ValueError, "x is too small: a kernel of"),
    (
        lambda rnn: ConvGRU(4, 4, 7, paddings=0)(X),
        ValueError,
        r"x is too small: a kernel of \[7, 7\] .* meets \[5, 5\]",
    ),
    (lambda rnn: ConvGRU(4, 4, 3, 1), TypeError, "positional arguments"),
    (lambda rnn: ConvGRU1d(4, 4, [(3, 3)]), ValueError, r"kernel_sizes\[0\] must be an int or a tuple of one"),
    (lambda rnn: ConvGRUCell(4, 4, 3, bidirectional=True), TypeError, "bidirectional"),
    (lambda rnn: ConvGRUCell(4, 0, 3), ValueError, "^hidden_size must be at least 1, got 0"),
    (lambda rnn: ConvGRUCell(4, [4], 3), TypeError, r"^hidden_size must be an int, got \[4\]"),
    (lambda rnn: ConvGRUCell(4, 4, (3, 3, 3)), ValueError, r"^kernel_size must be an int or a pair .* got \(3, 3, 3\)"),
    (lambda rnn: ConvGRUCell(4, 4, 3, stride=0), ValueError, "^stride must be at least 1, got 0"),
    (lambda rnn: ConvGRUCell(4, 4, 3, padding=-1), ValueError, "^padding must be at least 0, got -1"),
    (lambda rnn: ConvGRUCell(4, 4, 3, padding="valid"), ValueError, "^padding must be 'same', got 'valid'"),
    (lambda rnn: ConvGRUCell(4, 4, 3, dilation=1.5), TypeError, "^dilation must be an int, got 1.5"),
    (
        lambda rnn: ConvGRUCell(4, 4, 3, recurrent_kernel_size=0),
        ValueError,
        "^recurrent_kernel_size must be at least 1",
    ),
    (
        lambda rnn: ConvGRUCell(4, 4, 3, recurrent_dilation=0),
        ValueError,
        "^recurrent_dilation must be at least 1, got 0",
    ),
    (lambda rnn: ConvGRUCell(4, 4, 3, groups=[2]), TypeError, r"^groups must be an int, got \[2\]"),
    (
        lambda rnn: ConvGRUCell(4, 4, 3, recurrent_groups=3),
        ValueError,
        "^recurrent_groups must divide the 4 -> 4 .* got 3",
    ),
    (lambda rnn: ConvGRUCell(4, 4, 3, recurent_dropout=0.1), TypeError, "recurent_dropout"),
    (lambda rnn: SepConvGRUCell(4, 4, (5, 5)), TypeError, "kernel_size must be an int"),
    (lambda rnn: SepConvGRUCell(4, 4, stride=2), TypeError, "unexpected keyword argument 'stride'"),
    (lambda rnn: SepConvGRUCell(4, 4, padding=2), TypeError, "unexpected keyword argument 'padding'"),
    (lambda rnn: SepConvGRUCell(4, 4)(X, H[0]), TypeError, "h must be a list of 1 Tensors, got Tensor"),
    (lambda rnn: SepConvGRUCell(4, 4).step(X), ValueError, r"x must be one frame \(B, 4, H, W\), got shape \[2, 3, 4"),
    (lambda rnn: SepConvGRUCell(4, 4).step(None), TypeError, "x must be a Tensor .* got NoneType"),
    (lambda rnn: GRU_RCN(4, 4, 3, recompute=1), TypeError, "recompute must be a bool, got 1"),
    (lambda rnn: StackedGRU_RCN([4, 4], [4], 3), ValueError, "nb_kernels must hold one entry for each of the 2 levels"),
    (lambda rnn: StackedGRU_RCN([4], [4], 3)(X), TypeError, "xs must be a list of 1 Tensors, got Tensor"),
    (lambda rnn: StackedGRU_RCN([4], [4], 3)([X, X]), ValueError, "xs must hold the maps of 1 levels, got 2"),
    (lambda rnn: StackedGRU_RCN([4, 4], [4, 4], 3)([X, X[:, :2]]), ValueError, "xs must hold maps of one batch"),
    (lambda rnn: StackedGRU_RCN([4], [4], 3)([X], [H[1]]), ValueError, r"h\[0\] must have shape"),
]


@pytest.mark.parametrize(("call", "error", "message"), CALLS)
def test_calls(call, error, message):
    with pytest.raises(error, match=message):
        call(ConvGRU(**RNN))


MIN_GRU = {"input_size": 4, "hidden_sizes": [4, 6]}
MIN_CONSTRUCTORS = [
    (MinGRU, {"norm": "group"}, ValueError, "norm must be None, 'layer', 'rms' or a callable .* got 'group'"),
    (MinGRU, {"norm": MakesNorm()}, TypeError, "norm must be a name or a callable .* got the Module MakesNorm"),
    (MinGRU, {"norm": lambda size: size}, TypeError, "norm must return a Module for a number of channels, got int"),
    (MinGRU, {"expand": 0}, ValueError, "expand must be positive and finite, got 0"),
    (MinGRU, {"expand": float("inf")}, ValueError, "expand must be positive and finite, got inf"),
    (MinGRU, {"expand": "2"}, TypeError, "expand must be a float, got '2'"),
    (MinGRU, {"bias": 1}, TypeError, "bias must be a bool, got 1"),
    (MinGRU, {"residual": "yes"}, TypeError, "residual must be a bool, got 'yes'"),
    (MinGRU, {"gate_bias": "forget"}, ValueError, "gate_bias must be 'chrono', got 'forget'"),
    (MinGRU, {"gate_bias": [1.0]}, TypeError, r"gate_bias must be a float or 'chrono', got \[1.0\]"),
    (MinGRU, {"gate_bias": "chrono"}, ValueError, "chrono_max must be an int with gate_bias='chrono', got None"),
    (MinGRU, {"chrono_max": 9}, ValueError, "chrono_max must be None without gate_bias='chrono', got 9"),
    (MinGRU, {"gate_bias": 1.0, "bias": False}, ValueError, "gate_bias must be 0 with bias=False, got 1.0"),
    (MinLSTM, {"learn_h0": None}, TypeError, "learn_h0 must be a bool, got None"),
    (MinLSTM, {"bidirectional": 1}, TypeError, "bidirectional must be a bool, got 1"),
    (MinLSTM, {"batch_first": 0}, TypeError, "batch_first must be a bool, got 0"),
    (MinConv2dGRU, {"kernel_sizes": [3]}, ValueError, "kernel_sizes must .* each of the 2 layers, got 1"),
    (MinConv2dGRU, {"norm": "rms"}, ValueError, "norm must be None, 'layer', 'group' or a callable .* got 'rms'"),
    (MinConv2dGRU, {"paddings": "valid"}, ValueError, "paddings must be 'same', got 'valid'"),
    (MinConv2dGRU, {"padding_mode": "wrap"}, ValueError, "padding_mode must be 'zeros' .* got 'wrap'"),
    (MinConv2dGRU, {"dilations": [1, 0]}, ValueError, r"dilations\[1\] must be at least 1, got 0"),
    (MinConv2dGRU, {"groups": 4, "hidden_sizes": 6}, ValueError, "groups must divide the 4 -> 6 channels of layer 0"),
    (MinConv2dGRU, {"groups": 2, "expand": 0.5, "hidden_sizes": 6}, ValueError, "the 4 -> 3 channels of layer 0"),
    (MinConv2dGRU, {"groups": 2, "separable": True}, ValueError, "groups must be 1 with separable=True, got 2"),
    (MinConv2dGRU, {"bidirectional": "both"}, TypeError, "bidirectional must be a bool, got 'both'"),
    (MinConv1dGRU, {"kernel_sizes": (3,)}, ValueError, r"kernel_sizes .* got 1: \(3,\); .* write \[\(3,\)\] \* 2$"),
    (MinConv2dGRU, {"strides": (1, 2), "hidden_sizes": 4}, ValueError, r"strides .* write \[\(1, 2\)\]$"),
    (MinConv3dGRU, {"kernel_sizes": (1, 3, 3)}, ValueError, r"kernel_sizes .* write \[\(1, 3, 3\)\] \* 2$"),
    (MinConv3dGRU, {"dilations": (1, 3, 3)}, ValueError, r"dilations .* write \[\(1, 3, 3\)\] \* 2$"),
    (MinConv1dGRU, {"kernel_sizes": [(3, 3), 1]}, ValueError, r"kernel_sizes\[0\] must be an int or a tuple of one"),
    (MinConv3dGRU, {"strides": [1, (1, 2)]}, ValueError, r"strides\[1\] must be an int or a triple"),
]


@pytest.mark.parametrize(("kind", "arguments", "error", "message"), MIN_CONSTRUCTORS)
def test_constructors_of_mingru(kind, arguments, error, message):
    convolution = {} if issubclass(kind, MinGRU) else {"kernel_sizes": 3}
    with pytest.raises(error, match=message):
        kind(**{**MIN_GRU, **convolution, **arguments})


S = torch.zeros(2, 3, 4)
MIN_CALLS = [
    (lambda rnn: rnn(S.long()), TypeError, "x must be float32, .* got torch.int64"),
    (
        lambda rnn: rnn(S.double()),
        TypeError,
        "x must have the dtype of the parameters torch.float32, got torch.float64",
    ),
    (lambda rnn: rnn(S, reset=FLAGS.T), ValueError, r"reset must have shape \[2, 3\], got \[3, 2\]"),
    (lambda rnn: MinGRU(4, 4, batch_first=False)(S[..., 0]), ValueError, r"x must be \(S, B, input_size\) with 4"),
    (lambda rnn: MinGRU(4, 4, bidirectional=True)(S, [S[:, :1]]), ValueError, "h must hold 2 states, got 1"),
    (lambda rnn: MinGRU(4, 4, bidirectional=True).step(S[:, 0]), ValueError, "step must be called on a layer of one"),
    (lambda rnn: MinGRU(4, 4, batch_first=False).step(S), ValueError, r"x must be one frame \(B, input_size\), got"),
    (lambda rnn: Bidirectional(MinGRU(4, 4, bidirectional=True)), TypeError, "rnn must be .* of one direction"),
    (lambda rnn: Bidirectional(rnn, MinGRU(4, [4, 6], batch_first=False)), ValueError, "must agree with rnn"),
    (
        lambda rnn: MinGRU(4, 4, batch_first=False)(S, reset=FLAGS.T),
        ValueError,
        r"reset must have shape \[2, 3\], got \[3, 2\]",
    ),
    (lambda rnn: rnn(S[:, 0], reset=FLAGS), ValueError, r"reset must have shape \[2\], got \[2, 3\]"),
    (lambda rnn: rnn(S, [S[:, :1], None]), TypeError, r"h\[1\] must be a Tensor, got NoneType"),
    (lambda rnn: rnn.step(pack_sequence([S[0]])), TypeError, "x must be a Tensor, got PackedSequence"),
    (lambda rnn: MinGRUCell(4, 4, bias="no"), TypeError, "bias must be a bool, got 'no'"),
    (lambda rnn: MinGRU(4, 4, gate_bias=float("nan")), ValueError, "gate_bias must be finite, got nan"),
    (lambda rnn: MinConv2dGRU(4, 4, 7)(X), ValueError, r"x is too small: a kernel of \[7, 7\] .* meets \[5, 5\]"),
    (lambda rnn: MinConv2dGRU(4, 4, 3, paddings=5, padding_mode="reflect")(X), ValueError, "x is too small"),
    (lambda rnn: MinGRUCell(4, 4)(S.half()), TypeError, "x must have the dtype of the parameters"),
    (lambda rnn: MinConv2dGRUCell(4, 4, (3, 3, 3)), ValueError, "kernel_size must be an int or a pair"),
    (lambda rnn: MinConv2dGRUCell(4, 4, 3, padding="valid"), ValueError, "padding must be 'same', got 'valid'"),
    (lambda rnn: MinConv2dGRUCell(4, 6, 3, groups=4), ValueError, "groups must divide the 4 -> 6 channels"),
    (lambda rnn: MinConv1dGRU(4, 4, 3)(X), ValueError, r"x must be \(B, S, input_size, L\) with 4 channels"),
]


@pytest.mark.parametrize(("call", "error", "message"), MIN_CALLS)
def test_calls_of_mingru(call, error, message):
    with pytest.raises(error, match=message):
        call(MinGRU(**MIN_GRU))
