"""Checkpoints of other projects as layers of this one: each function takes a ``state_dict``, or the module itself, and
returns a layer."""

from ._conv_gru import (
    Gates,
    from_ballas2016,
    from_conv_gates,
    from_gates,
    from_raft,
    from_robust_video_matting,
    from_three_gates,
)
from ._mingru import from_mingru, from_mingru_pytorch

__all__ = [
    "Gates",
    "from_ballas2016",
    "from_conv_gates",
    "from_gates",
    "from_mingru",
    "from_mingru_pytorch",
    "from_raft",
    "from_robust_video_matting",
    "from_three_gates",
]
