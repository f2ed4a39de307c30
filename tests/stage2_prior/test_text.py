"""Captions to ids and back, in any Unicode; captions that are too long; saving."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stage2_prior import TextConfig, TextTokenizer

CAPTIONS = [
    "a small red circle",
    "two blue squares above a star",
    "a large green triangle left of a red circle",
] * 4
TEXT = TextTokenizer.train(CAPTIONS, vocab_size=320, length=40)


def test_rows_hold_start_tokens_end_pads():
    ids = TEXT.encode(["a red circle", ""])
    assert ids.shape == (2, 40)
    assert ids[1].tolist() == [TEXT.start_id, TEXT.end_id] + [TEXT.pad_id] * 38
    row = ids[0].tolist()
    assert (
        row[0] == TEXT.start_id
        and row.count(TEXT.end_id) == 1
        and set(row[row.index(TEXT.end_id) + 1 :]) == {TEXT.pad_id}
    )


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=9))
def test_any_unicode_can_be_encoded(text):
    ids = TEXT.encode([text])
    assert int(ids.max()) < TEXT.vocab_size


@pytest.mark.parametrize("caption", ["\ud800", "a red \udcff heart"])
def test_captions_that_are_not_utf_8_are_refused(caption):
    """Python gives bytes of an argument that are not UTF-8 as surrogates."""
    for use in (TEXT.encode, TEXT.lengths, TEXT.token_ids):
        with pytest.raises(ValueError, match=r"the caption '.*\\ud.* is not UTF-8"):
            use(["a star", caption])


@pytest.mark.parametrize("caption", ["a small red circle", "étoile bleue", "赤い円", "🌞 sun"])
def test_round_trip(caption):
    assert TEXT.decode(TEXT.encode([caption])) == [caption]


def test_case_does_not_matter():
    assert TEXT.encode(["A Red CIRCLE"]).equal(TEXT.encode(["a red circle"]))


def test_long_caption_is_refused_or_truncated():
    long = "q" * 60
    with pytest.raises(ValueError, match=r"needs 6\d tokens and there are 40 text slots"):
        TEXT.encode([long])
    assert TEXT.encode([long], truncate=True)[0, -1] == TEXT.end_id
    assert TEXT.lengths([long])[0] > 40 >= TEXT.lengths(["a red circle"])[0]


def test_the_name_of_a_special_token_is_plain_text():
    for name in ("<end>", "<pad>", "<start>"):
        ids = TEXT.encode([f"a {name} circle"])[0, 1:].tolist()
        assert ids.count(TEXT.end_id) == 1 and TEXT.start_id not in ids
        assert ids.index(TEXT.end_id) > 3 and set(ids[ids.index(TEXT.end_id) + 1 :]) <= {
            TEXT.pad_id
        }
        assert TEXT.decode(TEXT.encode([f"a {name} circle"])) == [f"a {name} circle"]


def test_saved_equals_trained(tmp_path):
    TEXT.save(tmp_path)
    again = TextTokenizer.load(tmp_path)
    assert again.encode(CAPTIONS).equal(TEXT.encode(CAPTIONS))
    assert (again.vocab_size, again.length) == (TEXT.vocab_size, TEXT.length)


def test_a_folder_can_serve_as_pretrained_tokenizer(tmp_path):
    TEXT.fast.save_pretrained(tmp_path)
    assert (
        TextTokenizer.pretrained(str(tmp_path), length=40)
        .encode(CAPTIONS)
        .equal(TEXT.encode(CAPTIONS))
    )


def test_a_tokenizer_without_special_tokens_gets_distinct_ones():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "cat": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    text = TextTokenizer.from_fast(
        PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[UNK]", eos_token="[UNK]"), 5
    )
    assert len({text.pad_id, text.start_id, text.end_id}) == 3
    assert text.encode(["a cat"]).tolist() == [[text.start_id, 0, 1, text.end_id, text.pad_id]]


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(ValueError, match="not a whole text tokenizer"):
        TextTokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="cannot be loaded as a transformers tokenizer"):
        TextTokenizer.pretrained(str(tmp_path / "nothing"), length=9)


def test_configuration_errors_are_all_named():
    with pytest.raises(ValueError, match=r"(?s)text\.vocab_size is 10.*text\.max_length is 2"):
        TextConfig(vocab_size=10, max_length=2)


@pytest.fixture
def bpe():
    captions = [
        "a red circle left of a blue square",
        "two large green stars on a white background",
        "Café über 漢字 🌞 <end>",
    ]
    return TextTokenizer.train(captions * 5, vocab_size=360, length=60), captions


def test_zero_dropout_gives_the_librarys_ids(bpe):
    text, captions = bpe
    random = np.random.default_rng(0)
    more = [*captions, "", "zxqv  red\tcircles!", "squared starlight"]
    assert torch.equal(text.encode_with_dropout(more, 0.0, random), text.encode(more))


def test_bpe_dropout_is_seeded_and_keeps_the_words(bpe):
    text, captions = bpe
    plain = text.encode(captions)
    dropped = text.encode_with_dropout(captions, 0.4, np.random.default_rng(1))
    assert text.decode(dropped) == text.decode(plain)
    assert ((dropped != text.pad_id).sum(1) > (plain != text.pad_id).sum(1)).all()
    assert torch.equal(dropped, text.encode_with_dropout(captions, 0.4, np.random.default_rng(1)))
    assert not torch.equal(
        dropped, text.encode_with_dropout(captions, 0.4, np.random.default_rng(2))
    )


def test_caption_that_dropout_makes_too_long_is_not_dropped(bpe):
    text, captions = bpe
    text.length = 14
    whole = text.encode(captions[:1])
    assert torch.equal(
        text.encode_with_dropout(captions[:1], 0.99, np.random.default_rng(1)), whole
    )


def test_bpe_dropout_requires_merges(bpe):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    text = TextTokenizer.from_fast(PreTrainedTokenizerFast(tokenizer_object=words), 9)
    with pytest.raises(
        ValueError, match="needs a byte-level BPE tokenizer, and this one is WordLevel"
    ):
        text.encode_with_dropout(["a"], 0.1, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"text\.bpe_dropout is 1"):
        TextConfig(bpe_dropout=1)
