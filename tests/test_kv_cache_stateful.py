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
    before = CacheMachine.operations
    run_state_machine_as_test(
        CacheMachine, settings=settings(max_examples=4000, stateful_step_count=50)
    )
    assert CacheMachine.operations - before >= 100_000
