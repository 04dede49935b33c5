"""bertgpt: fused attention, GELU FFN and paged decoding kernels for BERT and GPT-2.

Names are imported at their first use: `import bertgpt` needs neither triton, transformers nor a
GPU.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# An uninstalled checkout keeps the kernels beside this package: there, `bertgpt.kernels` is found
# through the repository's root. (A top-level `kernels` must never exist, see docs/decisions.md.)
if not (Path(__file__).parent / "kernels").exists():
    __path__.append(str(Path(__file__).resolve().parent.parent))

_EXPORTS = {
    "BackendUnavailable": "bertgpt.ops",
    "strict": "bertgpt.ops",
    "PackedBatch": "bertgpt.packing",
    "pack": "bertgpt.packing",
    "pad": "bertgpt.packing",
    "unpad": "bertgpt.packing",
    "BertConfig": "bertgpt.bert",
    "BertModel": "bertgpt.bert",
    "BertForMaskedLM": "bertgpt.bert",
    "BertForNextSentencePrediction": "bertgpt.bert",
    "BertForPreTraining": "bertgpt.bert",
    "BertForSequenceClassification": "bertgpt.bert",
    "BertForTokenClassification": "bertgpt.bert",
    "BertForQuestionAnswering": "bertgpt.bert",
    "BertForMultipleChoice": "bertgpt.bert",
    "RobertaConfig": "bertgpt.roberta",
    "XLMRobertaConfig": "bertgpt.roberta",
    "CamembertConfig": "bertgpt.roberta",
    "RobertaModel": "bertgpt.roberta",
    "RobertaForMaskedLM": "bertgpt.roberta",
    "RobertaForSequenceClassification": "bertgpt.roberta",
    "RobertaForTokenClassification": "bertgpt.roberta",
    "RobertaForQuestionAnswering": "bertgpt.roberta",
    "RobertaForMultipleChoice": "bertgpt.roberta",
    "AlbertConfig": "bertgpt.albert",
    "AlbertModel": "bertgpt.albert",
    "AlbertForMaskedLM": "bertgpt.albert",
    "AlbertForPreTraining": "bertgpt.albert",
    "AlbertForSequenceClassification": "bertgpt.albert",
    "AlbertForTokenClassification": "bertgpt.albert",
    "AlbertForQuestionAnswering": "bertgpt.albert",
    "AlbertForMultipleChoice": "bertgpt.albert",
    "DistilBertConfig": "bertgpt.distilbert",
    "DistilBertModel": "bertgpt.distilbert",
    "DistilBertForMaskedLM": "bertgpt.distilbert",
    "DistilBertForSequenceClassification": "bertgpt.distilbert",
    "DistilBertForTokenClassification": "bertgpt.distilbert",
    "DistilBertForQuestionAnswering": "bertgpt.distilbert",
    "DistilBertForMultipleChoice": "bertgpt.distilbert",
    "ErnieConfig": "bertgpt.ernie",
    "ErnieModel": "bertgpt.ernie",
    "ErnieForMaskedLM": "bertgpt.ernie",
    "ErnieForNextSentencePrediction": "bertgpt.ernie",
    "ErnieForPreTraining": "bertgpt.ernie",
    "ErnieForSequenceClassification": "bertgpt.ernie",
    "ErnieForTokenClassification": "bertgpt.ernie",
    "ErnieForQuestionAnswering": "bertgpt.ernie",
    "ErnieForMultipleChoice": "bertgpt.ernie",
    "SentenceEncoder": "bertgpt.embedding",
    "GPT2Config": "bertgpt.gpt",
    "GPT2Model": "bertgpt.gpt",
    "GPT2LMHeadModel": "bertgpt.gpt",
    "GPT2ForSequenceClassification": "bertgpt.gpt",
    "OpenAIGPTConfig": "bertgpt.openai_gpt",
    "OpenAIGPTModel": "bertgpt.openai_gpt",
    "OpenAIGPTLMHeadModel": "bertgpt.openai_gpt",
    "GPTNeoConfig": "bertgpt.gpt_neo",
    "GPTNeoModel": "bertgpt.gpt_neo",
    "GPTNeoForCausalLM": "bertgpt.gpt_neo",
    "tensor_parallel": "bertgpt.parallel",
    "PagedKVCache": "bertgpt.kv_cache",
    "OutOfPages": "bertgpt.kv_cache",
    "DecodeBatch": "bertgpt.decode_batch",
    "Engine": "bertgpt.engine",
    "DeadlineExceeded": "bertgpt.engine",
    "SamplingOptions": "bertgpt.sampling",
    "patch": "bertgpt.integrations.transformers",
    "unpatch": "bertgpt.integrations.transformers",
    "register": "bertgpt.integrations.transformers",
    "PatchReport": "bertgpt.integrations.transformers",
}
_MODULES = ("ops", "reference", "kernels")

__all__ = ["__version__", *_EXPORTS, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
