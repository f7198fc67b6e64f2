"""Byte-level BPE learned from the corpus, or any tokenizer that has a BOS and an EOS."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soluscope.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOS, EOS, PAD = "<|BOS|>", "<|EOS|>", "<|PAD|>"

# Where nothing beside a tokenizer says which entry it is; the first that it has.
_USUAL = {
    "bos_token": (BOS, "<|begin_of_text|>", "<s>", "<bos>", "[CLS]", "<|endoftext|>"),
    "eos_token": (EOS, "<|end_of_text|>", "</s>", "<eos>", "[SEP]", "<|endoftext|>"),
    "pad_token": (PAD, "<pad>", "[PAD]", "<|padding|>"),
}
# Files that may say so, as transformers saves them.
_SAYS_SO = ("tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer and the ids that packing needs. `pad` is `eos` where it has none of its own."""

    tokenizer: Tokenizer
    bos: int
    eos: int
    pad: int

    @property
    def d_vocab(self) -> int:
        """Rows that an embedding needs: ids may have gaps."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, with no BOS or EOS: also where a text spells one out, it is text."""
        self.tokenizer.encode_special_tokens = True
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def learn(texts: Iterator[str], d_vocab: int) -> Vocabulary:
    """A byte-level BPE of `d_vocab` entries, fewer where the texts hold fewer pairs that recur.

    Each digit is a token of its own, so that numbers are spelt the same wherever they stand.
    Encoding with special tokens puts BOS first, as TransformerLens's `to_tokens` expects.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
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
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    return Vocabulary(tokenizer, bos=0, eos=1, pad=2)


def load(name: str) -> Vocabulary:
    """The tokenizer in a tokenizer.json, in a folder that has one, or of that name on the hub.

    Raises:
        UserError: if there is none, it cannot be read, or it has no BOS or no EOS.
    """
    from tokenizers import Tokenizer

    path = local_file(name) or _download(name)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no narrower kind
        raise UserError(f"tokens.tokenizer={name}: cannot read {path}: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = {token: _special(token, tokenizer, path.parent) for token in _USUAL}
    for token in ("bos_token", "eos_token"):
        if ids[token] is None:
            raise UserError(
                f"tokens.tokenizer={name} has no {token}: say which entry it is in a "
                f"tokenizer_config.json beside it, as in {{{token!r}: '<s>'}}"
            )
    bos, eos, pad = ids["bos_token"], ids["eos_token"], ids["pad_token"]
    assert bos is not None
    assert eos is not None
    return Vocabulary(tokenizer, bos=bos, eos=eos, pad=eos if pad is None else pad)


def fingerprint(name: str) -> Any:
    """What JSON can hold and determines the tokenizer: contents of local files, the name of others.

    Raises:
        UserError: if `name` looks like a local file and is not there.
    """
    path = local_file(name)
    if path is None:
        return name
    files = [path, *(path.parent / file for file in _SAYS_SO)]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]


def local_file(name: str) -> Path | None:
    """The tokenizer.json that `name` means, or None where it means a tokenizer of the hub.

    Raises:
        UserError: if `name` is a folder without one, or a .json file that is not there.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / "tokenizer.json").is_file():
            raise UserError(f"tokens.tokenizer={name}: the folder holds no tokenizer.json")
        return path / "tokenizer.json"
    if path.suffix == ".json" or path.is_absolute():
        raise UserError(f"tokens.tokenizer={name}: there is no such file")
    return None


def _download(name: str) -> Path:
    """A hub tokenizer's tokenizer.json in the client's cache, with what says its BOS beside it."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(name, allow_patterns=["tokenizer.json", *_SAYS_SO])
    except Exception as error:  # the client and its HTTP library raise many kinds
        raise UserError(
            f"tokens.tokenizer={name}: neither a file here nor to be had from the hub: "
            f"{' '.join(str(error).split())}"
        ) from error
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"tokens.tokenizer={name}: the hub has no tokenizer.json for it")
    return path


def _special(token: str, tokenizer: Tokenizer, folder: Path) -> int | None:
    """Id of `bos_token`, `eos_token` or `pad_token`, said in `folder`, else by usual names."""
    contents = [_said(folder / file, token) for file in _SAYS_SO]
    for content in (*contents, *_USUAL[token]):
        token_id = None if content is None else tokenizer.token_to_id(content)
        if token_id is not None:
            return token_id
    return None


def _said(path: Path, token: str) -> str | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf8")).get(token)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a JSON object: {error}") from error
    return value.get("content") if isinstance(value, dict) else value
