"""What the executor refuses."""


class Fault(Exception):
    """A kernel did what a GPU punishes, or what nothing guarantees: where, and what."""


class LaneFault(Exception):
    """The same before kernel, instruction and source line are known: which thread of the launch, and what."""

    def __init__(self, lane: int, what: str) -> None:
        super().__init__(what)
        self.lane = lane
