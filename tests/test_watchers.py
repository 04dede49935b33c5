"""Who watches a call sees the registered operator; where nobody does, torch's dispatcher rests."""

import pytest
import torch
from cases import randn
from engines import alone, small_engine, small_model
from paged_batch import paged_batch
from tolerance import assert_bitwise
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import bertgpt
from bertgpt import ops
from bertgpt.ops._dispatch import OPS

W, B = randn(6, 4), randn(6, seed=1)


class Calls:
    """How often the registered operator of `linear_gelu`, and what it wraps, ran."""

    def __init__(self, patch):
        self.registered = self.executed = 0
        op, execute = OPS["linear_gelu"], OPS["linear_gelu"]._execute
        overload = op.overload

        def count_registered(*values):
            self.registered += 1
            return overload(*values)

        def count_executed(call):
            self.executed += 1
            return execute(call)

        patch.setattr(op, "overload", count_registered)
        patch.setattr(op, "_execute", count_executed)


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


def run(x):
    return ops.linear_gelu(x, W, B)


@pytest.mark.parametrize("parameters", [False, True])
def test_a_plain_call_leaves_the_dispatcher_out(calls, parameters):
    w = torch.nn.Parameter(W) if parameters else W
    with torch.no_grad():
        expected = ops.linear_gelu(randn(3, 4), w, B)
    with torch.inference_mode():
        assert_bitwise(ops.linear_gelu(randn(3, 4), w, B), expected)
    assert (calls.registered, calls.executed) == (0, 2)


def test_autograd_takes_the_registered_rule(calls):
    x = randn(3, 4).requires_grad_()
    y = run(x)
    assert "bertgpt" in type(y.grad_fn).__name__
    y.sum().backward()
    assert x.grad is not None
    assert calls.registered == 1


def test_autocast_reaches_a_plain_call_and_no_product_inside_it(calls):
    w, half = W.double(), torch.bfloat16
    with torch.autocast("cpu", dtype=half):
        assert run(randn(3, 4)).dtype == half
        assert ops.linear_gelu(randn(3, 4, dtype=torch.float64), w, None).dtype == torch.float64
        batch = paged_batch((5, 9))
        out = ops.paged_attention(*batch.args)
    assert_bitwise(out, ops.paged_attention(*batch.args))
    assert calls.registered == 0


@pytest.mark.parametrize(
    ("mode", "hook"),
    [(TorchDispatchMode, "__torch_dispatch__"), (TorchFunctionMode, "__torch_function__")],
)
def test_a_mode_sees_the_operator(mode, hook):
    names = []

    def note(self, func, types, args=(), kwargs=None):
        names.append(str(func))
        return func(*args, **(kwargs or {}))

    with type("Seen", (mode,), {hook: note})():
        run(randn(3, 4))
    assert "bertgpt.linear_gelu.default" in names


def test_a_profiler_sees_the_operator():
    with torch.profiler.profile() as profile:
        run(randn(3, 4))
    assert "bertgpt::linear_gelu" in {event.key for event in profile.key_averages()}


def test_fake_tensors_get_shapes_and_run_nothing(calls):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert run(torch.empty(3, 4)).shape == (3, 6)
    x, w, b = (mode.from_tensor(t) for t in (randn(3, 4), W, B))
    y = ops.linear_gelu(x, w, b)  # outside the mode, which its tensors bring along
    assert isinstance(y, FakeTensor)
    assert y.shape == (3, 6)
    assert (calls.registered, calls.executed) == (2, 0)


def test_meta_tensors_get_shapes_and_run_nothing(calls):
    y = ops.linear_gelu(*(t.to("meta") for t in (randn(3, 4), W, B)))
    assert y.is_meta
    assert y.shape == (3, 6)
    assert calls.executed == 0


def test_functorch_sees_the_operator(calls):
    """No batching rule is registered, so torch runs the operator once an example."""
    x = randn(5, 3, 4)
    y = torch.vmap(run)(x)
    assert_bitwise(y, torch.stack([OPS["linear_gelu"].run("torch", one(row)) for row in x]))
    assert (calls.registered, calls.executed) == (1, 5)


def one(x):
    return {"x": x, "w": W, "b": B, "approximate": "none"}


def test_a_subclass_keeps_its_type(calls):
    class Named(torch.Tensor):
        pass

    y = run(randn(3, 4).as_subclass(Named))
    assert type(y) is Named
    assert calls.registered == 1


def test_a_lazily_negated_tensor_is_resolved_before_a_kernel_reads_it(calls):
    x = torch.complex(randn(3, 4), randn(3, 4, seed=1)).conj().imag
    assert x.is_neg()
    assert_bitwise(run(x), run(x.resolve_neg()))
    assert (calls.registered, calls.executed) == (1, 2)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_holds_the_operator():
    x = randn(3, 4)
    traced = torch.jit.trace(run, x)
    assert "bertgpt::linear_gelu" in str(traced.inlined_graph)
    made = torch.fx.experimental.proxy_tensor.make_fx(run)(x)
    assert "bertgpt.linear_gelu" in made.code


def test_a_compiled_graph_holds_one_call():
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    assert_bitwise(torch.compile(run, fullgraph=True, backend=keep)(randn(3, 4)), run(randn(3, 4)))
    (graph,) = graphs
    assert [str(n.target) for n in graph.graph.nodes if n.op == "call_function"] == [
        "bertgpt.linear_gelu.default"
    ]


class TestErrorFlags:
    """What the C++ kernels find in index tensors whose values nobody has checked, as on a GPU."""

    @pytest.fixture(autouse=True)
    def _unchecked(self, host_engine, monkeypatch):
        monkeypatch.setattr("bertgpt.ops._dispatch.default_order", lambda device: ("cuda", "torch"))
        for name in ("paged_attention", "paged_write"):
            monkeypatch.setattr(OPS[name], "check_values", lambda call: None)

    def test_strict_raises_after_the_call(self):
        batch = paged_batch((40, 9), head_dim=32)
        batch.page_table[0, 2] = 10**6
        ops.paged_attention(*batch.args)
        with pytest.raises(IndexError, match="page id in use lies outside the pool"):
            ops.raise_pending()
        with bertgpt.strict(), pytest.raises(IndexError, match="page id in use lies outside"):
            ops.paged_attention(*batch.args)
        ops.raise_pending()  # told once

    def test_flags_that_are_kept_apart_are_told_apart(self):
        batch, mine = paged_batch((40, 9), head_dim=32), {}
        batch.page_table[0, 2] = 10**6
        with ops.own_flags(mine):
            ops.paged_attention(*batch.args)
        ops.raise_pending()
        with ops.own_flags({}):
            ops.raise_pending()
        with ops.own_flags(mine):
            with pytest.raises(IndexError, match="page id in use lies outside the pool"):
                ops.raise_pending()
            ops.raise_pending()  # told once

    def test_an_engine_hears_of_its_own_launches_alone(self, monkeypatch):
        model = small_model(n_embd=64, n_head=2)
        spoilt, other = small_engine(model), small_engine(model)
        bad, good = (e.submit([5, 6, 7], 8, eos_token_id=()) for e in (spoilt, other))
        expected = alone(good)
        step = spoilt._loop.decode_step
        advance = step.advance

        def spoil(sequences):
            advance(sequences)
            step._batch.page_table.fill_(10**6)

        monkeypatch.setattr(step, "advance", spoil)
        batch = paged_batch((40, 9), head_dim=32)
        batch.page_table[0, 2] = 10**6
        ops.paged_attention(*batch.args)
        for _ in range(12):
            spoilt.step()
            other.step()
        assert good.result() == expected
        with pytest.raises(IndexError, match="page id in use lies outside the pool"):
            bad.result()
        with pytest.raises(IndexError, match="page id in use lies outside the pool"):
            ops.raise_pending()  # that of the launch outside of both

    def test_a_decode_raises_at_the_next_token_that_is_read(self, monkeypatch):
        from bertgpt import gpt, paged_forward
        from bertgpt.kv_cache import PagedKVCache

        class Spoilt(PagedKVCache):
            def page_table(self, sequences):
                tables.append(super().page_table(sequences))
                if len(tables) == 2:
                    tables[-1][0, 0] = 10**6
                return tables[-1]

        config = gpt.GPT2Config(
            vocab_size=61, n_positions=32, n_embd=64, n_layer=2, n_head=2, eos_token_id=None
        )
        model = gpt.GPT2LMHeadModel(config).eval()
        expected = model.generate([[3, 4, 5], [6]], 5)
        tables = []
        with monkeypatch.context() as patch:
            patch.setattr(paged_forward, "PagedKVCache", Spoilt)
            with pytest.raises(IndexError, match="page id in use lies outside the pool"):
                model.generate([[3, 4, 5], [6]], 5)
        assert len(tables) == 2
        assert model.generate([[3, 4, 5], [6]], 5) == expected
