"""Fresh memory that shows whether it was written."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def nan_in_fresh_memory() -> Iterator[None]:
    """PyTorch's own debugging aid: deterministic mode fills what ``torch.empty`` returns with NaN."""
    mode, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)
