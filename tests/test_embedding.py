"""`SentenceEncoder`: vectors in the order of the texts, whatever shared a batch with them."""

import pytest
import torch
from tolerance import assert_bitwise

import bertgpt
from bertgpt import BertConfig, BertModel, SentenceEncoder, embedding

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "bank", "raised", "rates", "goal"]
TEXTS = ["a bank raised rates", "", "goal", "a goal a goal a goal", "rates"]


@pytest.fixture
def encoder(tmp_path) -> SentenceEncoder:
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=12, initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return SentenceEncoder.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("most", [1, 6, 8192])
def test_vectors_come_in_the_order_of_the_texts(encoder, monkeypatch, most, capsys):
    monkeypatch.setattr(embedding, "_TOKENS_PER_BATCH", most)
    vectors = encoder.encode(TEXTS, progress=True)
    assert vectors.dtype == torch.float32
    assert vectors.shape == (len(TEXTS), 8)
    for text, vector in zip(TEXTS, vectors, strict=True):
        torch.testing.assert_close(vector, encoder.encode(text), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(TEXTS)))
    assert capsys.readouterr().out == ""  # progress goes to stderr


def test_no_text_gives_no_vector(encoder):
    assert encoder.encode([]).shape == (0, 8)


def test_vectors_are_those_of_the_model_by_hand(encoder):
    ids = torch.tensor(encoder.tokenize(TEXTS[:1]))
    assert ids.tolist() == [[2, 4, 5, 6, 7, 3]]
    with torch.no_grad():
        states = encoder.model(ids, return_dict=True).last_hidden_state[0]
    mean = states.mean(0)
    torch.testing.assert_close(encoder.encode(TEXTS[:1])[0], mean / mean.norm())


def test_training_through_the_pooling_reaches_the_weights(encoder):
    batch = bertgpt.pack(encoder.tokenize(TEXTS))
    vectors = encoder.pool(encoder.model(batch, return_dict=True).last_hidden_state, batch)
    (vectors[0] @ vectors[2]).backward()
    assert encoder.model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_a_text_that_is_none_is_named(encoder):
    with pytest.raises(TypeError, match="text 1 is no string but NoneType"):
        encoder.encode(["a", None])


def test_a_tokenizer_of_another_model_is_named(encoder, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS, "one more"]) + "\n")
    with pytest.raises(ValueError, match="its tokenizer has 10 tokens, but its model embeds 9"):
        SentenceEncoder.from_pretrained(tmp_path)


def test_a_repeat_gives_the_same_bits(encoder):
    assert_bitwise(encoder.encode(TEXTS), encoder.encode(TEXTS))
