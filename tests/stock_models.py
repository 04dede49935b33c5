"""What `stock_suite.py` runs: transformers' common model tests over BERT's and GPT-2's classes."""

import functools
import os
import unittest

import torch
import transformers
from tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask

import bertgpt
from bertgpt.integrations.blocks import Patched

PATCHED = bool(os.environ.get("BERTGPT_PATCHED"))
BERT = [
    getattr(transformers, f"Bert{name}")
    for name in (
        "Model",
        "ForMaskedLM",
        "ForNextSentencePrediction",
        "ForPreTraining",
        "ForQuestionAnswering",
        "ForSequenceClassification",
        "ForTokenClassification",
    )
]
GPT2 = [
    getattr(transformers, f"GPT2{name}")
    for name in (
        "Model",
        "LMHeadModel",
        "ForQuestionAnswering",
        "ForSequenceClassification",
        "ForTokenClassification",
    )
]


def patch_when_built(model_class):
    """Every instance is patched at the end of its constructor."""
    build = model_class.__init__

    @functools.wraps(build)
    def built(self, *args, **kwargs):
        build(self, *args, **kwargs)
        if type(self) is model_class:
            bertgpt.patch(self)

    model_class.__init__ = built


if PATCHED:
    for each in (*BERT, *GPT2):
        patch_when_built(each)


class Small:
    """The sizes that the common tests ask for."""

    is_training, batch_size, seq_length = True, 13, 7
    hidden_size, num_hidden_layers, num_attention_heads, num_labels = 32, 2, 4, 2

    def __init__(self, config):
        self.config = config

    def get_config(self):
        return self.config

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        return self.config, {
            "input_ids": ids_tensor(shape, 97),
            "attention_mask": random_attention_mask(shape),
        }


class BertModels(ModelTesterMixin, unittest.TestCase):
    all_model_classes = BERT

    def setUp(self):
        self.model_tester = Small(
            transformers.BertConfig(
                vocab_size=99,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=37,
            )
        )

    def _prepare_for_class(self, inputs, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs, model_class, return_labels=return_labels)
        if return_labels and model_class is transformers.BertForPreTraining:
            inputs["labels"] = torch.zeros(13, 7, dtype=torch.long)
            inputs["next_sentence_label"] = torch.zeros(13, dtype=torch.long)
        return inputs


class GPT2Models(ModelTesterMixin, unittest.TestCase):
    all_model_classes = GPT2

    def setUp(self):
        ids = {"bos_token_id": 98, "eos_token_id": 98, "pad_token_id": 98}
        self.model_tester = Small(
            transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, **ids)
        )

    def test_generation_tester_mixin_inheritance(self):
        self.skipTest("the tests of generation are not in the source distribution")


class Patching(unittest.TestCase):
    def test_the_models_are_patched(self):
        for tester, model_class in ((BertModels, BERT[1]), (GPT2Models, GPT2[1])):
            case = tester("setUp")
            case.setUp()
            model = model_class(case.model_tester.config)
            count = sum(isinstance(module, Patched) for module in model.modules())
            assert count == (3 if PATCHED else 0)


del ModelTesterMixin
