"""RoBERTa, ALBERT, DistilBERT and ERNIE against stock: every head, any padding, packed, trained."""

import pytest
import torch
from families import (
    BODIES,
    CHOICES,
    CONFIGS,
    NAMES,
    NEXT,
    PAIRS,
    SEQUENCES,
    SPANS,
    TOKENS,
    WORDS,
    as_choices,
    beside,
    family_of,
    family_twins,
    padded_inputs,
    targets,
)
from models import TOLERANCE, gradients_by_name, largest_difference, ragged_mask, random_ids

import bertgpt
from bertgpt import pack, unpad

SIDES = ("right", "left", "both", "holes")
POOLED = [*SEQUENCES, *CHOICES, NEXT]


def assert_trains_alike(model, stock, inputs):
    """Equal loss, and the gradient of every weight equal to stock's."""
    losses = [each(**inputs).loss for each in (model, stock)]
    assert largest_difference(*losses) <= TOLERANCE
    for loss in losses:
        loss.backward()
    ours = gradients_by_name(model)
    for name, weight in stock.named_parameters():
        expected = torch.zeros_like(weight) if weight.grad is None else weight.grad
        assert largest_difference(ours[name], expected) <= 1e-3, name


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", [*BODIES, *WORDS, *TOKENS, *PAIRS, *SPANS])
def test_token_outputs_and_hidden_states(name, side):
    model, stock = family_twins(name)
    inputs = padded_inputs(name, side)
    mask = inputs["attention_mask"]
    ours, theirs = (each(**inputs, output_hidden_states=True) for each in (model, stock))
    assert list(ours) == list(theirs)
    first = 2 if name in SPANS else 1
    for a, b in zip(ours.to_tuple()[:first], theirs.to_tuple()[:first], strict=True):
        assert largest_difference(a, b, mask) <= TOLERANCE
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert largest_difference(a, b, mask) <= TOLERANCE
    if side == "right" and len(ours) > first + 1:  # the pooler's output, or scores of it
        assert largest_difference(ours[1], theirs[1]) <= TOLERANCE


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", [*WORDS, *TOKENS])
def test_losses_and_gradients_of_token_heads(name, side):
    model, stock = family_twins(name)
    inputs = padded_inputs(name, side)
    assert_trains_alike(model, stock, {**inputs, **targets(name, inputs["attention_mask"])})


@pytest.mark.parametrize("name", [*POOLED, *PAIRS])
def test_losses_and_gradients_of_pooled_heads(name):
    model, stock = family_twins(name)
    inputs = padded_inputs(name, "right")
    labels = targets(name, inputs["attention_mask"])
    if name in CHOICES:
        inputs = as_choices(inputs)
    field = {"Albert": "sop_logits", "Ernie": "seq_relationship_logits"}.get(family_of(name))
    field = field if name in PAIRS else "logits"
    assert largest_difference(model(**inputs)[field], stock(**inputs)[field]) <= TOLERANCE
    assert_trains_alike(model, stock, {**inputs, **labels})


@pytest.mark.parametrize("side", ["left", "both", "holes"])
@pytest.mark.parametrize("name", SEQUENCES)
def test_scores_of_sequences_are_those_of_their_tokens_alone(name, side):
    """Stock pools column 0, here a padding token: its rows come without padding instead."""
    model, stock = family_twins(name)
    inputs = padded_inputs(name, side)
    mask = inputs.pop("attention_mask")
    columns = torch.arange(12).expand(4, 12)
    if not name.startswith("Roberta"):
        inputs["position_ids"] = columns
    ours = model(**inputs, attention_mask=mask)
    for i, keep in enumerate(mask.bool()):
        row = {key: value[i : i + 1, keep] for key, value in inputs.items()}
        assert largest_difference(ours.logits[i], stock(**row).logits[0]) <= TOLERANCE


@pytest.mark.parametrize("name", SPANS)
def test_losses_and_gradients_of_answers(name):
    """Without padding, whose scores stock's loss counts."""
    model, stock = family_twins(name)
    inputs = {"input_ids": random_ids(4, 12), **beside(name, 4, 12), **targets(name, None)}
    assert_trains_alike(model, stock, inputs)


@pytest.mark.parametrize("name", NAMES)
def test_packed_equals_padded(name):
    model, _ = family_twins(name)
    inputs = padded_inputs(name, "right")
    keep = inputs.pop("attention_mask").bool()
    rows = {key: [r[k] for r, k in zip(v, keep, strict=True)] for key, v in inputs.items()}
    labels = targets(name, keep)
    alone = {key: v[keep] if v.shape == keep.shape else v for key, v in labels.items()}
    choices = {"num_choices": 2} if name in CHOICES else {}
    packed = model(pack(rows.pop("input_ids"), **rows), **alone, **choices)
    inputs["attention_mask"] = keep
    whole = model(**(as_choices(inputs) if name in CHOICES else inputs), **labels)
    assert list(packed) == list(whole)
    for a, b in zip(packed.to_tuple(), whole.to_tuple(), strict=True):
        assert largest_difference(a, b[keep] if b.shape[:2] == keep.shape else b) <= 1e-5


@pytest.mark.parametrize("name", [*WORDS, *PAIRS])
def test_the_loss_alone_is_the_loss(name):
    model, _ = family_twins(name)
    inputs = padded_inputs(name, "both")
    inputs |= targets(name, inputs["attention_mask"])
    alone = model(**inputs, skip_logits=True)
    assert largest_difference(alone.loss, model(**inputs).loss) <= 1e-5
    assert not {"logits", "prediction_logits"} & set(alone)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


DROPS = {
    "Roberta": ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    "Ernie": ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    "Albert": ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob"),
    "DistilBert": ("dropout", "attention_dropout", "seq_classif_dropout", "qa_dropout"),
}


@pytest.mark.parametrize("name", NAMES)
def test_dropout_falls_where_stocks_does(name):
    """At probability 1 nothing is left to chance: what dropout acts on is 0 in both."""
    rates = DROPS[family_of(name)]
    inputs = padded_inputs(name, "right")
    if name in CHOICES:
        inputs = as_choices(inputs)
    for rate in (None, *rates):
        model, stock = family_twins(name, **{each: float(each == rate) for each in rates})
        ours, theirs = (each.train()(**inputs).to_tuple() for each in (model, stock))
        for a, b in zip(ours, theirs, strict=True):
            mask = inputs["attention_mask"] if a.shape[:2] == (4, 12) else None
            assert largest_difference(a, b, mask) <= TOLERANCE, rate


def test_robertas_classifier_drops_before_its_hidden_layer_and_after():
    """At probability 1 the second would hide the first: here is what each of them is given."""
    name = "RobertaForSequenceClassification"
    model, stock = family_twins(name)
    inputs = padded_inputs(name, "right")
    seen = {model: [], stock: []}
    for each, dropout in ((model, model.dropout), (stock, stock.classifier.dropout)):
        dropout.register_forward_hook(lambda _, given, out, each=each: seen[each].append(given[0]))
        each(**inputs)
    assert len(seen[stock]) == 2
    for a, b in zip(seen[model], seen[stock], strict=True):
        assert largest_difference(a, b) <= TOLERANCE


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_have_a_loss_with_both_labels_alone(name):
    model, stock = family_twins(name)
    inputs = padded_inputs(name, "right")
    labels = targets(name, inputs["attention_mask"])
    for label, values in labels.items():
        assert model(**inputs, **{label: values}).loss is None
        assert stock(**inputs, **{label: values}).loss is None
    (label,) = set(labels) - {"labels"}
    with pytest.raises(TypeError, match=f"{label} must be int32 or int64"):
        model(**inputs, **{**labels, label: labels[label].float()})


@pytest.mark.parametrize("name", BODIES)
def test_embeddings_and_positions_given(name):
    model, stock = family_twins(name)
    width = 10 if name.startswith("Albert") else 21
    for more in ({}, {"position_ids": torch.tensor([[4, 3, 9, 1, 0]])}):
        inputs = {"inputs_embeds": torch.randn(2, 5, width), **more, **beside(name, 2, 5)}
        assert largest_difference(model(**inputs)[0], stock(**inputs)[0]) <= TOLERANCE
        inputs["input_ids"], inputs["inputs_embeds"] = random_ids(2, 5), None
        assert largest_difference(model(**inputs)[0], stock(**inputs)[0]) <= TOLERANCE


def test_roberta_counts_past_its_padding_token():
    model, stock = family_twins("RobertaModel")
    ids = random_ids(4, 12)
    ids[torch.rand(4, 12) < 0.4] = 2  # padding tokens, attended and not
    for mask in (torch.ones_like(ids), ragged_mask("holes"), ragged_mask("left")):
        ours = model(ids, attention_mask=mask)
        assert largest_difference(ours[0], stock(ids, attention_mask=mask)[0], mask) <= TOLERANCE
    packed = model(pack([*ids, []]))
    assert largest_difference(packed[0].view(4, 12, -1), stock(ids)[0]) <= TOLERANCE
    assert largest_difference(model(ids)[0], stock(ids)[0]) <= TOLERANCE
    embeds = torch.randn(4, 12, 21)
    packed = model(unpad(embeds, torch.ones_like(ids)))
    assert largest_difference(packed[0], stock(inputs_embeds=embeds)[0]) <= TOLERANCE
    model(ids)[0].sum().backward()
    table = model.embeddings.position_embeddings.weight.grad
    assert table[2].eq(0).all()
    assert table[3].abs().max() > 0


def test_robertas_longest_sequence_leaves_out_the_padding_tokens_places():
    model, stock = family_twins("RobertaModel")
    ids = random_ids(1, 17)
    assert largest_difference(model(ids)[0], stock(ids)[0]) <= TOLERANCE
    long = random_ids(1, 18)
    for inputs in ({"input_ids": long}, {"input_ids": pack([*long])},
                   {"inputs_embeds": torch.randn(1, 18, 21)}):  # fmt: skip
        with pytest.raises(ValueError, match=r"sequence of 18 tokens .* position table, 17"):
            model(**inputs)
    long[0, 5] = 2  # which takes no place
    assert largest_difference(model(long)[0], stock(long)[0]) <= TOLERANCE
    with pytest.raises(IndexError, match="position_ids holds 20"):
        model(ids, position_ids=torch.full_like(ids, 20))


def test_nothing_is_read_back_from_the_device_inside():
    """On meta tensors any device-to-host copy raises: a stand-in for a host sync on a GPU."""
    for name in WORDS:
        config = getattr(bertgpt, f"{family_of(name)}Config")(**CONFIGS[family_of(name)])
        model = getattr(bertgpt, name)(config).to("meta").eval()
        assert model(pack([[5, 6, 7], [8]]).to("meta")).logits.shape == (4, 61)


@pytest.mark.parametrize("name", BODIES)
def test_a_packed_batch_goes_through_one_compiled_graph(name):
    model, _ = family_twins(name)
    batch = pack([[5, 6, 2, 7], [8, 9]])
    whole = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        found = whole(batch)[0]  # the first that sees the batch
        assert largest_difference(found, model(batch)[0]) <= 1e-6


@pytest.mark.parametrize("name", WORDS)
def test_gradient_checkpointing_changes_no_bit(name):
    model, _ = family_twins(name)
    inputs = padded_inputs(name, "right")
    inputs |= targets(name, inputs["attention_mask"])
    gradients = []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        model.train().zero_grad()
        model(**inputs).loss.backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))


def test_albert_shares_layers_by_turns():
    model, _ = family_twins("AlbertModel")
    order = [list(model.layers).index(layer) for layer in model.passes()]
    assert order == [0, 1, 0, 1, 0, 1, 2, 3, 2, 3]


def test_types_that_a_model_has_no_table_for_are_named():
    distilbert, _ = family_twins("DistilBertModel")
    with pytest.raises(ValueError, match="token_type_ids: this model has no embeddings for them"):
        distilbert(pack([[5, 6]], token_type_ids=[[0, 1]]))
    plain, _ = family_twins("ErnieModel", use_task_id=False)
    ids = random_ids(1, 3)
    with pytest.raises(ValueError, match="task_type_ids: this model has no embeddings for them"):
        plain(ids, task_type_ids=torch.zeros_like(ids))
    ernie, _ = family_twins("ErnieModel")
    with pytest.raises(IndexError, match="task_type_ids holds 4, outside 0 … 3"):
        ernie(ids, task_type_ids=torch.full_like(ids, 4))
    with pytest.raises(ValueError, match="task_type_ids must broadcast"):
        ernie(ids, task_type_ids=torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="task_type_ids has lengths"):
        pack([[1, 2]], task_type_ids=[[1]])
    with pytest.raises(ValueError, match="task_type_ids beside a PackedBatch"):
        ernie(pack([[5, 6]]), task_type_ids=ids)


@pytest.mark.parametrize("name", ["RobertaModel", "ErnieModel", "RobertaForMaskedLM"])
@pytest.mark.parametrize("argument", ["encoder_hidden_states", "encoder_attention_mask"])
def test_cross_attention_is_named(name, argument):
    model, _ = family_twins(name)
    with pytest.raises(ValueError, match=argument):
        model(random_ids(1, 3), **{argument: torch.ones(1)})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("RobertaModel", {"hidden_act": "relu"}),
        ("RobertaModel", {"position_embedding_type": "relative_key"}),
        ("RobertaModel", {"is_decoder": True}),
        ("RobertaModel", {"add_cross_attention": True}),
        ("RobertaModel", {"pad_token_id": None}),
        ("RobertaModel", {"pad_token_id": -1}),
        ("RobertaModel", {"pad_token_id": 20}),
        ("RobertaForQuestionAnswering", {"num_labels": 3}),
        ("AlbertModel", {"hidden_act": "silu"}),
        ("AlbertModel", {"is_decoder": True}),
        ("AlbertModel", {"num_hidden_groups": 0}),
        ("AlbertModel", {"inner_group_num": -1}),
        ("AlbertModel", {"embedding_size": 0}),
        ("AlbertModel", {"pad_token_id": 61}),
        ("AlbertForPreTraining", {"num_labels": 3}),
        ("DistilBertModel", {"activation": "relu"}),
        ("DistilBertModel", {"dropout": 1.5}),
        ("DistilBertModel", {"sinusoidal_pos_embds": True}),
        ("DistilBertModel", {"n_layers": -1}),
        ("DistilBertModel", {"output_attentions": True}),
        ("ErnieModel", {"use_task_id": "yes"}),
        ("ErnieModel", {"task_type_vocab_size": 0}),
        ("ErnieModel", {"is_decoder": True}),
    ],
)
def test_configs_that_ask_for_more_are_refused_by_name(name, values):
    model_class = getattr(bertgpt, name)
    config = model_class.config_class(**{**CONFIGS[family_of(name)], **values})
    field = next(iter(values))
    with pytest.raises(ValueError, match=f"^{'num_labels' if 'labels' in field else field}="):
        model_class(config)


def test_a_model_wants_its_own_familys_config():
    for name in BODIES:
        with pytest.raises(TypeError, match=f"{name} takes a {family_of(name)}Config, not Bert"):
            getattr(bertgpt, name)(bertgpt.BertConfig())
    with pytest.raises(TypeError, match="BertModel takes a BertConfig, not RobertaConfig"):
        bertgpt.BertModel(bertgpt.RobertaConfig())
