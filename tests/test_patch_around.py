"""Patched models inside other libraries: PEFT, Trainer, accelerate, sentence-transformers."""

import copy

import pytest
import torch
import transformers
from models import TOLERANCE, needs_minilm
from patching import (
    NO_DROPOUT,
    NO_GPT_DROPOUT,
    assert_close,
    assert_same_gradients,
    assert_same_state,
    bert,
    gpt2,
    gradients,
    inputs_for,
    ragged,
    rows_seen,
)

import bertgpt
from bertgpt import demo_data

ADAPTED = {
    "BertForMaskedLM": (bert, NO_DROPOUT, ["query", "value", "intermediate.dense"]),
    "GPT2LMHeadModel": (gpt2, NO_GPT_DROPOUT, ["c_attn", "c_fc"]),
}


def lora(peft, name, patch):
    torch.manual_seed(0)
    build, still, targets = ADAPTED[name]
    model = build(name, **still)
    if patch == "before":
        bertgpt.patch(model)
    fan = name.startswith("GPT2")
    config = peft.LoraConfig(r=3, target_modules=targets, fan_in_fan_out=fan)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    if patch == "after":
        bertgpt.patch(adapted)
    return adapted


@pytest.mark.parametrize("patch", ["before", "after"])
@pytest.mark.parametrize("name", ADAPTED)
def test_lora_trains_merges_and_saves(name, patch, tmp_path):
    peft = pytest.importorskip("peft")
    stock, ours = lora(peft, name, None), lora(peft, name, patch)
    inputs = inputs_for(name, "left")
    with rows_seen() as seen:
        assert_close(ours(**inputs), stock(**inputs), inputs["attention_mask"])
    assert len(seen[0]) == 1, "adapters take packed tokens"
    assert_same_gradients(gradients(ours.train(), inputs), gradients(stock.train(), inputs))
    for model in (ours, stock):
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert_close(ours(**inputs), stock(**inputs), inputs["attention_mask"])
    ours.save_pretrained(tmp_path)
    build, still, _ = ADAPTED[name]
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(build(name, **still), tmp_path)
    assert_close(loaded(**inputs), stock(**inputs), inputs["attention_mask"])
    merged, expected = ours.eval().merge_and_unload(), stock.eval().merge_and_unload()
    with rows_seen("gelu_ffn") as fused:
        assert_close(merged(**inputs), expected(**inputs), inputs["attention_mask"])
    assert bool(fused) == (name == "BertForMaskedLM"), "plain layers are read again"


class Rows(torch.utils.data.Dataset):
    def __init__(self, count=8):
        generator = torch.Generator().manual_seed(0)
        self.rows = [
            torch.randint(3, 61, (n,), generator=generator).tolist()
            for n in torch.randint(2, 12, (count,), generator=generator)
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": i % 2}


def collate(rows):
    width = max(len(row["input_ids"]) for row in rows)
    pad = [row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows]
    ids = torch.tensor(pad)
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def test_trainer(tmp_path):
    pytest.importorskip("accelerate")
    start = bert("BertForSequenceClassification", **NO_DROPOUT)
    trained = []
    for patch in (False, True):
        model = copy.deepcopy(start)
        if patch:
            bertgpt.patch(model)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / str(patch)),
            per_device_train_batch_size=4,
            max_steps=3,
            learning_rate=0.1,
            optim="sgd",
            gradient_checkpointing=True,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=1,
        )
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=Rows(), data_collator=collate
        )
        trainer.train()
        trainer.save_model()
        loaded = type(start).from_pretrained(tmp_path / str(patch))
        assert_same_state(loaded, model.state_dict())
        trained.append(model.state_dict())
    for name, stock in trained[0].items():
        assert (trained[1][name] - stock).abs().max() <= 1e-3, name


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    model = bert("BertForSequenceClassification", **NO_DROPOUT)
    inputs = inputs_for("SequenceClassification", "right", 2)
    expected = gradients(copy.deepcopy(model).train(), inputs)
    bertgpt.patch(model)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(prepared.train()(**inputs).loss)
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert_same_gradients(ours, expected)
    before = model.classifier.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.classifier.weight, before)


def test_modules_whose_weights_accelerate_brings_are_called():
    accelerate = pytest.importorskip("accelerate")
    model, inputs = bert(), ragged("right")
    stock = model(**inputs)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    report = bertgpt.patch(model)
    assert len(report.skipped) == 4, "two layers of two sub-blocks"
    assert all("its forward is replaced" in item.reason for item in report.skipped)
    assert_close(model(**inputs), stock, inputs["attention_mask"])


@needs_minilm
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_sentence_transformers_encode(pooling):
    library = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    transformer = modules.Transformer(str(demo_data.minilm_folder()), max_seq_length=128)
    width = transformer.auto_model.config.hidden_size
    pool = modules.Pooling(width, pooling_mode=pooling)
    model = library.SentenceTransformer(modules=[transformer, pool], device="cpu")
    texts = [sentence.text for sentence in demo_data.news_sentences(6)]
    stock = model.encode(texts, normalize_embeddings=True)
    report = bertgpt.patch(model)
    assert len(report.replaced) == 7
    with rows_seen() as seen:
        ours = model.encode(texts, normalize_embeddings=True)
    assert all(len(shape) == 1 for shape in seen), "padding was computed"
    assert abs(ours - stock).max() <= TOLERANCE
