"""Executes PTX, the machine code that Triton's kernels compile to, on CPU tensors with numpy, without a GPU.

``driver.py`` sends the launches of a process here. A launch is parsed (``parse.py``), decoded by a table of instructions
(``operands.py`` makes it; ``integers.py``, ``floats.py``, ``accesses.py`` and ``matrix.py`` fill it) and run by ``machine.py`` on
the tensors it was given (``memory.py``). What a GPU punishes, or what nothing guarantees, is a :class:`Fault` that says where.
"""

from . import accesses, floats, integers, matrix
from .counts import Counts
from .faults import Fault
from .machine import Machine
from .operands import TABLE, assemble
from .parse import UnknownPtx

__all__ = ["TABLE", "Counts", "Fault", "Machine", "UnknownPtx", "accesses", "assemble", "floats", "integers", "matrix"]
