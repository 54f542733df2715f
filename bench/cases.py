"""The list of cases: shapes from the re-created projects' documents, from video practice and from text."""

import argparse
import re
from collections.abc import Iterable, Iterator

import torch

from . import machine
from .case import Case
from .gru import (
    conv_gru_module,
    conv_gru_stream,
    gru_gates,
    gru_rcn,
    gru_rcn_module,
    gru_rcn_stream,
    gru_update,
    stacked_gru_rcn_module,
)
from .scans import (
    bidirectional_module,
    cell_stream,
    log_scan,
    minconv_module,
    mingru,
    mingru_module,
    mingru_stream,
)

BF16 = torch.bfloat16
PEERS = ("accelerated-scan ref", "minGRU-pytorch", "mingru-scans")  # the latter two are the log-space form: shown once
STUDY = ("forward", "step")  # what a study of cost against one axis times, and the dearest cases


def all_cases() -> list[Case]:
    """Every case, in the order of the table."""
    return [*ops(), *modules(), *streaming(), *studies()]


def add_options(parser: argparse.ArgumentParser) -> None:
    """What to measure and on what: the options that every program that times cases has."""
    parser.add_argument(
        "--device", type=machine.device, default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda"
    )
    parser.add_argument(
        "--threads", type=machine.thread_count, default=torch.get_num_threads(), help="default: %(default)s"
    )
    parser.add_argument(
        "--only", metavar="PATTERN", default="", help="cases whose name holds or matches it, the exhaustive ones too"
    )


def select(only: str, exhaustive: bool) -> list[Case]:
    """Cases that ``only`` names; exhaustive ones where asked to, or where ``only`` is given."""
    return [c for c in named(only, all_cases()) if only or exhaustive or not c.exhaustive]


def named(only: str, cases: Iterable[Case]) -> list[Case]:
    """The cases whose name holds ``only`` or matches it as a pattern."""
    try:
        pattern = re.compile(only)
    except re.error:
        pattern = re.compile(re.escape(only))
    return [case for case in cases if only in case.name or pattern.search(case.name)]


def ops() -> Iterator[Case]:
    yield mingru(16, 256, 512, compile=True, others=PEERS)
    yield mingru(4, 4096, 256, others=PEERS[:1])
    yield mingru(1, 65536, 64, others=PEERS[:1])
    yield mingru(16, 10, 256, 14, 14)
    yield mingru(4, 16, 64, 56, 56, passes=STUDY)
    yield mingru(4, 64, 16, 7, 7)
    yield mingru(16, 256, 512, dtype=BF16)
    yield mingru(4, 10, 256, 14, 14, dtype=BF16, exhaustive=True)
    yield log_scan(16, 256, 512)
    yield log_scan(1, 32, 64, 14, 14)
    yield log_scan(1, 32, 64, 14, 14, dtype=BF16)
    yield gru_gates(16, 64, 28, 28, compile=True)
    yield gru_gates(16, 64, 28, 28, dtype=BF16)
    yield gru_update(16, 64, 28, 28, compile=True)
    yield gru_update(16, 64, 28, 28, dtype=BF16)
    yield gru_rcn(16, 10, 5, 32, 8, 8)
    yield gru_rcn(16, 10, 64, 64, 7, 7)
    yield gru_rcn(4, 10, 64, 64, 28, 28, passes=STUDY)
    yield gru_rcn(2, 10, 256, 256, 14, 14, passes=STUDY)
    yield gru_rcn(1, 16, 3, 16, 64, 64)
    yield gru_rcn(1, 64, 16, 16, 14, 14)
    yield gru_rcn(1, 8, 32, 32, 56, 56, exhaustive=True)
    yield gru_rcn(16, 1, 16, 32, 14, 14, compile=True)  # unrolled: each step would take seconds more to compile
    yield gru_rcn(2, 4, 5, 32, 8, 8, dtype=BF16)


def modules() -> Iterator[Case]:
    yield gru_rcn_module(16, 10, 5, 32, 8, 8)
    yield gru_rcn_module(2, 4, 5, 32, 8, 8, dtype=BF16)
    yield conv_gru_module(4, 8, 32, 64, 28, 28)
    yield conv_gru_module(1, 4, 5, 32, 16, 16, dtype=BF16)
    yield stacked_gru_rcn_module(2, 8, 32, 28, 28)
    yield stacked_gru_rcn_module(1, 4, 16, 8, 8, dtype=BF16)
    yield mingru_module(16, 256, 256)
    yield mingru_module(1, 1024, 128, compile=True)
    yield mingru_module(1, 128, 128, dtype=BF16)
    yield mingru_module(1, 65536, 64, exhaustive=True)
    yield mingru_module(16, 128, 128, layers=4, gru=False, exhaustive=True)
    yield mingru_module(4, 128, 128, lstm=True, gru=False)
    yield mingru_module(1, 64, 128, lstm=True, gru=False, dtype=BF16)
    yield bidirectional_module(16, 128, 64)
    yield bidirectional_module(1, 128, 64, dtype=BF16)
    yield minconv_module(5, 10, 3, 64, 64)
    yield minconv_module(1, 4, 3, 32, 32, hidden=(16,), dtype=BF16)


def streaming() -> Iterator[Case]:
    yield mingru_stream(1, 1, 512, compile=True)
    yield mingru_stream(1, 1, 512, dtype=BF16)
    yield mingru_stream(16, 1, 256, 14, 14)
    yield cell_stream(1, 1, 512)
    yield cell_stream(1, 1, 512, dtype=BF16)
    yield cell_stream(1, 1, 64, 28, 28)
    yield gru_rcn_stream(1, 1, 64, 64, 28, 28)
    yield gru_rcn_stream(1, 1, 5, 32, 8, 8)
    yield gru_rcn_stream(1, 1, 5, 32, 8, 8, dtype=BF16)
    yield conv_gru_stream(1, 1, 64, 64, 28, 28)
    yield conv_gru_stream(1, 1, 64, 64, 28, 28, separable=True)


def studies() -> Iterator[Case]:
    """Cost along one axis, all else fixed."""
    for steps in (64, 256, 1024, 4096, 16384, 65536):
        yield mingru(1, steps, 64, group="T", passes=STUDY, exhaustive=steps == 65536)
    for size in (7, 14, 28, 56):
        yield mingru(2, 8, 32, size, size, group="map", passes=STUDY, exhaustive=size == 56)
        yield gru_rcn(2, 8, 32, 32, size, size, group="map", passes=STUDY, exhaustive=size == 56)
    for batch in (1, 2, 4, 8, 16, 32):
        yield mingru(batch, 256, 256, group="B", passes=STUDY, exhaustive=True)
        yield gru_rcn(batch, 8, 32, 32, 14, 14, group="B", passes=STUDY, exhaustive=True)
    for channels in (8, 16, 32, 64, 128, 256):
        yield mingru(4, 256, channels, group="C", passes=STUDY, exhaustive=True)
        yield gru_rcn(4, 8, channels, channels, 14, 14, group="C", passes=STUDY, exhaustive=True)
    for steps in (1, 2, 4, 8, 16, 32, 64):
        yield gru_rcn(2, steps, 32, 32, 14, 14, group="T", passes=STUDY, exhaustive=True)
