"""Patched models under accelerate's own FSDP2 and transformers' Trainer, over two processes."""

import pytest
import torch.multiprocessing as multiprocessing

pytest.importorskip("accelerate")

from accelerate_ranks import RANKS, work


@pytest.mark.slow
def test_weights_after_training_are_those_of_stock_alone(tmp_path):
    multiprocessing.spawn(work, (f"file://{tmp_path / 'store'}", str(tmp_path)), nprocs=RANKS)
    assert {file.name for file in tmp_path.glob("rank*")} == {"rank0", "rank1"}
