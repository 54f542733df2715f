"""Runs a function in several processes that form a gloo group, as torchrun would start them."""

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_group(function: Callable[..., Any], ranks: int, folder: Path, *arguments: Any) -> list[Any]:
    """Calls ``function(rank, *arguments)`` in `ranks` processes; what each returns, by rank."""
    mp.start_processes(_member, (function, ranks, str(folder), arguments), nprocs=ranks, start_method="spawn")
    return [torch.load(folder / f"result{rank}.pt", weights_only=False) for rank in range(ranks)]


def _member(rank: int, function: Callable[..., Any], ranks: int, folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(GLOO_SOCKET_IFNAME="lo", RANK=str(rank), WORLD_SIZE=str(ranks))
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=ranks)
    try:
        torch.save(function(rank, *arguments), f"{folder}/result{rank}.pt")
    except Exception:
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()
