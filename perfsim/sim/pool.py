"""A counting pool with waiters in FIFO order: blocks of a decode replica, slots of a connector, staging buffers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable


class Claim:
    """`amount` units asked for; `granted` once they are the caller's."""

    __slots__ = ("amount", "callback", "granted")

    def __init__(self, amount: int, callback: Callable[[Claim], None]) -> None:
        self.amount = amount
        self.callback = callback
        self.granted = False


class Pool:
    """`capacity` units, of which `free` are nobody's.

    Strictly first come, first served: a large claim at the head holds back small ones behind it, so it cannot starve.
    Callbacks run inside `claim` and `release`, in the order of the claims, without a SimPy event; a callback may claim
    and release again. `peak` is the most that was ever out.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 0:
            raise ValueError(f"a pool of {capacity} units")
        self.capacity = capacity
        self.free = capacity
        self.peak = 0
        self._waiting: OrderedDict[Claim, None] = OrderedDict()
        self._granting = False

    @property
    def waiting(self) -> int:
        """Claims that are not granted yet."""
        return len(self._waiting)

    def claim(self, amount: int, callback: Callable[[Claim], None]) -> Claim:
        """Ask for `amount` units; `callback(claim)` is called when they are granted, at once where possible.

        Raises ValueError for an amount that can never be granted.
        """
        if not 0 <= amount <= self.capacity:
            raise ValueError(f"{amount} units out of a pool of {self.capacity}")
        claim = Claim(amount, callback)
        self._waiting[claim] = None
        self._grant()
        return claim

    def release(self, amount: int) -> None:
        """Give units back; ValueError when more come back than are out."""
        if not 0 <= amount <= self.capacity - self.free:
            raise ValueError(f"{amount} units come back, {self.capacity - self.free} are out")
        self.free += amount
        self._grant()

    def withdraw(self, claim: Claim) -> None:
        """A claim that is no longer wanted: it leaves the line, or gives its units back if it was granted."""
        if claim.granted:
            claim.granted = False
            self.release(claim.amount)
        elif claim in self._waiting:
            del self._waiting[claim]
            self._grant()

    def _grant(self) -> None:
        if self._granting:  # a callback claims or releases: the loop below goes on with it
            return
        self._granting = True
        try:
            while self._waiting:
                claim = next(iter(self._waiting))
                if claim.amount > self.free:
                    return
                del self._waiting[claim]
                self.free -= claim.amount
                self.peak = max(self.peak, self.capacity - self.free)
                claim.granted = True
                claim.callback(claim)
        finally:
            self._granting = False
