"""The ops: for each, the fake kernel, the CUDA binding, autograd and the public function. One file per op."""

from . import (
    _flops,  # noqa: F401  registers FLOP formulas
    _library,  # noqa: F401  before the ops: it says what an incomplete install lacks
)
from .gru_gates import gru_gates, gru_update
from .gru_rcn import gru_rcn
from .log_scan import parallel_scan_log
from .mingru import mingru, mingru_gate_hidden

__all__ = ["gru_gates", "gru_rcn", "gru_update", "mingru", "mingru_gate_hidden", "parallel_scan_log"]
