"""The GPUs that a plan is for, and how long they take to hand bytes on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cluster:
    """``gpus``, one process each, ``per_machine`` of them in a machine, with ``memory`` bytes each. ``host_memory``:
    bytes of a machine, None where it is not known.

    ``rate``: FLOP/s that a GPU's products reach. ``inside``, ``between``, ``host_link``: bytes/s that a GPU takes in
    from GPUs of its machine, from other machines, and from host memory. All of these are assumptions.
    """

    gpus: int
    per_machine: int = 8
    memory: float = 80e9
    rate: float = 0.4 * 989e12
    between: float = 50e9
    inside: float = 450e9
    host_link: float = 64e9
    host_memory: float | None = None

    @property
    def fullest(self) -> int:
        """GPUs of the machine that has most."""
        return min(self.gpus, self.per_machine)

    @property
    def machines(self) -> int:
        return -(-self.gpus // self.per_machine)

    def seconds(self, traffic: Traffic) -> float:
        """The slowest of the three ways, all of which work at the same time."""
        return max(traffic.received / self.inside, traffic.network / self.between, traffic.from_host / self.host_link)

    # What one GPU takes in by a collective among ``size`` processes. A ring enters a machine once for each GPU's
    # network card, and the machine's GPUs hand on among them what came in.

    def all_gather(self, what: str, whole: float, size: int, how: str) -> Traffic:
        """``whole`` bytes, of which each process has a part; a reduce-scatter takes as much."""
        gpus = min(size, self.per_machine)
        return Traffic(what, whole * (1 - 1 / size), whole * (1 - gpus / size) / gpus, how)

    def all_reduce(self, what: str, whole: float, size: int, how: str) -> Traffic:
        return self.all_gather(what, whole, size, how).times(2)

    def broadcast(self, what: str, whole: float, size: int, how: str) -> Traffic:
        """From one process to all, or from all to one."""
        network = whole / self.per_machine if size > self.per_machine else 0.0
        return Traffic(what, whole if size > 1 else 0.0, network, how)

    def all_to_all(self, what: str, own: float, size: int, how: str) -> Traffic:
        """``own`` bytes of each process, an equal part of them for each process."""
        gpus = min(size, self.per_machine)
        return Traffic(what, own * (1 - 1 / size), own * (1 - gpus / size), how)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU takes in: ``received`` from other GPUs, ``network`` of them through its network card, and
    ``from_host`` from host memory; ``how`` says how they are counted."""

    what: str
    received: float
    network: float
    how: str
    from_host: float = 0.0

    def times(self, count: float) -> Traffic:
        return Traffic(self.what, self.received * count, self.network * count, self.how, self.from_host * count)
