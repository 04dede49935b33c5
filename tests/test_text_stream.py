"""Text out of token ids one by one, and stop strings in it, against decoding everything at once."""

import pytest
from models import Letters
from tokenizers import ByteLevelBPETokenizer

from bertgpt.text import StopStrings, TextStream

TEXT = "Grüße aus Köln — 数字 42 🙂🙃 naïve café, façade! The bank raised rates. 🏳️‍🌈 end"


@pytest.fixture(scope="module")
def pairs():
    """Byte-level BPE with few merges, so that most characters beyond ASCII take several tokens."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT, "the cat sat on the mat"], vocab_size=275)
    return tokenizer


@pytest.mark.parametrize("split", [0, 1, 5, 17, 40])
def test_pieces_end_to_end_are_the_text(pairs, split):
    ids = pairs.encode(TEXT).ids
    stream = TextStream(pairs, ids[:split])
    pieces = [stream.push(token) for token in ids[split:]]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces[8:])
    if pairs.decode(ids[:split]) + pairs.decode(ids[split:]) == TEXT:  # not amid a character
        assert "".join(pieces) == TEXT[len(pairs.decode(ids[:split])) :]
    assert stream.pending == ""
    assert pieces.count("") > 5


def test_a_text_that_ends_amid_a_character_has_the_rest_pending(pairs):
    ids = pairs.encode("ok 🙂").ids
    stream = TextStream(pairs)
    shown = "".join(stream.push(token) for token in ids[:-1])
    assert shown + stream.pending == "ok \N{REPLACEMENT CHARACTER}"
    assert shown.strip() == "ok"
    twin = stream.copy()
    assert shown + stream.push(ids[-1]) == "ok 🙂"
    assert twin.push(pairs.encode("!").ids[0]).endswith("!")  # the copy went its own way


@pytest.mark.parametrize(
    "strings",
    ["bank", ["é,", "zzz"], "🙃 na", "🏳️‍🌈", [".", "数"], "s", "The bank raised rates. ", "none"],
)
def test_a_string_is_found_with_the_token_that_completes_it(pairs, strings):
    ids = pairs.encode(TEXT).ids
    wanted = [strings] if isinstance(strings, str) else strings
    detector = StopStrings(pairs, strings)
    for count, token in enumerate(ids, 1):
        found = detector.push(token)
        assert found == any(string in pairs.decode(ids[:count]) for string in wanted)
        if found:
            return
    assert strings == "none"


def test_the_prompts_text_is_not_searched_and_copies_go_apart():
    letters = Letters()
    detector = StopStrings(letters, "abc", context=[49, 50])  # "a", "b"
    assert not detector.push(51)
    for token in (49, 50):
        assert not detector.push(token)
    twin = detector.copy()
    assert not detector.push(52)
    assert not detector.push(51)
    assert twin.push(51)


def test_a_copy_amid_a_character_goes_its_own_way(pairs):
    ids = pairs.encode("ok 🙂").ids
    detector = StopStrings(pairs, "🙂")
    assert not any(detector.push(token) for token in ids[:-1])
    assert not detector.copy().push(pairs.encode("!").ids[0])
    assert detector.push(ids[-1])
