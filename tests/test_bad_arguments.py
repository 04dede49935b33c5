"""Arguments of the wrong type, place or value: each is refused by name, before anything runs."""

import pytest
import torch
from models import BERT, GPT2

import bertgpt
from bertgpt import BertConfig, GPT2Config, ops, pack, pad
from bertgpt.packing import PackedBatch, unpad

Q = torch.randn(1, 4, 2, 8)
PAGES = torch.randn(3, 1, 4, 8)
TABLE, LENGTHS = torch.tensor([[0, 1, 2]]), torch.tensor([5])
IDS = torch.ones(2, 3, dtype=torch.long)
X, W = torch.randn(3, 8), torch.ones(8)


def paged(**kwargs):
    return ops.paged_attention(Q[0, :1], PAGES, PAGES, TABLE, LENGTHS, **kwargs)


OPS = [
    (TypeError, "max_seqlen_q must be an int", lambda: paged(max_seqlen_q=3.0)),
    (TypeError, "max_seqlen_q must be an int", lambda: paged(max_seqlen_q=1.0)),
    (TypeError, "max_seqlen_q must be an int", lambda: paged(max_seqlen_q=True)),
    (TypeError, "causal must be True", lambda: paged(causal=None)),
    (TypeError, "causal must be True", lambda: ops.attention(Q, Q, Q, causal="no")),
    (TypeError, "return_lse must be True", lambda: ops.attention(Q, Q, Q, return_lse=1)),
    (TypeError, "return_sum must be", lambda: ops.add_layer_norm(X, None, W, None, return_sum=2)),
    (ValueError, "fit 64 bits", lambda: ops.attention(Q, Q, Q, window=(2**63, 0))),
    (ValueError, "fit 64 bits", lambda: paged(window=(0, 2**64))),
]


@pytest.mark.parametrize(("error", "words", "call"), OPS)
def test_ops_name_the_argument(error, words, call):
    with pytest.raises(error, match=words):
        call()


def test_the_widest_windows_reach_everything():
    wide = {"window": (2**63 - 1, 2**63 - 1)}
    for backend in ("torch", "reference"):
        plain = ops.attention(Q, Q, Q, backend=backend)
        torch.testing.assert_close(ops.attention(Q, Q, Q, backend=backend, **wide), plain)
        torch.testing.assert_close(
            paged(backend=backend, causal=False, **wide), paged(backend=backend)
        )


def batch(values=None, **fields):
    values = torch.ones(5, dtype=torch.long) if values is None else values
    return PackedBatch(values, torch.tensor([0, 2, 5], dtype=torch.int32), (2, 3), **fields)


PACKING = [
    (TypeError, "token_type_ids must be a tensor", lambda: batch(token_type_ids=[0] * 5)),
    (TypeError, "position_ids must be a tensor", lambda: batch(position_ids=range(5))),
    (
        ValueError,
        "token_type_ids is on meta but values is on cpu",
        lambda: batch(token_type_ids=torch.zeros(5, dtype=torch.long, device="meta")),
    ),
    (
        ValueError,
        "cu_seqlens is on cpu but values is on meta",
        lambda: batch(torch.ones(5, dtype=torch.long, device="meta")),
    ),
    (TypeError, "batch must be a PackedBatch", lambda: pad(X, None)),
    (TypeError, "values must be a tensor", lambda: pad([1.0], batch())),
    (TypeError, "bool or numeric", lambda: unpad(IDS, torch.ones(2, 3) * 1j)),
    (ValueError, "attention_mask is on meta", lambda: unpad(IDS, IDS.to("meta"))),
    (ValueError, "on meta, which holds no", lambda: unpad(IDS.to("meta"), IDS.to("meta"))),
    (TypeError, "must be a tensor", lambda: unpad(IDS, IDS, token_type_ids=[0])),
    (
        ValueError,
        "position_ids is on meta",
        lambda: unpad(IDS, IDS, position_ids=IDS.to("meta")),
    ),
]


@pytest.mark.parametrize(("error", "words", "call"), PACKING)
def test_packing_names_the_argument(error, words, call):
    with pytest.raises(error, match=words):
        call()


@pytest.fixture(scope="module")
def gpt():
    return bertgpt.GPT2LMHeadModel(GPT2Config(**GPT2)).eval()


@pytest.mark.parametrize(
    ("error", "words", "change"),
    [
        (TypeError, "max_new_tokens must be an integer", {"max_new_tokens": True}),
        (TypeError, "attention_mask must be bool", {"attention_mask": torch.ones(2, 3) * 1j}),
        (ValueError, "attention_mask is on meta", {"attention_mask": IDS.to("meta")}),
        (TypeError, "attention_mask must be a tensor", {"attention_mask": [[1] * 3] * 2}),
        (ValueError, "on meta", {"prompts": IDS.to("meta")}),
    ],
)
def test_generate_names_the_argument(error, words, change, gpt):
    with pytest.raises(error, match=words):
        gpt.generate(**{"prompts": IDS, "max_new_tokens": 1, **change})


HEADS = (
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForMultipleChoice",
    "GPT2LMHeadModel",
    "GPT2ForSequenceClassification",
)


def head(name):
    values = BERT if name.startswith("Bert") else {**GPT2, "pad_token_id": 0}
    model_class = getattr(bertgpt, name)
    model = model_class(model_class.config_class(**values)).eval()
    ids = IDS[None] if name == "BertForMultipleChoice" else IDS
    return model, ids


@pytest.mark.parametrize("name", HEADS)
def test_every_head_names_its_labels(name):
    model, ids = head(name)
    with pytest.raises(TypeError, match="labels must be a tensor, not list"):
        model(ids, labels=[0, 1])
    shape = IDS.shape if name in HEADS[:1] + HEADS[3:4] + HEADS[5:6] else ids.shape[:1]
    with pytest.raises(ValueError, match="labels is on meta"):
        model(ids, labels=torch.zeros(shape, dtype=torch.long, device="meta"))
    with pytest.raises(ValueError, match="on meta"):
        model(ids.to("meta"))


def test_the_other_labels_are_named_too():
    model, ids = head("BertForPreTraining")
    with pytest.raises(TypeError, match="next_sentence_label must be a tensor"):
        model(ids, labels=IDS, next_sentence_label=[0, 1])
    with pytest.raises(TypeError, match="next_sentence_label must be int32 or int64"):
        model(ids, labels=IDS, next_sentence_label=torch.ones(2))
    model, ids = head("BertForQuestionAnswering")
    with pytest.raises(TypeError, match="end_positions must be a tensor"):
        model(ids, start_positions=torch.tensor([0, 1]), end_positions=[1, 2])
    meta = torch.tensor([0, 1], device="meta")
    with pytest.raises(ValueError, match="start_positions is on meta"):
        model(ids, start_positions=meta, end_positions=torch.tensor([0, 1]))


def test_labels_of_odd_strides_are_taken():
    model, ids = head("BertForNextSentencePrediction")
    labels = torch.tensor([[0, 1], [1, 0]]).t()[:, :1]  # [2, 1], not one row after the other
    assert torch.equal(model(ids, labels=labels).loss, model(ids, labels=labels[:, 0]).loss)


CONFIGS = [
    ({"layer_norm_eps": "x"}, "layer_norm_eps='x'.*finite number, not negative"),
    ({"layer_norm_eps": -1.0}, "layer_norm_eps=-1.0"),
    ({"layer_norm_eps": float("nan")}, "layer_norm_eps=nan"),
    ({"layer_norm_eps": None}, "layer_norm_eps=None"),
    ({"hidden_dropout_prob": 2.0}, "hidden_dropout_prob=2.0.*from 0 to 1"),
    ({"hidden_dropout_prob": True}, "hidden_dropout_prob=True"),
    ({"attention_probs_dropout_prob": -1}, "attention_probs_dropout_prob=-1"),
    ({"classifier_dropout": 1.5}, "classifier_dropout=1.5"),
    ({"initializer_range": -0.02}, "initializer_range=-0.02"),
    ({"vocab_size": True}, "vocab_size=True"),
    ({"hidden_size": 257, "num_attention_heads": 1}, "heads of 257 are too wide.*256 is the most"),
]
GPT2_CONFIGS = [
    ({"layer_norm_epsilon": float("inf")}, "layer_norm_epsilon=inf"),
    ({"attn_pdrop": 1.1}, "attn_pdrop=1.1"),
    ({"resid_pdrop": "0.1"}, "resid_pdrop='0.1'"),
    ({"embd_pdrop": -0.1}, "embd_pdrop=-0.1"),
    ({"n_inner": 0}, "n_inner=0"),
    ({"n_embd": 600, "n_head": 2}, "heads of 300 are too wide"),
]


@pytest.mark.parametrize(("change", "words"), CONFIGS)
def test_bert_configs_that_cannot_be_honoured(change, words):
    with pytest.raises(ValueError, match=words):
        bertgpt.BertForSequenceClassification(BertConfig(**{**BERT, **change}))


@pytest.mark.parametrize(("change", "words"), GPT2_CONFIGS)
def test_gpt2_configs_that_cannot_be_honoured(change, words):
    with pytest.raises(ValueError, match=words):
        bertgpt.GPT2LMHeadModel(GPT2Config(**{**GPT2, **change}))


def test_the_bounds_themselves_are_honoured():
    edge = {"hidden_size": 512, "num_attention_heads": 2, "hidden_dropout_prob": 1, "vocab_size": 9}
    config = BertConfig(**{**BERT, **edge, "layer_norm_eps": 0, "classifier_dropout": 0.0})
    model = bertgpt.BertForSequenceClassification(config).eval()
    assert model(pack([[1, 2]])).logits.shape == (1, 2)


OVERLAPPING = [
    ((4, 2, 4, 8), (16, 8, 8, 1)),  # head 1 of a page begins where slot 1 of head 0 does
    ((4, 2, 4, 8), (64, 32, 7, 1)),  # a slot ends in the next one
    ((4, 2, 4, 8), (0, 32, 8, 1)),  # one page, expanded
]


@pytest.mark.parametrize(("shape", "strides"), OVERLAPPING)
@pytest.mark.parametrize("which", ["k_pages", "v_pages"])
def test_pages_that_overlap_are_refused(shape, strides, which):
    pages = {name: torch.zeros(shape) for name in ("k_pages", "v_pages")}
    pages[which] = torch.zeros(1000).as_strided(shape, strides)
    k = torch.ones(1, 2, 8)
    with pytest.raises(ValueError, match=f"{which} is .* overlap"):
        ops.paged_write(k, k, slots=torch.tensor([0]), **pages)
    assert not pages["k_pages"].any()
    assert not pages["v_pages"].any()


@pytest.mark.parametrize("strides", [(32, 128, 8, 1), (200, 9, 20, 1), (1000, 1, 1, 1)])
def test_pages_of_any_nesting_strides_are_written(strides):
    shape = (4, 2, 4, 8) if strides[1] > 1 else (1, 1, 1, 8)
    pages = [torch.zeros(1000).as_strided(shape, strides) for _ in range(2)]
    k = torch.ones(1, shape[1], 8)
    ops.paged_write(k, k, *pages, torch.tensor([0]))
    assert (pages[0][0, :, 0] == 1).all()
    assert pages[0].sum() == k.sum()


@pytest.mark.parametrize(
    ("error", "words", "op", "call"),
    [
        (
            ValueError,
            "key_lengths holds 5",
            "attention",
            lambda: ((Q, Q, Q), {"key_lengths": torch.tensor([5])}),
        ),
        (
            ValueError,
            "must end at 3",
            "attention",
            lambda: ((Q[0, :3],) * 3, {"cu_seqlens_q": torch.tensor([0, 2])}),
        ),
        (
            IndexError,
            "page_table holds 9",
            "paged_attention",
            lambda: ((Q[0, :1], PAGES, PAGES, torch.tensor([[9]]), torch.tensor([1])), {}),
        ),
        (
            IndexError,
            "slots holds 99",
            "paged_write",
            lambda: ((Q[0, :1, :1], Q[0, :1, :1], PAGES, PAGES, torch.tensor([99])), {}),
        ),
    ],
)
def test_explain_refuses_by_value_as_the_op_does(error, words, op, call):
    args, kwargs = call()
    for function in (getattr(ops, op), lambda *a, **k: ops.explain(op, *a, **k)):
        with pytest.raises(error, match=words):
            function(*args, **kwargs)
