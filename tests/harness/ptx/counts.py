"""What a launch did, counted as it ran."""

import numpy as np

SECTOR = 32  # bytes that memory moves at once
BANKS, BANK = 32, 4  # of shared memory, and bytes of each
WARP = 32


class Counts:
    """Bytes asked for, of global memory; and, where ``detailed``, sectors and wavefronts, which cost time to find."""

    def __init__(self, instructions: int, detailed: bool = False) -> None:
        self.detailed = detailed
        self.executed = np.zeros(instructions, np.int64)  # of each instruction, in threads
        self.loaded = self.stored = 0  # bytes
        self.sectors = 0  # of all warps' requests
        self.wavefronts = self.least_wavefronts = 0  # of shared memory's requests, and without bank conflicts

    def load(self, addresses: np.ndarray, width: int, lanes: np.ndarray) -> None:
        self.loaded += width * len(lanes)
        self._count_sectors(addresses, lanes)

    def store(self, addresses: np.ndarray, width: int, lanes: np.ndarray) -> None:
        self.stored += width * len(lanes)
        self._count_sectors(addresses, lanes)

    def _count_sectors(self, addresses: np.ndarray, lanes: np.ndarray) -> None:
        """Accesses are aligned to their width, so that none is in two sectors."""
        if self.detailed:
            self.sectors += len(np.unique(np.stack((lanes // WARP, addresses // SECTOR)), axis=1).T)

    def shared(self, addresses: np.ndarray, width: int, lanes: np.ndarray) -> None:
        """A warp's request takes as many wavefronts as some bank has different words; requests of 8 and 16 bytes are
        served by halves and quarters of the warp."""
        if not self.detailed:
            return
        group = lanes // (WARP * BANK // max(width, BANK))
        words = (addresses // BANK)[:, None] + np.arange(max(width // BANK, 1))
        keys = np.unique(np.stack((np.repeat(group, words.shape[1]), words.ravel())), axis=1)
        loads = np.unique(np.stack((keys[0], keys[1] % BANKS)), axis=1, return_counts=True)
        groups, start = np.unique(loads[0][0], return_index=True)
        self.wavefronts += int(np.maximum.reduceat(loads[1], start).sum())
        self.least_wavefronts += len(groups)
