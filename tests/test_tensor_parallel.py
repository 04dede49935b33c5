"""Models split over two ranks by heads and feed-forward columns."""

import torch.multiprocessing as multiprocessing
from parallel_ranks import RANKS, work


def test_two_ranks_are_as_one(tmp_path):
    multiprocessing.spawn(work, (f"file://{tmp_path / 'store'}", str(tmp_path)), nprocs=RANKS)
    assert {file.name for file in tmp_path.glob("rank*")} == {"rank0", "rank1"}
