"""The counting pool: conservation, strict order, no starvation; and the renewal process of failures."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from perfsim.sim.failures import outages
from perfsim.sim.pool import Claim, Pool

CAPACITY = 10


class PoolMachine(RuleBasedStateMachine):
    """Random claims, releases and withdrawals against a list that is replayed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool(CAPACITY)
        self.asked: list[Claim] = []  # in order, withdrawn ones taken out
        self.held: list[Claim] = []

    @rule(amount=st.integers(0, CAPACITY))
    def claim(self, amount: int) -> None:
        # The callback runs inside `claim`, so the claim joins `asked` there or here, whichever comes first.
        claim = self.pool.claim(amount, self.held.append)
        if not claim.granted:
            self.asked.append(claim)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        claim = data.draw(st.sampled_from(self.held))
        self.held.remove(claim)
        self.pool.release(claim.amount)
        self.served()

    @precondition(lambda self: self.held or self.asked)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        claim = data.draw(st.sampled_from(self.held + self.asked))
        (self.held if claim.granted else self.asked).remove(claim)
        self.pool.withdraw(claim)
        self.pool.withdraw(claim)  # a second time changes nothing
        self.served()

    def served(self) -> None:
        granted = [claim for claim in self.asked if claim.granted]
        assert granted == self.asked[: len(granted)], "somebody jumped the queue"
        self.asked = self.asked[len(granted) :]

    @invariant()
    def conserved(self) -> None:
        assert self.pool.free == CAPACITY - sum(claim.amount for claim in self.held) >= 0
        assert self.pool.waiting == len(self.asked)
        assert not self.asked or self.asked[0].amount > self.pool.free, "the head could be served"


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_callback_may_claim_and_release_again() -> None:
    pool, order = Pool(2), []

    def once(claim: Claim) -> None:
        order.append(claim.amount)
        if len(order) < 5:
            pool.claim(1, once)
            pool.release(claim.amount)

    pool.claim(2, once)
    assert order == [2, 1, 1, 1, 1]
    assert pool.free == 1
    assert pool.peak == 2


def test_misuse_is_refused() -> None:
    pool = Pool(3)
    with pytest.raises(ValueError, match="4 units out of a pool of 3"):
        pool.claim(4, lambda claim: None)
    with pytest.raises(ValueError, match="0 are out"):
        pool.release(1)
    with pytest.raises(ValueError, match="mtbf"):
        outages(0, 0, mtbf=0.0, repair=1.0)


@settings(max_examples=50)
@given(st.integers(0, 2**32), st.integers(0, 10_000), st.floats(1e-3, 1e6), st.floats(0, 1e4), st.booleans())
def test_outages_are_ordered_and_belong_to_their_machine(
    seed: int, machine: int, mtbf: float, repair: float, exponential: bool
) -> None:
    def times(number: int) -> list[tuple[float, float]]:
        return list(islice(outages(seed, number, mtbf=mtbf, repair=repair, exponential_repair=exponential), 20))

    found = times(machine)
    flat = [moment for pair in found for moment in pair]
    assert flat == sorted(flat)
    assert found == times(machine)
    assert found[0] != times(machine + 1)[0]


@pytest.mark.parametrize("exponential", [False, True])
def test_availability_is_that_of_a_renewal_process(exponential: bool) -> None:
    found = list(islice(outages(1, 0, mtbf=30.0, repair=10.0, exponential_repair=exponential), 20_000))
    down = sum(up - down for down, up in found)
    assert down / found[-1][1] == pytest.approx(0.25, rel=0.03)
