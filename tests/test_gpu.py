"""What only a GPU can show: compiled kernels against the reference, strictly on Triton."""

import pytest
import torch
from tolerance import assert_bitwise

import bertgpt
from bertgpt import ops, validate

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "op",
    [
        "attention",
        "linear_gelu",
        "gelu_ffn",
        "add_layer_norm",
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


def test_repeats_are_bitwise_equal():
    q, k, v = (torch.randn(3, 300, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    first = ops.attention(q, k, v, causal=True, backend="triton")
    for _ in range(100):
        assert_bitwise(ops.attention(q, k, v, causal=True, backend="triton"), first)


def test_a_captured_decode_follows_lengths_and_pages():
    """A CUDA graph of paged attention replays with what the index tensors hold by then."""
    pages, size, heads, dim = 40, 16, 4, 64
    k_pages, v_pages = (
        torch.randn(pages, heads, size, dim, device="cuda", dtype=torch.float16) for _ in range(2)
    )
    q = torch.randn(2, heads, dim, device="cuda", dtype=torch.float16)
    table = torch.arange(pages, device="cuda", dtype=torch.int32).view(2, -1)
    lengths = torch.tensor([7, 300], device="cuda", dtype=torch.int32)

    def decode():
        return ops.paged_attention(q, k_pages, v_pages, table, lengths, backend="triton")

    decode()  # compiles before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode()
    for changed in ([7, 300], [320, 1], [33, 16]):
        lengths.copy_(torch.tensor(changed, dtype=torch.int32))
        table.copy_(torch.randperm(pages, dtype=torch.int32).view(2, -1))
        graph.replay()
        torch.cuda.synchronize()
        assert_bitwise(captured, decode())
