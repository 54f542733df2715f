"""Recurrent layers: parameters and convolutions here, the recurrences in :mod:`convrnn.ops`."""

from .bidirectional import Bidirectional
from .conv_gru import ConvGRU, ConvGRU1d, ConvGRU3d
from .conv_gru_cell import ConvGRUCell, ConvGRUCell1d, ConvGRUCell3d, SepConvGRUCell
from .conv_mingru import (
    MinConv1dGRU,
    MinConv1dGRUCell,
    MinConv2dGRU,
    MinConv2dGRUCell,
    MinConv3dGRU,
    MinConv3dGRUCell,
)
from .gru_rcn import GRU_RCN
from .mingru import MinGRU, MinGRUCell, MinLSTM
from .stacked_gru_rcn import StackedGRU_RCN

__all__ = [
    "GRU_RCN",
    "Bidirectional",
    "ConvGRU",
    "ConvGRU1d",
    "ConvGRU3d",
    "ConvGRUCell",
    "ConvGRUCell1d",
    "ConvGRUCell3d",
    "MinConv1dGRU",
    "MinConv1dGRUCell",
    "MinConv2dGRU",
    "MinConv2dGRUCell",
    "MinConv3dGRU",
    "MinConv3dGRUCell",
    "MinGRU",
    "MinGRUCell",
    "MinLSTM",
    "SepConvGRUCell",
    "StackedGRU_RCN",
]
