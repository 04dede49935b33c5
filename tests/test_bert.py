"""BERT against stock transformers: real checkpoint and text, every head, any padding, packed."""

import copy

import pytest
import torch
import transformers
from models import (
    BERT,
    TOLERANCE,
    largest_difference,
    needs_minilm,
    news_ids,
    padded,
    ragged_mask,
    random_ids,
    twins,
)

from bertgpt import bert, demo_data, pack
from bertgpt.outputs import ModelOutput

SIDES = ("right", "left", "both", "holes")
TOKEN_HEADS = ("BertForMaskedLM", "BertForTokenClassification")
POOLED_HEADS = ("BertForNextSentencePrediction", "BertForSequenceClassification")


@pytest.fixture(scope="module")
def minilm():
    folder = demo_data.minilm_folder()
    stock = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    return bert.BertModel.from_pretrained(folder), stock


@needs_minilm
@pytest.mark.parametrize("side", ["right", "left"])
def test_real_checkpoint_on_real_text(minilm, side):
    model, stock = minilm
    rows = news_ids(5)
    ids, mask = padded(rows, side)
    with torch.no_grad():
        theirs = stock(ids, attention_mask=mask, output_hidden_states=True)
        ours = model(ids, attention_mask=mask, output_hidden_states=True)
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert largest_difference(a, b, mask) <= TOLERANCE
    assert ours.last_hidden_state[mask == 0].abs().max() == 0
    if side == "right":  # left padding: stock pools a padding token there
        assert largest_difference(ours.pooler_output, theirs.pooler_output) <= TOLERANCE


@needs_minilm
def test_real_checkpoint_packed(minilm):
    model, stock = minilm
    rows = news_ids(5)
    with torch.no_grad():
        ours = model(pack(rows))
        for i, (row, hidden) in enumerate(
            zip(rows, ours.last_hidden_state.split([len(row) for row in rows]), strict=True)
        ):
            theirs = stock(torch.tensor([row]))
            assert largest_difference(hidden, theirs.last_hidden_state[0]) <= TOLERANCE
            assert largest_difference(ours.pooler_output[i], theirs.pooler_output[0]) <= TOLERANCE


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["BertModel", *TOKEN_HEADS])
def test_token_outputs_and_losses(name, side):
    extra = {"num_labels": 5} if name == "BertForTokenClassification" else {}
    model, stock = twins(bert, name, BERT, **extra)
    mask = ragged_mask(side)
    inputs = {
        "input_ids": random_ids(4, 12),
        "attention_mask": mask,
        "token_type_ids": random_ids(4, 12, low=0, high=2),
    }
    if name != "BertModel":
        labels = random_ids(4, 12, low=0, high=extra.get("num_labels", 61))
        inputs["labels"] = labels.masked_fill(mask == 0, -100)
    theirs, ours = stock(**inputs), model(**inputs)
    assert list(ours) == list(theirs)
    field = "last_hidden_state" if name == "BertModel" else "logits"
    assert largest_difference(ours[field], theirs[field], mask) <= TOLERANCE
    assert ours[field][mask == 0].abs().max() == 0
    if name != "BertModel":
        assert largest_difference(ours.loss, theirs.loss) <= TOLERANCE


@pytest.mark.parametrize("name", POOLED_HEADS)
def test_sequence_outputs_and_losses(name):
    model, stock = twins(bert, name, BERT)
    inputs = {
        "input_ids": random_ids(4, 12),
        "attention_mask": ragged_mask("right"),
        "labels": torch.tensor([0, 1, 1, 0]),
    }
    theirs, ours = stock(**inputs), model(**inputs)
    assert list(ours) == list(theirs)
    assert largest_difference(ours.logits, theirs.logits) <= TOLERANCE
    assert largest_difference(ours.loss, theirs.loss) <= TOLERANCE


@pytest.mark.parametrize(
    ("num_labels", "problem"),
    [
        (1, None),
        (3, None),
        (1, "regression"),
        (3, "regression"),
        (3, "single_label_classification"),
        (1, "multi_label_classification"),
        (3, "multi_label_classification"),
    ],
)
def test_problem_types(num_labels, problem):
    name = "BertForSequenceClassification"
    model, stock = twins(bert, name, BERT, num_labels=num_labels, problem_type=problem)
    whole = torch.randint(0, num_labels, (4,))
    labels = {
        "single_label_classification": whole,
        "multi_label_classification": torch.rand(4, num_labels),
        "regression": torch.rand(4, num_labels),
        None: whole if num_labels > 1 else torch.rand(4),
    }[problem]
    ids = random_ids(4, 9)
    difference = largest_difference(model(ids, labels=labels).loss, stock(ids, labels=labels).loss)
    assert difference <= TOLERANCE


def test_pretraining_heads():
    model, stock = twins(bert, "BertForPreTraining", BERT)
    mask = ragged_mask("right")
    inputs = {
        "input_ids": random_ids(4, 12),
        "attention_mask": mask,
        "labels": random_ids(4, 12).masked_fill(mask == 0, -100),
        "next_sentence_label": torch.tensor([0, 1, 0, 1]),
    }
    theirs, ours = stock(**inputs), model(**inputs)
    assert list(ours) == list(theirs)
    assert largest_difference(ours.prediction_logits, theirs.prediction_logits, mask) <= TOLERANCE
    assert largest_difference(ours[2], theirs[2]) <= TOLERANCE
    assert largest_difference(ours.loss, theirs.loss) <= TOLERANCE


def test_question_answering():
    model, stock = twins(bert, "BertForQuestionAnswering", BERT)
    ids, mask = random_ids(4, 12), ragged_mask("right")
    theirs, ours = stock(ids, attention_mask=mask), model(ids, attention_mask=mask)
    for a, b in zip(ours.to_tuple(), theirs.to_tuple(), strict=True):
        assert largest_difference(a, b, mask) <= TOLERANCE
        assert (a.argmax(1) < mask.sum(1)).all()  # never in the padding
    # Without padding the loss is stock's; 99 lies outside the row and is ignored.
    ends = {
        "start_positions": torch.tensor([0, 3, 2, 99]),
        "end_positions": torch.tensor([1, 3, 9, 4]),
    }
    assert largest_difference(model(ids, **ends).loss, stock(ids, **ends).loss) <= TOLERANCE


def test_multiple_choice_padded_and_packed():
    model, stock = twins(bert, "BertForMultipleChoice", BERT)
    ids, mask = random_ids(2, 2, 12), ragged_mask("right").view(2, 2, 12)
    labels = torch.tensor([1, 0])
    theirs = stock(ids, attention_mask=mask, labels=labels)
    ours = model(ids, attention_mask=mask, labels=labels)
    assert largest_difference(ours.logits, theirs.logits) <= TOLERANCE
    assert largest_difference(ours.loss, theirs.loss) <= TOLERANCE
    rows = [r[m.bool()] for r, m in zip(ids.flatten(0, 1), mask.flatten(0, 1), strict=True)]
    packed = model(pack(rows), num_choices=2, labels=labels)
    assert largest_difference(packed.logits, theirs.logits) <= TOLERANCE
    with pytest.raises(ValueError, match="num_choices=3"):
        model(pack(rows), num_choices=3)


@pytest.mark.parametrize("name", ["BertModel", *TOKEN_HEADS, *POOLED_HEADS])
def test_packed_equals_padded(name):
    model, _ = twins(bert, name, BERT)
    ids, types = random_ids(4, 12), random_ids(4, 12, low=0, high=2)
    mask = ragged_mask("right")
    keep = mask.bool()
    rows = [r[k] for r, k in zip(ids, keep, strict=True)]
    segments = [r[k] for r, k in zip(types, keep, strict=True)]
    packed = model(pack(rows, token_type_ids=segments))
    whole = model(ids, attention_mask=mask, token_type_ids=types)
    per_token = name not in POOLED_HEADS
    assert largest_difference(packed[0], whole[0][keep] if per_token else whole[0]) <= 1e-6


def test_packed_labels():
    model, _ = twins(bert, "BertForMaskedLM", BERT)
    ids, mask = random_ids(4, 12), ragged_mask("right")
    labels = random_ids(4, 12).masked_fill(mask == 0, -100)
    rows = [r[k] for r, k in zip(ids, mask.bool(), strict=True)]
    packed = model(pack(rows), labels=labels[mask.bool()])
    whole = model(ids, attention_mask=mask, labels=labels)
    assert largest_difference(packed.loss, whole.loss) <= 1e-6
    with pytest.raises(ValueError, match="labels must have shape"):
        model(pack(rows), labels=labels)


def test_a_row_that_is_all_padding():
    model, stock = twins(bert, "BertModel", BERT)
    ids, mask = random_ids(3, 6), ragged_mask("right", (4, 0, 6), 6)
    ours = model(ids, attention_mask=mask)
    theirs = stock(ids, attention_mask=mask)
    assert largest_difference(ours[0], theirs[0], mask) <= TOLERANCE
    assert ours[0][1].abs().max() == 0
    assert largest_difference(ours.pooler_output[1], model.pooler.bias.tanh()) <= 1e-6
    assert model(pack([[], []])).last_hidden_state.shape == (0, 24)


def test_embeddings_and_positions_given():
    model, stock = twins(bert, "BertModel", BERT)
    embeds, places = torch.randn(2, 5, 24), torch.tensor([[4, 3, 2, 1, 0]])
    ours = model(inputs_embeds=embeds, position_ids=places)
    theirs = stock(inputs_embeds=embeds, position_ids=places)
    assert largest_difference(ours[0], theirs[0]) <= TOLERANCE


def test_gradients_are_stocks():
    model, stock = twins(bert, "BertForMaskedLM", BERT)
    ids, mask = random_ids(4, 12), ragged_mask("right")
    labels = random_ids(4, 12).masked_fill(mask == 0, -100)
    for each in (model, stock):
        each(ids, attention_mask=mask, labels=labels).loss.backward()
    expected = {name: p.grad for name, p in stock.named_parameters()}
    qkv = model.bert.layers[0].attention.qkv.weight.grad
    prefix = "bert.encoder.layer.0.attention.self."
    parts = [expected[f"{prefix}{part}.weight"] for part in ("query", "key", "value")]
    assert largest_difference(qkv, torch.cat(parts)) <= 1e-5
    words = model.get_input_embeddings().weight.grad
    assert largest_difference(words, expected["bert.embeddings.word_embeddings.weight"]) <= 1e-5
    assert words[0].abs().max() > 0  # through the tied decoder, though 0 is padding


def test_dropout_applies_in_training_only():
    model, _ = twins(bert, "BertModel", BERT)
    ids = random_ids(2, 9)
    assert model(ids)[0].equal(model(ids)[0])
    model.train()
    first, second = model(ids)[0], model(ids)[0]
    assert not first.equal(second)
    for rate in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        alone = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
        config = {**BERT, **alone, rate: 0.5}
        model = bert.BertModel(bert.BertConfig(**config)).train()
        assert not model(ids)[0].equal(model(ids)[0]), rate
        config[rate] = 0.0
        model = bert.BertModel(bert.BertConfig(**config)).train()
        assert model(ids)[0].equal(model(ids)[0])


def test_outputs_by_attribute_name_and_place():
    model, _ = twins(bert, "BertForMaskedLM", BERT)
    ids = random_ids(1, 4)
    output = model(ids, output_hidden_states=True)
    assert isinstance(output, ModelOutput)
    assert output.logits is output["logits"] is output[0]
    assert list(output.keys()) == ["logits", "hidden_states"]
    assert len(output) == 2
    assert output.get("loss") is None
    with pytest.raises(KeyError):
        output["loss"]
    as_tuple = model(ids, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert as_tuple[0].equal(output.logits)


def test_nothing_is_read_back_from_the_device_inside():
    """On meta tensors any device-to-host copy raises: a stand-in for a host sync on a GPU."""
    model = bert.BertForMaskedLM(bert.BertConfig(**BERT)).to("meta").eval()
    batch = pack([[5, 6, 7], [8]]).to("meta")
    output = model(batch, labels=batch.values)
    assert output.logits.shape == (4, 61)


def test_weights_start_as_stock_starts_them():
    config = {**BERT, "hidden_size": 192, "vocab_size": 500}
    model = bert.BertForMaskedLM(bert.BertConfig(**config))
    state = model.state_dict()
    spread = state["bert.encoder.layer.1.attention.self.key.weight"].std().item()
    assert spread == pytest.approx(0.3, rel=0.05)
    assert state["bert.embeddings.word_embeddings.weight"][0].abs().max() == 0
    assert state["bert.encoder.layer.0.output.LayerNorm.weight"].eq(1).all()
    assert state["bert.encoder.layer.0.attention.self.key.bias"].eq(0).all()


IDS = torch.ones(2, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("error", "message", "inputs"),
    [
        (IndexError, "input_ids holds 61", {"input_ids": IDS * 61}),
        (IndexError, "input_ids holds -1", {"input_ids": -IDS}),
        (IndexError, "token_type_ids holds 2", {"input_ids": IDS, "token_type_ids": IDS * 2}),
        (IndexError, "position_ids holds 20", {"input_ids": IDS, "position_ids": IDS * 20}),
        (ValueError, "21 tokens", {"input_ids": torch.ones(1, 21, dtype=torch.long)}),
        (ValueError, "exactly one", {}),
        (ValueError, "exactly one", {"input_ids": IDS, "inputs_embeds": torch.ones(2, 4, 24)}),
        (ValueError, r"\[B, L\]", {"input_ids": IDS[0]}),
        (TypeError, "int32 or int64", {"input_ids": IDS.short()}),
        (TypeError, "PackedBatch", {"input_ids": [[1, 2]]}),
        (TypeError, "floating", {"inputs_embeds": torch.ones(2, 4, 24, dtype=torch.long)}),
        (ValueError, "24 features", {"inputs_embeds": torch.ones(2, 4, 23)}),
        (ValueError, "4-D", {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 4, 4)}),
        (ValueError, "3-D", {"input_ids": IDS, "attention_mask": torch.ones(2, 4, 4)}),
        (ValueError, "attention_mask", {"input_ids": IDS, "attention_mask": torch.ones(2, 5)}),
        (ValueError, "token_type_ids", {"input_ids": IDS, "token_type_ids": IDS[:, :3]}),
        (ValueError, "output_attentions", {"input_ids": IDS, "output_attentions": True}),
        (ValueError, "encoder_hidden", {"input_ids": IDS, "encoder_hidden_states": torch.ones(1)}),
        (ValueError, "use_cache", {"input_ids": IDS, "use_cache": True}),
        (ValueError, "past_key_values", {"input_ids": IDS, "past_key_values": ()}),
        (IndexError, "input_ids holds 61", {"input_ids": pack([[61]])}),
        (ValueError, "21 tokens", {"input_ids": pack([[1] * 21])}),
        (ValueError, "beside a PackedBatch", {"input_ids": pack([[1]]), "token_type_ids": IDS}),
    ],
)
def test_bad_input_is_named(error, message, inputs):
    model = bert.BertModel(bert.BertConfig(**BERT))
    with pytest.raises(error, match=message):
        model(**inputs)


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_act": "relu"},
        {"is_decoder": True},
        {"add_cross_attention": True},
        {"position_embedding_type": "relative_key"},
        {"output_attentions": True},
        {"num_attention_heads": 5},
    ],
)
def test_configs_that_ask_for_more_are_refused_by_name(values):
    config = bert.BertConfig(**{**BERT, **values})
    with pytest.raises(ValueError, match=next(iter(values))):
        bert.BertModel(config)


def test_a_model_wants_its_own_config():
    with pytest.raises(TypeError, match="BertConfig"):
        bert.BertModel(transformers.BertConfig())


def test_copies_keep_names_and_ties():
    model, _ = twins(bert, "BertForMaskedLM", BERT)
    twin = copy.deepcopy(model)
    assert twin.get_output_embeddings().weight is twin.get_input_embeddings().weight
    assert list(twin.state_dict()) == list(model.state_dict())


def test_an_answer_outside_its_sequence_is_ignored():
    model = bert.BertForQuestionAnswering(bert.BertConfig(**BERT)).eval()
    batch = pack([[1, 2], [1, 2, 3, 4]])
    inside, outside = torch.tensor([1, 1]), torch.tensor([3, 1])
    loss = model(batch, start_positions=outside, end_positions=outside).loss
    alone = model(pack([[1, 2, 3, 4]]), start_positions=inside[1:], end_positions=inside[1:]).loss
    torch.testing.assert_close(loss, alone)
    with pytest.raises(TypeError, match="start_positions must be int32 or int64"):
        model(batch, start_positions=inside.float(), end_positions=inside)
    with pytest.raises(ValueError, match="must hold 2 positions"):
        model(batch, start_positions=inside[:1], end_positions=inside)


def test_regression_labels_of_another_shape_are_refused():
    config = bert.BertConfig(**BERT, num_labels=1)
    model = bert.BertForSequenceClassification(config).eval()
    with pytest.raises(ValueError, match=r"labels must have shape \[2, 1\]"):
        model(pack([[1, 2], [3]]), labels=torch.rand(1))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quantization_config", {"bits": 4}),
        ("pruned_heads", {"0": [1]}),
        ("is_encoder_decoder", True),
        ("chunk_size_feed_forward", 4),
        ("num_hidden_layers", -1),
        ("hidden_size", "16"),
        ("vocab_size", 0),
        ("hidden_act", ["gelu"]),
        ("id2label", ["a", "b"]),
    ],
)
def test_a_config_that_asks_for_more_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        bert.BertModel(bert.BertConfig(**{**BERT, field: value}))


@pytest.mark.parametrize("name", ["attention_mask", "token_type_ids", "position_ids"])
def test_a_list_in_place_of_a_tensor_is_named(name):
    model = bert.BertModel(bert.BertConfig(**BERT)).eval()
    with pytest.raises(TypeError, match=f"{name} must be a tensor, not list"):
        model(torch.ones(1, 3, dtype=torch.long), **{name: [[1, 1, 1]]})
