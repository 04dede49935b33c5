"""Random calls of the paged cache: a plain model agrees, and every page is accounted for."""

import pytest
from cache_machine import CacheMachine
from cases import examples
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

CacheMachine.TestCase.settings = examples(60, stateful_step_count=50)
TestCache = CacheMachine.TestCase


@pytest.mark.slow
def test_a_hundred_thousand_operations():
    """In several runs, since Hypothesis remembers all of one, with other choices in each."""
    wanted = CacheMachine.operations + 100_000
    few = settings(max_examples=500, stateful_step_count=50, derandomize=False)
    while CacheMachine.operations < wanted:
        before = CacheMachine.operations
        run_state_machine_as_test(CacheMachine, settings=few)
        assert CacheMachine.operations > before
