"""What only a GPU can show: compiled kernels against the reference, strictly on Triton."""

import pytest
import torch

import bertgpt
from bertgpt import validate
from bertgpt.benchmarks import gate

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "op",
    [
        "attention",
        "linear_gelu",
        "gelu_ffn",
        "linear_cross_entropy",
        "add_layer_norm",
        "pool",
        "paged_write",
        "paged_attention",
    ],
)
def test_every_backend_is_accurate_on_the_gpu(op):
    rows = validate.run(op, "cuda")
    assert any(row.backend == "triton" and row.cases for row in rows)
    assert not [row for row in rows if row.verdict == "FAIL"]


def test_models_run_on_triton_alone():
    """Strict mode raises where an op would fall back to torch."""
    bert = bertgpt.BertModel(bertgpt.BertConfig(num_hidden_layers=2)).eval().half().cuda()
    gpt = bertgpt.GPT2LMHeadModel(bertgpt.GPT2Config(n_layer=2)).eval().half().cuda()
    batch = bertgpt.pack([[1, 2, 3], [4] * 200, [5]], device="cuda")
    with bertgpt.strict(), torch.no_grad():
        assert bert(batch).last_hidden_state.isfinite().all()
        texts = gpt.generate([[1, 2, 3], [4] * 40], max_new_tokens=5)
    assert [len(text) for text in texts] == [8, 45]


def test_repeats_beside_a_busy_stream_are_bitwise_equal():
    """Every small call on every backend; `make gpu-report` makes a thousand of each."""
    assert gate.repeats("cuda", 20) == []


def test_captured_calls_follow_lengths_pages_slots_and_bounds():
    assert gate.replays("cuda") == []
