"""GPT-2 against stock transformers: real checkpoint, both heads, any padding, packed."""

import pytest
import torch
import transformers
from models import (
    GPT2,
    TOLERANCE,
    genera_ids,
    largest_difference,
    needs_genera,
    padded,
    ragged_mask,
    random_ids,
    twins,
)

from bertgpt import demo_data, gpt, pack

SIDES = ("right", "left", "both", "holes")
IDS = torch.ones(2, 4, dtype=torch.long)


@needs_genera
@pytest.mark.parametrize("side", ["right", "left"])
def test_real_checkpoint_on_real_sequences(side):
    folder = demo_data.genus_model().folder
    model = gpt.GPT2LMHeadModel.from_pretrained(folder)
    stock = transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager")
    ids, mask = padded(genera_ids(), side)
    with torch.no_grad():
        theirs = stock.eval()(ids, attention_mask=mask, output_hidden_states=True)
        ours = model(ids, attention_mask=mask, output_hidden_states=True)
    assert largest_difference(ours.logits, theirs.logits, mask) <= TOLERANCE
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    assert largest_difference(ours.hidden_states[-1], theirs.hidden_states[-1], mask) <= TOLERANCE
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        # Below the last norm the residual stream reaches 1,200, where float32 steps by 1.2e-4.
        assert largest_difference(a, b, mask) <= max(TOLERANCE, 2**-21 * b.abs().max().item())


@pytest.mark.parametrize("side", SIDES)
def test_logits_hidden_states_and_loss(side):
    model, stock = twins(gpt, "GPT2LMHeadModel", GPT2)
    ids, mask = random_ids(4, 12), ragged_mask(side)
    theirs = stock(ids, attention_mask=mask, output_hidden_states=True)
    ours = model(ids, attention_mask=mask, output_hidden_states=True)
    assert largest_difference(ours.logits, theirs.logits, mask) <= TOLERANCE
    assert ours.logits[mask == 0].abs().max() == 0
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert largest_difference(a, b, mask) <= TOLERANCE
    if side == "right":  # elsewhere stock scores tokens after padding, which is no context
        labels = ids.masked_fill(mask == 0, -100)
        theirs, ours = (m(ids, attention_mask=mask, labels=labels).loss for m in (stock, model))
        assert largest_difference(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize(
    "values",
    [
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"reorder_and_upcast_attn": True},
        {"n_inner": 17},
        {"activation_function": "gelu"},
        {"activation_function": "gelu_pytorch_tanh"},
        {"layer_norm_epsilon": 0.1},
        {"tie_word_embeddings": False},
    ],
    ids=str,
)
def test_configurations(values):
    model, stock = twins(gpt, "GPT2LMHeadModel", GPT2, **values)
    ids = random_ids(2, 9)
    assert largest_difference(model(ids).logits, stock(ids).logits) <= TOLERANCE


def test_token_types_embeddings_and_positions():
    model, stock = twins(gpt, "GPT2Model", GPT2)
    ids, types, places = random_ids(2, 5), random_ids(2, 5), torch.tensor([[4, 3, 2, 1, 0]])
    inputs = {"input_ids": ids, "token_type_ids": types, "position_ids": places}
    assert largest_difference(model(**inputs)[0], stock(**inputs)[0]) <= TOLERANCE
    embeds = torch.randn(2, 5, 24)
    ours, theirs = model(inputs_embeds=embeds)[0], stock(inputs_embeds=embeds)[0]
    assert largest_difference(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 2])], ids=str)
def test_logits_to_keep(keep):
    model, stock = twins(gpt, "GPT2LMHeadModel", GPT2)
    ids = random_ids(2, 6)
    ours, theirs = (each(ids, logits_to_keep=keep).logits for each in (model, stock))
    assert ours.shape == theirs.shape
    assert largest_difference(ours, theirs) <= TOLERANCE
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(pack([[3]]), logits_to_keep=keep)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("num_labels", [1, 3])
def test_classification_reads_the_last_real_token(side, num_labels):
    name = "GPT2ForSequenceClassification"
    model, stock = twins(gpt, name, GPT2, num_labels=num_labels, pad_token_id=0)
    mask = ragged_mask(side)
    ids = random_ids(4, 12) * mask
    labels = torch.rand(4) if num_labels == 1 else torch.tensor([0, 2, 1, 0])
    theirs = stock(ids, attention_mask=mask, labels=labels)
    ours = model(ids, attention_mask=mask, labels=labels)
    assert largest_difference(ours.logits, theirs.logits) <= TOLERANCE
    assert largest_difference(ours.loss, theirs.loss) <= TOLERANCE
    if side == "right":
        rows = [row[keep] for row, keep in zip(ids, mask.bool(), strict=True)]
        assert largest_difference(model(pack(rows)).logits, theirs.logits) <= TOLERANCE


def test_classification_skips_padding_tokens_that_no_mask_hides():
    model, stock = twins(gpt, "GPT2ForSequenceClassification", GPT2, pad_token_id=0)
    ids = random_ids(4, 12) * ragged_mask("right", (7, 0, 12, 4))  # one row of padding only
    assert largest_difference(model(ids).logits, stock(ids).logits) <= TOLERANCE


def test_classification_without_a_padding_token():
    model, stock = twins(gpt, "GPT2ForSequenceClassification", GPT2, pad_token_id=None)
    ids = random_ids(3, 5)
    one = stock(ids[:1]).logits
    assert largest_difference(model(ids[:1]).logits, one) <= TOLERANCE
    with pytest.raises(ValueError, match="pad_token_id"):
        model(ids)
    scores = model(pack([ids[0], [], ids[0, :2]])).logits
    assert largest_difference(scores[0], one[0]) <= TOLERANCE
    assert scores[1].abs().max() == 0


def test_packed_equals_padded():
    model, _ = twins(gpt, "GPT2LMHeadModel", GPT2)
    ids, keep = random_ids(4, 12), ragged_mask("right").bool()
    labels = random_ids(4, 12).masked_fill(~keep, -100)
    rows = [row[k] for row, k in zip(ids, keep, strict=True)]
    whole = model(ids, attention_mask=keep, labels=labels)
    packed = model(pack(rows), labels=labels[keep])
    assert largest_difference(packed.logits, whole.logits[keep]) <= 1e-5
    assert largest_difference(packed.loss, whole.loss) <= 1e-5
    with_empty = model(pack([[], *rows, []]), labels=labels[keep])
    assert largest_difference(with_empty.loss, whole.loss) <= 1e-5


def test_gradients_are_stocks():
    model, stock = twins(gpt, "GPT2LMHeadModel", GPT2)
    ids = random_ids(3, 8)
    for each in (model, stock):
        each(ids, labels=ids).loss.backward()
    expected = {name: p.grad for name, p in stock.named_parameters()}
    block = model.transformer.layers[1]
    theirs = "transformer.h.1."
    pairs = [
        (block.attention.qkv.weight, f"{theirs}attn.c_attn.weight"),
        (block.feed_forward.outer.weight, f"{theirs}mlp.c_proj.weight"),
        (block.norm_1.weight, f"{theirs}ln_1.weight"),
        (model.get_input_embeddings().weight, "transformer.wte.weight"),
    ]
    for ours, name in pairs:
        gradient = ours.grad.t() if "c_" in name else ours.grad
        assert largest_difference(gradient, expected[name]) <= 1e-5


@pytest.mark.parametrize("rate", ["resid_pdrop", "embd_pdrop", "attn_pdrop"])
def test_dropout_applies_in_training_only(rate):
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, rate: 0.5}
    model = gpt.GPT2Model(gpt.GPT2Config(**GPT2, **rates))
    ids = random_ids(2, 9)
    assert not model.train()(ids)[0].equal(model(ids)[0])
    assert model.eval()(ids)[0].equal(model(ids)[0])


def test_residual_dropout_leaves_the_first_layers_input_alone():
    config = gpt.GPT2Config(**GPT2, resid_pdrop=0.5, embd_pdrop=0.0, attn_pdrop=0.0)
    model, seen = gpt.GPT2Model(config).train(), []
    for layer in model.layers:
        layer.attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ids = random_ids(2, 9)
    model(ids)
    model(ids)
    assert seen[0].equal(seen[2])
    assert not seen[1].equal(seen[3])


def test_residual_projections_start_smaller():
    config = gpt.GPT2Config(**{**GPT2, "n_embd": 192, "n_layer": 8})
    state = gpt.GPT2Model(config).state_dict()
    assert state["h.3.attn.c_attn.weight"].std().item() == pytest.approx(0.3, rel=0.05)
    assert state["h.3.attn.c_proj.weight"].std().item() == pytest.approx(0.3 / 4, rel=0.05)
    assert state["h.3.mlp.c_proj.weight"].std().item() == pytest.approx(0.3 / 4, rel=0.05)


def test_nothing_is_read_back_from_the_device_inside():
    """On meta tensors any device-to-host copy raises: a stand-in for a host sync on a GPU."""
    batch = pack([[5, 6, 7], [8]]).to("meta")
    config = gpt.GPT2Config(**GPT2, pad_token_id=0)
    model = gpt.GPT2LMHeadModel(config).to("meta").eval()
    assert model(batch, labels=batch.values).logits.shape == (4, 61)
    classifier = gpt.GPT2ForSequenceClassification(config).to("meta").eval()
    labels = torch.ones(2, dtype=torch.long, device="meta")
    assert classifier(batch, labels=labels).logits.shape == (2, 2)


def test_aliases_of_the_configuration():
    config = gpt.GPT2Config(hidden_size=32, num_hidden_layers=3, n_head=4)
    assert (config.n_embd, config.n_layer, config.num_attention_heads) == (32, 3, 4)
    config.max_position_embeddings = 7
    assert config.to_dict()["n_positions"] == 7


@pytest.mark.parametrize(
    ("error", "message", "inputs"),
    [
        (IndexError, "input_ids holds 61", {"input_ids": IDS * 61}),
        (IndexError, "token_type_ids holds 61", {"input_ids": IDS, "token_type_ids": IDS * 61}),
        (IndexError, "position_ids holds 24", {"input_ids": IDS, "position_ids": IDS * 24}),
        (ValueError, "25 tokens", {"input_ids": torch.ones(1, 25, dtype=torch.long)}),
        (ValueError, "generate", {"input_ids": IDS, "use_cache": True}),
        (ValueError, "past_key_values.*generate", {"input_ids": IDS, "past_key_values": ()}),
        (ValueError, "output_attentions", {"input_ids": IDS, "output_attentions": True}),
        (ValueError, "encoder_hidden", {"input_ids": IDS, "encoder_hidden_states": IDS}),
        (ValueError, "4-D", {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 4, 4)}),
        (ValueError, "labels", {"input_ids": IDS, "labels": IDS[:, :3]}),
        (IndexError, "labels holds 61", {"input_ids": IDS, "labels": IDS * 61}),
        (IndexError, "labels holds -1", {"input_ids": IDS, "labels": -IDS}),
        (TypeError, "labels must be int", {"input_ids": IDS, "labels": IDS.float()}),
    ],
)
def test_bad_input_is_named(error, message, inputs):
    model = gpt.GPT2LMHeadModel(gpt.GPT2Config(**GPT2))
    with pytest.raises(error, match=message):
        model(**inputs)
    assert model(IDS, use_cache=False).logits.shape == (2, 4, 61)


@pytest.mark.parametrize(
    "values", [{"activation_function": "silu"}, {"add_cross_attention": True}, {"n_head": 5}]
)
def test_configs_that_ask_for_more_are_refused_by_name(values):
    field = next(iter(values)).replace("n_head", "num_attention_heads")
    with pytest.raises(ValueError, match=field):
        gpt.GPT2Model(gpt.GPT2Config(**{**GPT2, **values}))
