"""Which tokenizer.json is believed: those of published tokenizers, and none that can abort the
process."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.attack_bundles import TEXT_CHANGES, ask_for_code
from stage2_prior import TextTokenizer
from stage2_prior.text import END
from stage2_prior.text_checks import build_tokenizer

CAPTIONS = ["a red heart", "two blue stars"]
TEXT = TextTokenizer.train(CAPTIONS, vocab_size=300, length=20)
HARMLESS = {"padding", "truncation", "template"}
"""Of the changes that the generator has, those of parts that are left out."""


@pytest.fixture
def folder(tmp_path) -> Path:
    TEXT.save(tmp_path)
    (tmp_path / "text.json").write_text('{"length": 20}')
    return tmp_path


@pytest.mark.parametrize("name", TEXT_CHANGES)
def test_parts_that_could_abort_the_process_are_refused(folder, name):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | TEXT_CHANGES[name]))
    if name in HARMLESS:
        assert TextTokenizer.load(folder).encode(CAPTIONS).equal(TEXT.encode(CAPTIONS))
        return
    with pytest.raises(ValueError, match=r"tokenizer") as raised:
        TextTokenizer.load(folder)
    assert len(str(raised.value).splitlines()) == 1


def clip_like() -> Tokenizer:
    made = Tokenizer(models.BPE({"a</w>": 0, "b</w>": 1, "?": 2}, [], end_of_word_suffix="</w>"))
    made.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(_regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_regex(pattern), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    return made


def _regex(pattern: str):
    from tokenizers import Regex

    return Regex(pattern)


def bert_like() -> Tokenizer:
    made = Tokenizer(models.WordPiece({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return made


def unigram_like() -> Tokenizer:
    made = Tokenizer(models.Unigram([("[UNK]", 0.0), ("a", -1.0), ("b", -1.0)], unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return made


@pytest.mark.parametrize("make", [clip_like, bert_like, unigram_like])
def test_published_kinds_of_tokenizers_are_saved_and_loaded(tmp_path, make):
    text = TextTokenizer.from_fast(PreTrainedTokenizerFast(tokenizer_object=make()), 9)
    text.save(tmp_path)
    again = TextTokenizer.load(tmp_path)
    assert again.encode(["a b", "b"]).equal(text.encode(["a b", "b"]))
    assert again.decode(again.encode(["a b"])) == text.decode(text.encode(["a b"]))


@pytest.mark.parametrize("make", [clip_like, bert_like, unigram_like])
def test_texts_become_the_ids_that_transformers_gives_them_and_back(make):
    text = TextTokenizer.from_fast(PreTrainedTokenizerFast(tokenizer_object=make()), 30)
    captions = ["a b", "b . a", f"a {text.fast.eos_token} b", "\u2603Z", ""]
    theirs = text.fast(captions, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert text.token_ids(captions) == theirs and text.vocab_size == len(text.fast)
    ids = text.encode(captions)
    assert text.decode(ids) == [
        one.strip() for one in text.fast.batch_decode(ids.tolist(), skip_special_tokens=True)
    ]


def test_ids_do_not_depend_on_what_a_fast_tokenizer_was_used_for():
    """It pads, cuts, and reads the names of its tokens in a caption as these."""
    fast = PreTrainedTokenizerFast(tokenizer_object=bert_like())
    text = TextTokenizer.from_fast(fast, 30)
    captions = ["a", f"a b {END}"]
    expected = text.token_ids(captions)
    fast.add_special_tokens({"pad_token": "[PAD]", "eos_token": END})
    fast(captions, padding="max_length", truncation=True, max_length=2)
    assert text.token_ids(captions) == expected and len(expected[0]) == 1
    assert text.end_id not in expected[1]
    assert TextTokenizer.from_fast(fast, 30).token_ids(captions) == expected


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda text: pickle.loads(pickle.dumps(text))])
def test_copies_read_the_name_of_a_token_as_plain_text_too(copied):
    assert copied(TEXT).token_ids([END]) == TEXT.token_ids([END]) != [[TEXT.end_id]]


def test_spaces_are_cleaned_where_the_tokenizer_asks_for_it():
    words = Tokenizer(models.WordLevel({"a": 0, ".": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, clean_up_tokenization_spaces=True)
    text = TextTokenizer.from_fast(fast, 9)
    assert text.decode(text.encode(["a ."])) == ["a."]


def test_ids_must_be_those_of_the_vocabulary():
    values = json.loads(TEXT.fast.backend_tokenizer.to_str())
    values["model"]["vocab"]["zz"] = 5000
    with pytest.raises(ValueError, match=r"has ids that are not 0 to \d+"):
        build_tokenizer(values, "here.json")


def test_a_changed_text_tokenizer_is_refused(tmp_path):
    TEXT.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"Lowercase"', '"NFKC"'))
    with pytest.raises(ValueError, match="its files were changed or damaged since"):
        TextTokenizer.load(tmp_path)


def test_an_unsafe_pretrained_tokenizer_is_refused_before_training(folder):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | TEXT_CHANGES["characters"]))
    with pytest.raises(ValueError, match="its normalizer is 'Precompiled', not one of"):
        TextTokenizer.pretrained(str(folder), length=9)


@pytest.mark.slow
@pytest.mark.parametrize("call", ["load", "pretrained"])
def test_no_code_is_run_whatever_stdin_says(folder, call):
    ask_for_code(folder / "tokenizer_config.json")
    code = {
        "load": f"TextTokenizer.load({str(folder)!r})",
        "pretrained": f"TextTokenizer.pretrained({str(folder)!r}, length=9)",
    }[call]
    done = subprocess.run(
        [sys.executable, "-c", f"from stage2_prior import TextTokenizer; {code}"],
        input="y\ny\n",
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    refusal = {"load": "'tok.py', which may be code", "pretrained": "text.pretrained"}[call]
    assert done.returncode == 1 and refusal in done.stderr.splitlines()[-1]
    assert not (folder.parent / "code-ran").exists() and "[y/N]" not in done.stdout


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("special_tokens_map.json", '{"bos_token": []}'),
        ("special_tokens_map.json", "[1, 2]"),
        ("added_tokens.json", '{"a": {}}'),
        ("tokenizer_config.json", '{"tokenizer_class": 3}'),
        ("tokenizer_config.json", '{"model_max_length": ""}'),
        ("config.json", '{"model_type": []}'),
        ("tokenizer.json", "{}"),
    ],
)
def test_a_damaged_folder_of_a_pretrained_tokenizer_is_one_error_that_names_it(
    folder, name, content
):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=f"{folder}") as raised:
        TextTokenizer.pretrained(str(folder), length=20).encode(CAPTIONS)
    assert len(str(raised.value).splitlines()) == 1


def test_a_tokenizer_without_its_token_for_unknown_letters_is_refused(folder):
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"] |= {
        "vocab": {"a": 0, "<pad>": 1, "<start>": 2, "<end>": 3},
        "merges": [],
        "unk_token": "[UNK]",
    }
    values["added_tokens"] = []
    path.write_text(json.dumps(values))
    for load in (TextTokenizer.load, lambda own: TextTokenizer.pretrained(str(own), length=20)):
        with pytest.raises(ValueError, match="cannot encode every text"):
            load(folder)
