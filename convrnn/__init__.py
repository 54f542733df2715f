"""convrnn: convolutional recurrent layers for video in PyTorch, on fused kernels for CPU and GPU."""

from . import convert, nn, ops, reference, state
from .nn import (
    GRU_RCN,
    Bidirectional,
    ConvGRU,
    ConvGRU1d,
    ConvGRU3d,
    ConvGRUCell,
    ConvGRUCell1d,
    ConvGRUCell3d,
    MinConv2dGRU,
    MinConv2dGRUCell,
    MinGRU,
    MinGRUCell,
    SepConvGRUCell,
    StackedGRU_RCN,
)
from .ops import gru_rcn, mingru, mingru_gate_hidden, parallel_scan_log

__all__ = [
    "GRU_RCN",
    "Bidirectional",
    "ConvGRU",
    "ConvGRU1d",
    "ConvGRU3d",
    "ConvGRUCell",
    "ConvGRUCell1d",
    "ConvGRUCell3d",
    "MinConv2dGRU",
    "MinConv2dGRUCell",
    "MinGRU",
    "MinGRUCell",
    "SepConvGRUCell",
    "StackedGRU_RCN",
    "convert",
    "gru_rcn",
    "mingru",
    "mingru_gate_hidden",
    "nn",
    "ops",
    "parallel_scan_log",
    "reference",
    "state",
]
