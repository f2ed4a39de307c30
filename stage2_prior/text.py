"""Captions <-> text ids. Knows words and the text slots; nothing of codes or networks.

Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) trained on the captions by `tokenizers`,
in the files of transformers' fast tokenizers; or any tokenizer of the Hub by name. BPE dropout
(Provilkov et al. 2020) is applied here, since the library's takes no seed, and training that
resumes from a checkpoint would not see the ids that it would have seen.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from torch import Tensor

from stage2_prior.config import refuse
from stage2_prior.file_checks import UnsafeFile, check_folder, convert, read_json_object
from stage2_prior.text_checks import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    UnsupportedTokenizer,
    build_tokenizer,
    check_encodes,
    check_pretrained,
    load_tokenizer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CAPTIONS_TO_LEARN = 100_000
"""A tokenizer is trained on no more captions than this; further ones hardly change its merges."""
_TOKENIZER_FILES = (
    "config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
_MAX_LENGTH = 2**16
"""Text slots that a file may ask for."""
_SURROGATE = re.compile("[\ud800-\udfff]")
PAD = "<pad>"
START = "<start>"
END = "<end>"
_ROLES = {"pad_token": PAD, "bos_token": START, "eos_token": END}


@dataclass(kw_only=True)
class TextConfig:
    """Captions as ids (`text` in a YAML)."""

    vocab_size: int = 1024
    """Entries of the vocabulary that is trained on the captions; at least 300 (256 bytes, special
    tokens, some merges). A prior that is started from has its own vocabulary."""
    max_length: int = 32
    """Text slots of the stream, start and end token included."""
    pretrained: str | None = None
    """Name or folder of a transformers tokenizer to use instead of training one."""
    truncate: bool = False
    """Truncate captions that are longer than `max_length`. Without it they are an error that counts
    them."""
    bpe_dropout: float = 0.0
    """Probability that each merge of a training caption is skipped, so that words occur in other
    pieces too."""
    num_new_tokens: int = 0
    """Maximum number of tokens to add to the pretrained vocabulary, for words that it splits."""
    new_tokens_like: list[str] = field(default_factory=list)
    """Words of the pretrained vocabulary whose mean embedding new tokens start from. Without any, a
    new token starts from the pieces that spelled it."""

    def __post_init__(self) -> None:
        refuse(
            (
                self.pretrained is None and self.vocab_size < 300,
                f"text.vocab_size is {self.vocab_size}; it must be at least 300 (256 bytes and "
                "some merges)",
            ),
            (
                self.max_length < 3,
                f"text.max_length is {self.max_length}; it must be at least 3 (start, one token, "
                "end)",
            ),
            (
                self.num_new_tokens < 0,
                f"text.num_new_tokens is {self.num_new_tokens}; it must be 0 or more",
            ),
            (
                bool(self.new_tokens_like) and not self.num_new_tokens,
                f"text.new_tokens_like is {self.new_tokens_like} and text.num_new_tokens is 0; set "
                "how many tokens are new",
            ),
            (
                not 0 <= self.bpe_dropout < 1,
                f"text.bpe_dropout is {self.bpe_dropout}; it must be in [0, 1)",
            ),
        )


class TextTokenizer:
    """Captions to ids of one length and back.

    Args:
        backend: the tokenizer of `tokenizers`; it gets the tokens that it lacks.
        roles: what its tokens are for, as `PreTrainedTokenizerFast` takes it: `pad_token`,
            `bos_token`, `eos_token` and others.
        length: text slots.
    """

    def __init__(self, backend: Tokenizer, roles: Mapping[str, Any], length: int) -> None:
        self.backend = backend
        self.length = length
        self.roles = {role: value for role, value in roles.items() if value is not None}
        self._add_special({role: token for role, token in _ROLES.items() if role not in self.roles})
        if len({self.roles[role] for role in _ROLES}) < 3:
            # Many Hub tokenizers pad with the end token; the stream must tell them apart.
            self._add_special(_ROLES)
        ids = backend.get_vocab(with_added_tokens=True)
        self.pad_id, self.start_id, self.end_id = (ids[self.roles[role]] for role in _ROLES)

    def _add_special(self, roles: Mapping[str, str]) -> None:
        """Gives tokens these roles; adds those that the backend lacks."""
        self.roles |= roles
        known = {token.content for token in self.backend.get_added_tokens_decoder().values()}
        tokens = [token for role, token in self.roles.items() if role.endswith("_token")]
        self.backend.add_special_tokens(
            [AddedToken(token, special=True) for token in tokens if token not in known]
        )

    @classmethod
    def from_fast(cls, fast: PreTrainedTokenizerFast, length: int) -> TextTokenizer:
        """The same for a fast tokenizer of transformers."""
        roles = {role: token for role, token in fast.special_tokens_map.items() if token}
        roles = {role: str(token) for role, token in roles.items() if role.endswith("_token")}
        roles["clean_up_tokenization_spaces"] = fast.clean_up_tokenization_spaces
        # A copy, since transformers changes its own one with every call
        backend = Tokenizer.from_str(fast.backend_tokenizer.to_str())
        backend.no_padding()
        backend.no_truncation()
        return cls(backend, roles, length)

    @cached_property
    def fast(self) -> PreTrainedTokenizerFast:
        """As a tokenizer of transformers."""
        # Here, since the import takes seconds, and sampling does without it
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(tokenizer_object=self.backend, **self.roles)

    def with_length(self, length: int) -> TextTokenizer:
        """The same with another number of text slots."""
        return TextTokenizer(self.backend, self.roles, length)

    @classmethod
    def from_config(cls, config: TextConfig, captions: Iterable[str]) -> TextTokenizer:
        """The tokenizer that a configuration names: trained on the captions, or a pretrained one.
        Raises what `pretrained` does."""
        if config.pretrained:
            return cls.pretrained(config.pretrained, length=config.max_length)
        return cls.train(captions, vocab_size=config.vocab_size, length=config.max_length)

    @classmethod
    def train(cls, captions: Iterable[str], *, vocab_size: int, length: int) -> TextTokenizer:
        """Trains byte-level BPE; any Unicode text can be encoded, whatever the captions held. Case
        is folded."""
        bpe = Tokenizer(models.BPE())
        bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[PAD, START, END],
            initial_alphabet=alphabet,
            show_progress=False,
        )
        bpe.train_from_iterator(captions, trainer)
        return cls(bpe, {}, length)

    @classmethod
    def pretrained(cls, name: str, *, length: int) -> TextTokenizer:
        """A fast tokenizer by Hub name or folder, of the kinds that `text_checks` accepts. No code
        of the folder, or of the Hub, is run."""
        from transformers import AutoTokenizer

        from stage2_prior.hub import model_folder

        try:
            folder = model_folder(name, list(_TOKENIZER_FILES))
            check_pretrained(folder)
            fast: Any = AutoTokenizer.from_pretrained(
                folder, use_fast=True, trust_remote_code=False
            )
            # What a bundle could not hold is refused now, not after the training.
            build_tokenizer(json.loads(fast.backend_tokenizer.to_str()), name)
            check_encodes(fast.backend_tokenizer, name)
            fast("a")  # fails where another of its files is damaged
            return cls.from_fast(fast, length)
        except UnsafeFile:
            raise
        except Exception as error:  # transformers raises all kinds for damaged files
            first = " ".join(str(error).split())[:300]
            raise ValueError(
                f"text.pretrained {name!r} cannot be loaded as a transformers tokenizer ({first}); "
                "give a folder that holds tokenizer.json, or a Hub name with network access"
            ) from error

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """Slots each caption needs, start and end token included."""
        return [len(ids) + 2 for ids in self.token_ids(captions)]

    def encode(self, captions: Sequence[str], *, truncate: bool = False) -> Tensor:
        """Captions -> (B,T) int64: start, tokens, end, pads. An empty caption is the null caption.

        Raises:
            ValueError: a caption needs more slots than there are and `truncate` is off; the first
                such one is shown.
        """
        rows = torch.full((len(captions), self.length), self.pad_id, dtype=torch.long)
        rows[:, 0] = self.start_id
        for i, ids in enumerate(self.token_ids(captions)):
            if len(ids) > self.length - 2 and not truncate:
                raise ValueError(
                    f"the caption {captions[i][:80]!r} needs {len(ids) + 2} tokens and there are "
                    f"{self.length} text slots; "
                    "shorten it, or cut it with truncate (text.truncate=true in training; a longer "
                    "text.max_length needs retraining)"
                )
            ids = ids[: self.length - 2]
            rows[i, 1 : len(ids) + 1] = torch.tensor(ids, dtype=torch.long)
            rows[i, len(ids) + 1] = self.end_id
        return rows

    def encode_with_dropout(
        self,
        captions: Sequence[str],
        dropout: float,
        random: np.random.Generator,
        *,
        truncate: bool = False,
    ) -> Tensor:
        """As `encode`, with each merge left out by chance. A caption whose pieces would be too many
        for the slots has them whole.

        Raises:
            ValueError: the tokenizer is no BPE; and what `encode` raises.
        """
        rows = self.encode(captions, truncate=truncate)
        for row, caption in zip(rows, captions, strict=True):
            ids = [i for word in self.words(caption) for i in self._pieces(word, dropout, random)]
            if 0 < len(ids) <= self.length - 2:
                row[1:] = self.pad_id
                row[1 : len(ids) + 2] = torch.tensor([*ids, self.end_id])
        return rows

    def words(self, caption: str) -> list[str]:
        """What merges never cross, in the tokenizer's own letters.

        Raises:
            ValueError: the tokenizer is no byte-level BPE.
        """
        backend = self.backend
        caption = caption.strip()
        if backend.pre_tokenizer is None:
            raise ValueError(
                "the text tokenizer does not say what its words are; use a byte-level BPE tokenizer"
            )
        normal = backend.normalizer.normalize_str(caption) if backend.normalizer else caption
        split = backend.pre_tokenizer.pre_tokenize_str
        return [word for word, _ in split(normal)] if normal else []

    def _pieces(self, word: str, dropout: float, random: np.random.Generator) -> list[int]:
        vocabulary, ranks = self._merges
        pieces = list(word)
        while len(pieces) > 1:
            pairs = [(ranks[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in ranks]
            kept = [
                pair
                for pair, drawn in zip(pairs, random.random(len(pairs)), strict=True)
                if drawn >= dropout
            ]
            if not kept:
                break
            _, i = min(kept)
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
        return [vocabulary[piece] for piece in pieces]

    @cached_property
    def _merges(self) -> tuple[dict[str, int], dict[tuple[str, str], int]]:
        """The vocabulary by id, and the rank of each pair that is merged, the first first."""
        model = json.loads(self.backend.to_str())["model"]
        if model["type"] != "BPE" or self.backend.pre_tokenizer is None:
            raise ValueError(
                "text.bpe_dropout, or text.num_new_tokens, needs a byte-level BPE tokenizer, and "
                f"this one is {model['type']}; set both "
                "to 0"
            )
        by_id = dict(sorted(model["vocab"].items(), key=lambda entry: entry[1]))
        return by_id, {tuple(pair): rank for rank, pair in enumerate(model["merges"])}

    def extend_vocab(
        self, captions: Iterable[str], entries: int
    ) -> tuple[TextTokenizer, list[list[int]]]:
        """Continues this BPE's merges on the words of other captions: old entries and merges stay,
        and come first.

        Args:
            entries: how many to add at most; fewer where no pair of pieces occurs twice.

        Returns:
            The larger tokenizer, and the old ids that spell each new entry.

        Raises:
            ValueError: this is no BPE whose vocabulary holds every token.
        """
        # Not `add_tokens`: transformers matches such tokens before it splits captions into words.
        # The space before one becomes a token of its own. Inside a longer word one adds a space to
        # what is decoded ("xylophone s"). BPE dropout never splits it, and it keeps this method
        # from extending the vocabulary a second time.
        old, ranks = self._merges
        if len(old) != self.vocab_size:
            raise ValueError(
                "text.num_new_tokens needs a byte-level BPE tokenizer that was trained here, and "
                "this one has other tokens, too; set it to 0"
            )
        counts = Counter(word for caption in captions for word in self.words(caption))
        names = {i: piece for piece, i in old.items()}
        split = {
            word: [names[i] for i in self._pieces(word, 0.0, np.random.default_rng(0))]
            for word in sorted(counts)
        }
        vocabulary = dict(old)
        merges = list(ranks)
        spelled = {piece: [i] for piece, i in old.items()}
        while len(vocabulary) - len(old) < entries:
            pairs: Counter[tuple[str, str]] = Counter()
            for word, pieces in split.items():
                for pair in pairwise(pieces):
                    pairs[pair] += counts[word]
            best = max(pairs, key=lambda pair: (pairs[pair], pair), default=None)
            if best is None or pairs[best] < 2:
                break
            merges.append(best)
            joined = best[0] + best[1]
            vocabulary.setdefault(joined, len(vocabulary))
            spelled.setdefault(joined, spelled[best[0]] + spelled[best[1]])
            for pieces in split.values():
                _merge(pieces, best)
        described = json.loads(self.backend.to_str())
        described["model"] |= {"vocab": vocabulary, "merges": [list(pair) for pair in merges]}
        larger = TextTokenizer(Tokenizer.from_str(json.dumps(described)), self.roles, self.length)
        return larger, [spelled[piece] for piece in list(vocabulary)[len(old) :]]

    def decode(self, ids: Tensor) -> list[str]:
        """(B,T) -> captions, special tokens left out."""
        # transformers removes spaces before punctuation where a tokenizer asks for it.
        cleans = self.roles.get("clean_up_tokenization_spaces")
        decode = self.fast.batch_decode if cleans else self.backend.decode_batch
        return [text.strip() for text in decode(ids.tolist(), skip_special_tokens=True)]

    def token_ids(self, captions: Sequence[str]) -> list[list[int]]:
        """The tokens of each caption, without start and end.

        Raises:
            ValueError: a caption holds surrogates, as arguments that are not UTF-8 do.
        """
        texts = [caption.strip() for caption in captions]
        for text in texts:
            if _SURROGATE.search(text):
                raise ValueError(
                    f"the caption {text[:80]!a} is not UTF-8; give it in that encoding"
                )
        # A caption that spells "<end>" means these five letters and not the token. Copies of the
        # backend do not keep this.
        self.backend.encode_special_tokens = True
        return [row.ids for row in self.backend.encode_batch(texts, add_special_tokens=False)]

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer as transformers does, its text length and its hash into a folder."""
        self.fast.save_pretrained(folder)
        described = {"length": self.length, "sha256": _hash_of(Path(folder))}
        (Path(folder) / "text.json").write_text(json.dumps(described) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> TextTokenizer:
        """What `save` wrote. ValueError names what is missing, truncated, changed since, or not
        safe to load."""
        folder = Path(folder)
        path = folder / "text.json"
        try:
            check_folder(folder)
            described = read_json_object(path)
            length = convert(described["length"], int, f"{path}: length")
            if not 3 <= length <= _MAX_LENGTH:
                raise ValueError(f"its length is {length}, and is from 3 to {_MAX_LENGTH}")
            backend, roles = load_tokenizer(folder)
            if described.get("sha256") not in (None, _hash_of(folder)):
                raise ValueError("its files were changed or damaged since they were saved")
        except UnsafeFile:
            raise
        except UnsupportedTokenizer as error:  # which an earlier version accepted
            raise ValueError(
                f"{error}: train a new prior with tokenizer.init_from={folder.parent} and "
                "tokenizer.frozen=true, or go on with the version that wrote it"
            ) from error
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder} is not a whole text tokenizer ({error}); copy the bundle again"
            ) from error
        return cls(backend, roles, length)


def _hash_of(folder: Path) -> str:
    """Of the files of a tokenizer, in hexadecimal digits."""
    digest = hashlib.sha256()
    for name in (TOKENIZER_FILE, CONFIG_FILE):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def _merge(pieces: list[str], pair: tuple[str, str]) -> None:
    """Joins each occurrence of a pair, from left to right, in place."""
    i = 0
    while i < len(pieces) - 1:
        if (pieces[i], pieces[i + 1]) == pair:
            pieces[i : i + 2] = [pair[0] + pair[1]]
        i += 1


class LengthReport:
    """How many captions do not fit their text slots, counted in batches.

    Attributes:
        length: slots there are.
        count, too_long: captions so far, and those of them that need more slots.
        longest, worst: the slots of the longest caption so far, and the caption.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.count = 0
        self.too_long = 0
        self.longest = 0
        self.worst = ""

    def add(self, captions: Sequence[str], lengths: Sequence[int]) -> None:
        """Captions and the slots each needs (`TextTokenizer.lengths`)."""
        self.count += len(captions)
        self.too_long += sum(length > self.length for length in lengths)
        if lengths and max(lengths) > self.longest:
            self.longest = max(lengths)
            self.worst = captions[lengths.index(self.longest)]

    def check(self, *, truncate: bool) -> None:
        """Raises ValueError where captions do not fit and may not be truncated."""
        if self.too_long and not truncate:
            raise ValueError(
                f"{self.too_long} of {self.count} captions need more than "
                f"text.max_length={self.length} slots (the longest {self.longest}: "
                f"{self.worst[:60]!r}); set text.max_length={self.longest}, or cut them with "
                "text.truncate=true"
            )
