"""Recurrent layers: parameters and convolutions here, the recurrences in :mod:`convrnn.ops`."""

from .bidirectional import Bidirectional
from .conv_mingru import MinConv2dGRU, MinConv2dGRUCell
from .gru_rcn import GRU_RCN
from .mingru import MinGRU, MinGRUCell

__all__ = ["GRU_RCN", "Bidirectional", "MinConv2dGRU", "MinConv2dGRUCell", "MinGRU", "MinGRUCell"]
