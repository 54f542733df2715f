"""Global and shared memory of one launch.

Global memory is the tensors of the launch and nothing else: each of their storages lies far from the others in the
addresses that the kernel sees, at what the real one is modulo 64, so that a stray address meets no other tensor. Bytes of
a storage that belong to no element of a tensor passed to the launch are outside.
"""

import ctypes
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from .counts import Counts
from .faults import LaneFault
from .races import Clock, Ledger

REGION = 44  # bits of an address within one storage
LINE = 64  # bytes whose alignment is kept


def _view(address: int, size: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def _element_offsets(x: Tensor) -> np.ndarray:
    """Of all elements from the start of the storage, in bytes."""
    offsets = np.full(1, x.storage_offset(), np.int64)
    for size, stride in zip(x.shape, x.stride(), strict=True):
        if stride or not size:
            offsets = np.add.outer(offsets, np.arange(size, dtype=np.int64) * stride).ravel()
    return offsets * x.element_size()


def _runs(tensors: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of what the tensors of one storage cover, sorted and merged."""
    starts, ends = [], []
    for x in tensors:
        if not x.numel():
            continue
        if x.is_contiguous():
            offsets, width = np.array([x.storage_offset() * x.element_size()]), x.numel() * x.element_size()
        else:
            offsets, width = np.unique(_element_offsets(x)), x.element_size()
        starts.append(offsets)
        ends.append(offsets + width)
    if not starts:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    start, end = np.concatenate(starts), np.concatenate(ends)
    order = np.argsort(start, kind="stable")
    start, reach = start[order], np.maximum.accumulate(end[order])
    first = np.concatenate(([True], start[1:] > reach[:-1]))
    last = np.concatenate((first[1:], [True]))
    return start[first], reach[last]


class _Storage:
    """One storage of tensors: its memory in words of each width, what of it may be touched, and who did."""

    def __init__(self, address: int, tensors: list[Tensor], base: int, narrowest: int, clock: Clock) -> None:
        self.base = base
        self.starts, self.ends = _runs(tensors)
        # No access of the kernel is narrower than an element, but for those of one byte.
        self.unit = max(narrowest, min(x.element_size() for x in tensors))
        first_units = self.starts // self.unit
        lengths = -(-self.ends // self.unit) - first_units
        self.skipped = first_units - np.concatenate(([0], np.cumsum(lengths)[:-1])) if len(lengths) else first_units
        self.ledger = Ledger(int(lengths.sum()), clock, shuffles=True)
        extent = int(self.ends[-1]) if len(self.ends) else 0
        self._lead = address % LINE
        self._bytes = _view(address - self._lead, -(-(extent + self._lead) // LINE) * LINE)

    def words(self, width: int) -> np.ndarray:
        """The memory as rows of words of at most 8 bytes."""
        word = min(width, 8)
        view = self._bytes.view(f"u{word}")
        return view.reshape(-1, width // word) if width > word else view

    def units_of(self, offsets: np.ndarray, width: int, lanes: np.ndarray) -> np.ndarray:
        """The units that accesses touch, flat; refuses what is outside."""
        if len(self.starts) == 1:
            inside = (offsets >= self.starts[0]) & (offsets + width <= self.ends[0])
            skipped = self.skipped[0]
        else:
            run = np.searchsorted(self.starts, offsets, side="right") - 1
            inside = (run >= 0) & (offsets + width <= self.ends[run])
            skipped = self.skipped[run]
        if not inside.all():
            at = int(np.flatnonzero(~inside)[0])
            raise _Outside(at)
        return _spread(offsets // self.unit - skipped, width // self.unit)


class _Outside(Exception):
    """The position of the first access that is outside."""

    def __init__(self, at: int) -> None:
        self.at = at


def _spread(first: np.ndarray, count: int) -> np.ndarray:
    """``count`` units from each first one on, flat."""
    return first if count <= 1 else (first[:, None] + np.arange(count)).ravel()


def check_alignment(addresses: np.ndarray, width: int, lanes: np.ndarray) -> None:
    misaligned = addresses & (width - 1)
    if misaligned.any():
        at = int(np.flatnonzero(misaligned)[0])
        raise LaneFault(int(lanes[at]), f"misaligned: an access of {width} bytes at {misaligned[at]} bytes behind one")


class Global:
    """The tensors of a launch, by the addresses that :meth:`address` gave to them."""

    def __init__(self, tensors: dict[str, Tensor], narrowest: int, clock: Clock, counts: Counts) -> None:
        self._counts = counts
        self._tensors = tensors
        self._storages: list[_Storage] = []
        self._places: dict[int, int] = {}
        for x in tensors.values():
            address = x.untyped_storage().data_ptr()
            if address not in self._places:
                alike = [y for y in tensors.values() if y.untyped_storage().data_ptr() == address]
                base = ((len(self._storages) + 1) << REGION) + address % LINE
                self._places[address] = len(self._storages)
                self._storages.append(_Storage(address, alike, base, narrowest, clock))

    def address(self, x: Tensor) -> int:
        """Where the kernel finds the first element."""
        address = x.untyped_storage().data_ptr()
        return self._storages[self._places[address]].base + x.storage_offset() * x.element_size()

    def load(self, addresses: np.ndarray, width: int, lanes: np.ndarray) -> np.ndarray:
        """What the lanes read: one word each, or a row of words of 8 bytes."""
        words = np.zeros((len(lanes), width // 8) if width > 8 else len(lanes), f"u{min(width, 8)}")
        for which, storage, units, index in self._accesses(addresses, width, lanes):
            storage.ledger.read(units, _owners(lanes[which], width, storage.unit))
            words[which] = storage.words(width)[index]
        self._counts.load(addresses, width, lanes)
        return words

    def store(self, addresses: np.ndarray, width: int, lanes: np.ndarray, words: np.ndarray) -> None:
        for which, storage, units, index in self._accesses(addresses, width, lanes):
            storage.ledger.write(units, _owners(lanes[which], width, storage.unit))
            storage.words(width)[index] = words[which]
        self._counts.store(addresses, width, lanes)

    def _accesses(
        self, addresses: np.ndarray, width: int, lanes: np.ndarray
    ) -> Iterator[tuple[slice | np.ndarray, _Storage, np.ndarray, np.ndarray]]:
        """For each storage that is touched: which accesses those are, its units, and its words of that width."""
        check_alignment(addresses, width, lanes)
        regions = (addresses >> REGION) - 1
        found = [regions[0]] if (regions == regions[0]).all() else np.unique(regions)
        for region in found:
            which = slice(None) if len(found) == 1 else regions == region
            here = addresses[which]
            try:
                if not 0 <= region < len(self._storages):
                    raise _Outside(0)
                storage = self._storages[region]
                offsets = here - storage.base
                units = storage.units_of(offsets, width, lanes[which])
            except _Outside as outside:
                text = self._describe(int(here[outside.at]), width)
                raise LaneFault(
                    int(lanes[which][outside.at]), f"outside of the tensors of the launch: {text}"
                ) from None
            yield which, storage, units, (offsets + storage._lead) // width

    def _describe(self, address: int, width: int) -> str:
        """Where an address lies, seen from the tensor whose start or end is nearest."""
        best = (1 << 63, f"{width} bytes at address {address}")
        for name, x in self._tensors.items():
            offset = address - self.address(x)
            extent = x.element_size() * (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)))
            extent = extent if x.numel() else 0
            distance = max(-offset, offset + width - extent, 0)
            if distance < best[0]:
                best = (distance, f"{width} bytes at byte {offset} of {name}, which has {extent}")
        return best[1]

    @property
    def distinct_bytes(self) -> tuple[int, int]:
        """Bytes that were read, and written, each counted once."""
        ledgers = [(storage.ledger, storage.unit) for storage in self._storages]
        return (
            sum(ledger.distinct_reads * unit for ledger, unit in ledgers),
            sum(ledger.distinct_writes * unit for ledger, unit in ledgers),
        )


def _owners(lanes: np.ndarray, width: int, unit: int) -> np.ndarray:
    return lanes if width <= unit else np.repeat(lanes, width // unit)


class Shared:
    """Shared memory of all programs, side by side; nothing in it may be read before it is written."""

    def __init__(self, programs: int, size: int, unit: int, clock: Clock, counts: Counts) -> None:
        self._counts = counts
        self.size = -(-size // 16) * 16
        self.limit = size
        self.unit = unit
        self._threads = clock.threads
        self._bytes = np.zeros(programs * self.size, np.uint8)
        self._ledger = Ledger(programs * self.size // unit, clock)
        self._flying = np.zeros(programs * self.size // unit, np.int32)  # copies that have not been waited for

    def load(self, addresses: np.ndarray, width: int, lanes: np.ndarray) -> np.ndarray:
        places, units, owners = self._places(addresses, width, lanes)
        self._refuse(self._flying[units] > 0, owners, "read before the wait for the cp.async that writes it")
        self._refuse(self._ledger.writer[units] < 0, owners, "shared memory is read that nobody wrote")
        self._ledger.read(units, owners)
        self._counts.shared(addresses, width, lanes)
        return self._words(width)[places // width]

    def store(self, addresses: np.ndarray, width: int, lanes: np.ndarray, words: np.ndarray) -> None:
        places, units, owners = self._places(addresses, width, lanes)
        self._refuse(self._flying[units] > 0, owners, "written before the wait for the cp.async that writes it")
        self._ledger.write(units, owners)
        self._counts.shared(addresses, width, lanes)
        self._words(width)[places // width] = words

    def begin_copy(self, addresses: np.ndarray, width: int, lanes: np.ndarray) -> None:
        """A cp.async was issued: from now on its target is neither the old data nor the new."""
        _, units, owners = self._places(addresses, width, lanes)
        self._refuse(self._flying[units] > 0, owners, "the target of two cp.async at once")
        self._ledger.write(units, owners)
        self._flying[units] = 1
        self._counts.shared(addresses, width, lanes)

    def end_copy(self, addresses: np.ndarray, width: int, lanes: np.ndarray, words: np.ndarray) -> None:
        """The thread waited: it sees the data, and others do behind a barrier."""
        places, units, owners = self._places(addresses, width, lanes)
        self._flying[units] = 0
        self._ledger.write(units, owners)
        self._words(width)[places // width] = words

    def _places(
        self, addresses: np.ndarray, width: int, lanes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        check_alignment(addresses, width, lanes)
        outside = (addresses < 0) | (addresses + width > self.limit)
        if outside.any():
            at = int(np.flatnonzero(outside)[0])
            text = f"{width} bytes at {addresses[at]} of {self.limit}"
            raise LaneFault(int(lanes[at]), f"outside of shared memory: {text}")
        places = lanes // self._threads * self.size + addresses
        return places, _spread(places // self.unit, width // self.unit), _owners(lanes, width, self.unit)

    def _refuse(self, where: np.ndarray, owners: np.ndarray, what: str) -> None:
        if where.any():
            raise LaneFault(int(owners[int(np.flatnonzero(where)[0])]), what)

    def _words(self, width: int) -> np.ndarray:
        word = min(width, 8)
        view = self._bytes.view(f"u{word}")
        return view.reshape(-1, width // word) if width > word else view
