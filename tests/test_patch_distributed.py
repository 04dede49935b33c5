"""Patched models over two processes: data parallel, and sharded by FSDP2."""

import pytest
import torch.multiprocessing as multiprocessing
from patched_ranks import RANKS, work


@pytest.mark.slow
def test_gradients_over_two_processes(tmp_path):
    multiprocessing.spawn(work, (f"file://{tmp_path / 'store'}", str(tmp_path)), nprocs=RANKS)
    assert {file.name for file in tmp_path.glob("rank*")} == {"rank0", "rank1"}
