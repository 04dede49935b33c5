"""The random bits as the reference defines them.

The one implementation lives in `bertgpt.philox`, below reference and portable alike, because those
two may not import each other. `docs/dropout.md` is the written definition.
"""

from bertgpt.philox import keep_attention, keep_rows, philox_words, sample_words

__all__ = ["keep_attention", "keep_rows", "philox_words", "sample_words"]
