"""Byte-level BPE learned from the corpus, or any tokenizer that has a BOS and an EOS."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soluscope.errors import UserError
from soluscope.files import from_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

BOS, EOS, PAD = "<|BOS|>", "<|EOS|>", "<|PAD|>"

LONGEST_WORD = 256
"""Maximum length in bytes of a word from which the BPE is learned; longer words are cut."""

SPACES = "Ġ▁"
"""The space before a word, as byte-level BPE and SentencePiece write it in a token."""

# Usual names of the special tokens, in order of preference, for a tokenizer whose files do not name them.
_USUAL = {
    "bos_token": (BOS, "<|begin_of_text|>", "<s>", "<bos>", "[CLS]", "<|endoftext|>"),
    "eos_token": (EOS, "<|end_of_text|>", "</s>", "<eos>", "[SEP]", "<|endoftext|>"),
    "pad_token": (PAD, "<pad>", "[PAD]", "<|padding|>"),
}
SPECIAL_FILES = ("tokenizer_config.json", "special_tokens_map.json")
"""Files beside tokenizer.json that may name the special tokens; transformers writes them."""
MOST_ROWS = 2**24
"""Largest vocabulary. A number of tokens is an allocation, and a file may name any number as an id."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer and the ids that packing needs. `pad` is `eos` if the tokenizer has no PAD."""

    tokenizer: Tokenizer
    bos: int
    eos: int
    pad: int

    @property
    def d_vocab(self) -> int:
        return n_rows(self.tokenizer)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text without BOS and EOS. A special token spelt out in a text is plain text."""
        self.tokenizer.encode_special_tokens = True
        with one_line("the tokenizer fails on a text"):
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text without BOS and EOS.

    Raises:
        UserError: if the tokenizer fails.
    """
    with one_line("the tokenizer fails on a text"):
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def n_rows(tokenizer: Tokenizer) -> int:
    """Return the number of rows that an embedding needs, which is the largest id + 1: ids may have gaps."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def texts_of(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return the text of each token within a line, by id; empty for an id without a token.

    A token is decoded after another token, because many decoders remove the space at the start of a line. A byte
    that is only a part of a character is half of a surrogate pair, as in Python's `surrogateescape`.
    """
    ids = range(n_rows(tokenizer))
    alone = tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=False)
    before = next((i for i in ids if re.fullmatch("[a-z]", alone[i])), None)
    texts = alone
    if before is not None and tokenizer.decoder is not None:
        pairs = tokenizer.decode_batch([[before, i] for i in ids], skip_special_tokens=False)
        special = tokenizer.get_added_tokens_decoder()
        texts = [
            pair[len(alone[before]) :]
            if pair.startswith(alone[before]) and i not in special
            else text
            for i, pair, text in zip(ids, pairs, alone, strict=True)
        ]
    byte_of = _byte_of()
    return tuple(
        _with_bytes(tokenizer.id_to_token(i) or "", byte_of) or text if "\ufffd" in text else text
        for i, text in enumerate(texts)
    )


def _with_bytes(token: str, byte_of: dict[str, int]) -> str | None:
    """Return the text of a byte token or of a byte-level token; None for any other token."""
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        content = bytes.fromhex(token[3:5])
    elif all(character in byte_of for character in token):
        content = bytes(byte_of[character] for character in token)
    else:
        return None
    return content.decode("utf8", "surrogateescape")


def _byte_of() -> dict[str, int]:
    """Return the byte that each character of a byte-level token stands for."""
    from tokenizers.pre_tokenizers import ByteLevel

    itself = {
        character: ord(character) for character in ByteLevel.alphabet() if ord(character) < 256
    }
    others = sorted({*ByteLevel.alphabet()} - {*itself})
    return itself | dict(zip(others, sorted({*range(256)} - {*itself.values()}), strict=True))


def learn(texts: Iterator[str], d_vocab: int) -> Vocabulary:
    """Train a byte-level BPE of `d_vocab` entries, or fewer if too few pairs recur in the texts.

    Each digit is one token, so that a number is always tokenised in the same way. Words are cut after
    `LONGEST_WORD` bytes, because learning takes time quadratic in the length of a word.
    Encoding with special tokens puts BOS first, as TransformerLens's `to_tokens` expects.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [_words(), pre_tokenizers.FixedLength(LONGEST_WORD)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=d_vocab,
        min_frequency=2,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = _words()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    return Vocabulary(tokenizer, bos=0, eos=1, pad=2)


def long_word(text: str) -> int:
    """Return the length in bytes of the longest word of a text if `learn` cuts it, else 0."""
    spaces = re.search(rf"\s{{{LONGEST_WORD // 4}}}", text)
    if not spaces and all(4 * len(word) <= LONGEST_WORD for word in text.split()):
        return 0  # without the slow list of all words: a character has at most 4 bytes
    longest = max(len(word) for word, _ in _words().pre_tokenize_str(text))
    return longest if longest > LONGEST_WORD else 0


def _words() -> PreTokenizer:
    """Return the division of a text into words, in which each byte is one character."""
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def load(name: str) -> Vocabulary:
    """Load a tokenizer from a tokenizer.json, from a folder with that file, or by its name on the hub.

    Raises:
        UserError: if the tokenizer does not exist, cannot be read, or has no BOS or no EOS.
    """
    path = local_file(name) or _download(name)
    tokenizer = from_bytes(path.read_bytes(), f"tokens.tokenizer={name}: cannot read {path}")
    ids = {token: _special(token, tokenizer, path.parent) for token in _USUAL}
    for token in ("bos_token", "eos_token"):
        if ids[token] is None:
            raise UserError(
                f"tokens.tokenizer={name} has no {token}: name its entry in a tokenizer_config.json "
                f"beside the tokenizer, as in {{{token!r}: '<s>'}}"
            )
    bos, eos, pad = ids["bos_token"], ids["eos_token"], ids["pad_token"]
    assert bos is not None
    assert eos is not None
    return Vocabulary(tokenizer, bos=bos, eos=eos, pad=eos if pad is None else pad)


def from_bytes(content: bytes, problem: str) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json, without truncation and padding, after a trial.

    Args:
        content: the file.
        problem: the beginning of an error's message.

    Raises:
        UserError: if the content is not a tokenizer, an id is too large, or the tokenizer fails in the trial.
    """
    from tokenizers import Tokenizer

    with one_line(problem), _stderr_closed():
        tokenizer = Tokenizer.from_buffer(content)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        ids = range(n_rows(tokenizer))
        if len(ids) > MOST_ROWS:
            raise UserError(f"{problem}: its largest id is {ids[-1]}, wanted less than {MOST_ROWS}")
        for text, special in product(_TRIAL, (True, False)):
            try:
                found = max(tokenizer.encode(text, add_special_tokens=special).ids, default=0)
            except Exception:  # no token for a character, which the user's texts need not contain
                continue
            if found not in ids:
                raise UserError(f"{problem}: it makes the id {found}, which no token has")
        tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=False)
    return tokenizer


_TRIAL = ("", "a é\u3000\n1", " ".join(64 * chr(code) for code in range(33, 127)))
"""Texts on which a tokenizer is tried. Some regular expressions need exponential time for the repetitions."""


@contextmanager
def one_line(problem: str) -> Iterator[None]:
    """Turn the errors of the tokenizers package, panics included, into a UserError.

    A panic is no Exception, because it is meant to end the program.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{problem}: {reason}; use another tokenizer") from error


@contextmanager
def _stderr_closed() -> Iterator[None]:
    """Discard what the process writes to its stderr, because a panic writes a stack trace there by itself."""
    try:
        sys.stderr.flush()
        kept = os.dup(2)
    except (OSError, AttributeError, ValueError):  # there is no stderr
        yield
        return
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def fingerprint(name: str) -> Any:
    """Return a JSON value that identifies the tokenizer: hashes of local files, or a name on the hub.

    Raises:
        UserError: if `name` looks like a local file that does not exist.
    """
    path = local_file(name)
    if path is None:
        return name
    files = [path, *(path.parent / file for file in SPECIAL_FILES)]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]


def local_file(name: str) -> Path | None:
    """Return the path of the tokenizer.json that `name` means; None means a tokenizer of the hub.

    Raises:
        UserError: if `name` is a folder without a tokenizer.json, or a .json file that does not exist.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / "tokenizer.json").is_file():
            raise UserError(f"tokens.tokenizer={name}: the folder contains no tokenizer.json")
        return path / "tokenizer.json"
    if path.suffix == ".json" or path.is_absolute():
        raise UserError(f"tokens.tokenizer={name}: there is no such file")
    return None


def _download(name: str) -> Path:
    """Download a tokenizer from the hub, and return the path of its tokenizer.json.

    The files that name its special tokens are downloaded into the same folder.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(name, allow_patterns=["tokenizer.json", *SPECIAL_FILES])
    except Exception as error:  # the client and its HTTP library raise many kinds
        raise UserError(
            f"tokens.tokenizer={name} is not a file here and cannot be downloaded from the hub: "
            f"{' '.join(str(error).split())}"
        ) from error
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"tokens.tokenizer={name}: the hub has no tokenizer.json for it")
    return path


def _special(token: str, tokenizer: Tokenizer, folder: Path) -> int | None:
    """Return the id of `bos_token`, `eos_token` or `pad_token`: from files in `folder`, else by usual names."""
    named = (names[token] for names in named_special(folder) if token in names)
    for content in (*named, *_USUAL[token]):
        token_id = tokenizer.token_to_id(content)
        if token_id is not None:
            return token_id
    return None


@dataclass(frozen=True)
class _Token:
    content: str


@dataclass(frozen=True)
class _Named:
    """The special tokens in a file that transformers has written, each as its text or as an object."""

    bos_token: str | _Token | None = None
    eos_token: str | _Token | None = None
    pad_token: str | _Token | None = None


def named_special(folder: Path) -> list[dict[str, str]]:
    """Return the texts of the special tokens that the files in `folder` name, for each file in `SPECIAL_FILES`.

    Raises:
        UserError: if a file is not JSON, or a token in it has no text.
    """
    result = []
    for path in (folder / file for file in SPECIAL_FILES):
        try:
            found = from_json(path.read_bytes(), _Named) if path.is_file() else _Named()
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot read {path} ({error}): name a token by its text, as in {{'bos_token': '<s>'}}"
            ) from error
        tokens = {key: getattr(found, key) for key in _USUAL}
        texts = {
            key: token.content if isinstance(token, _Token) else token
            for key, token in tokens.items()
        }
        result.append({key: text for key, text in texts.items() if text})
    return result
