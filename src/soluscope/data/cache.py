"""Token caches: a corpus that is split, tokenised and packed once; training reads it as arrays.

A cache is a folder:

    meta.json              the settings that determine the cache, d_vocab, BOS, EOS and PAD, and counts
    tokenizer.json         for PreTrainedTokenizerFast and TransformerLens
    <split>.tokens         the split's documents one after another, EOS after each; uint16 or uint32
    <split>.offsets.npy    int64 [n_documents + 1]: the first token of each document, and the number of tokens
    <split>.names.jsonl    the documents' names, one JSON string per line
    .checked.json          the state of each file when its checksum was last found right, so that it is
                           computed once and not by every job of a sweep

meta.json holds the sha256 of the splits' files, which is compared before a split is used. Reading a cache needs
only numpy, so a machine without datasets and tokenizers can train from a cache that was copied there. A cache
is written as a stream: memory holds only one batch of documents and, for each distinct document, its hash and
its offset (about 100 bytes).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import platform
import shutil
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
import numpy.typing as npt
from filelock import Timeout

from soluscope import plugins
from soluscope.config import Config, TokensConfig
from soluscope.data import tokenizer
from soluscope.data.passages import WORDS, Hasher, Passages
from soluscope.data.sources import Source, warn
from soluscope.errors import UserError
from soluscope.files import (
    Stamp,
    Whole,
    checksum,
    digest,
    file_lock,
    from_json,
    has_checksum,
    read_json,
    reason,
    remove_folder,
    remove_litter,
    replacing_folder,
    stamp,
    write_bytes,
    write_text,
)
from soluscope.terminal import console, say

Split = Literal["train", "select", "report"]
Indices = Sequence[int] | npt.NDArray[np.integer[Any]]

SPLITS: tuple[Split, ...] = ("train", "select", "report")
HELD_OUT: tuple[Split, ...] = ("select", "report")
_OVERLAP = f"which share {WORDS} consecutive words with a held-out document"
"""Splits that evaluation reads. A study keeps a copy of them."""

ENDS = ("tokens", "offsets.npy", "names.jsonl")
"""Ends of the names of a split's files."""

_FORMAT = 3  # increase it when the same corpus and settings would give different files
_CHECKED = ".checked.json"
_RESTORE = "copy it again, or delete it and give the training command again"
_LARGEST_UINT16_VOCAB = 65_535
_PATIENCE_S = 10.0
"""Seconds that a process waits for another process before it says so. Jobs that start together wait for less."""
_BATCH_BYTES = 1 << 20
_MOST_NAMED = 20  # documents named on stderr for one reason, so that they do not fill the terminal


class Counts(TypedDict):
    """Sizes of a split."""

    n_documents: Whole
    n_tokens: Whole
    n_bytes: Whole


class Skipped(TypedDict):
    """The documents that were left out."""

    count: Whole
    why: dict[str, str]
    """Reasons by the document's name, for the first few."""


class Shares(TypedDict):
    """Shares of the documents that are held out."""

    select: float
    report: float


class Meta(TypedDict):
    """Content of meta.json."""

    format: Whole
    key: str
    asked: dict[str, Any]
    """The settings of the configuration that determine the cache."""
    d_vocab: Whole
    bos: Whole
    eos: Whole
    pad: Whole
    dtype: Literal["uint16", "uint32"]
    tokenizer: str
    tokenizer_hash: str
    source: str
    corpus: dict[str, Any]
    shares: Shares
    splits: dict[Split, Counts]
    dropped_duplicates: Whole
    dropped_overlapping: dict[Split, Whole]
    """Numbers of documents that were left out because a held-out document shares a passage with them."""
    skipped: Skipped
    versions: dict[str, str]
    sha256: NotRequired[dict[str, str]]
    """Checksums of the splits' files; caches of older versions have none."""
    kept: NotRequired[list[Split]]
    """In a study's copy: the splits that are there."""


def prepare(config: Config) -> TokenCache:
    """Return the token cache that `config` describes, and write it first if it does not exist.

    With tokens.prepared, return that cache unchanged. If several processes start together, one process
    writes the cache while the other processes wait.

    Raises:
        UserError: if the corpus or a split is empty, the source or the tokenizer cannot be read, the
            cache cannot be written, or the existing cache is incomplete.
    """
    if config.tokens.prepared is not None:
        prepared = _check_prepared(open_cache(Path(config.tokens.prepared)), config)
        prepared.check_and_remember()
        return prepared
    key = cache_key(config)
    folder = Path(config.tokens.cache_dir) / key
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _lock(folder.with_name(f".{key}.lock"), "is preparing the same tokens"):
                if not folder.exists():
                    _make(config, key, folder)
        except OSError as error:
            raise UserError(
                f"cannot write the token cache {folder}: {error.strerror}; "
                "free disk space or set tokens.cache_dir to another folder"
            ) from error
    cache = open_cache(folder)
    cache.check_and_remember()
    return cache


def share_with_study(cache: TokenCache, study_dir: Path) -> None:
    """Copy the tokenizer, the held-out splits and the facts about the data into the study's folder; all its
    runs share them, and the study can be evaluated wherever it is moved.

    Raises:
        UserError: if the study was trained on other tokens, its data.json is broken, or the folder cannot
            be written.
    """
    saved, copied = study_dir / "data.json", study_dir / "tokenizer.json"
    content = cache.tokenizer_path.read_bytes()
    try:
        study_dir.mkdir(parents=True, exist_ok=True)
        with _lock(study_dir / ".data.lock", "is writing the study's tokenizer"):
            if not saved.is_file():
                facts = cache.meta | {"path": str(cache.path)}
                write_text(saved, json.dumps(facts, indent=1) + "\n")
            there = study_facts(study_dir, f"delete {saved}, and it will be written again")["key"]
            if there == cache.meta["key"]:  # a study that was copied may lack the other files
                if not copied.is_file() or copied.read_bytes() != content:
                    write_bytes(copied, content)
                _keep_held_out(cache, study_dir / "tokens")
    except OSError as error:
        raise UserError(
            f"cannot write {study_dir}: {error.strerror}; set runs_dir to another folder"
        ) from error
    if there != cache.meta["key"]:
        raise UserError(
            f"{study_dir} was trained on other tokens (cache {there}, now {cache.meta['key']}), but all "
            "runs of a study must share their tokens: choose another study="
        )


def of_study(study_dir: Path) -> TokenCache | None:
    """Return the tokens of a study: its copy of the held-out splits, else the cache that data.json names.

    Studies of older versions have no copy. None means that both are gone.

    Raises:
        UserError: if data.json is missing or broken, or the tokens are incomplete.
    """
    facts = study_facts(study_dir)
    places = (study_dir / "tokens", Path(facts["path"]))
    return next((open_cache(path) for path in places if path.is_dir()), None)


def study_facts(study_dir: Path, remedy: str = _RESTORE) -> dict[str, Any]:
    """Return the content of a study's data.json: the facts about its tokens, and the path of their cache.

    Raises:
        UserError: if data.json is missing or broken; `remedy` is the end of the line.
    """
    path = study_dir / "data.json"
    if not path.is_file():
        raise UserError(f"no {path}: move the run folder back into its study's folder")
    facts = read_json(path, dict[str, Any], remedy)
    names = ("key", "path", "tokenizer_hash")
    if missing := [name for name in names if name not in facts]:
        raise UserError(f"{path} lacks {', '.join(missing)}: {remedy}")
    if wrong := [name for name in names if not isinstance(facts[name], str)]:
        raise UserError(f"{path} has {wrong[0]}={facts[wrong[0]]!r:.80}, wanted a text: {remedy}")
    return facts


def _keep_held_out(cache: TokenCache, folder: Path) -> None:
    """Copy the held-out splits of a cache to `folder`, unless a complete copy is there."""
    try:
        copy = open_cache(folder)
        for split in copy.kept:
            copy.check(split)
        if copy.meta["key"] == cache.meta["key"]:
            return
    except UserError:
        pass  # no copy, or an incomplete one
    remove_litter(folder.parent, name=folder.name)
    with replacing_folder(folder) as partial:
        for name in ("tokenizer.json", *(f"{split}.{end}" for split in HELD_OUT for end in ENDS)):
            shutil.copyfile(cache.path / name, partial / name)
        meta = cache.meta | {"kept": list(HELD_OUT)}
        (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf8")
        remove_folder(folder)


def _check_prepared(cache: TokenCache, config: Config) -> TokenCache:
    """Return `cache`, or refuse it if it was made with other settings than the configuration's."""
    tokens, asked = config.tokens, cache.meta["asked"]
    here = _asked(config)
    for key, there in asked.items():
        if here.get(key) != there and not (key == "tokens.d_vocab" and tokens.tokenizer != "bpe"):
            raise UserError(
                f"tokens.prepared={cache.path} was made with {key}={there}, but this configuration "
                f"has {key}={here.get(key)}: set {key}={there}"
            )
    return cache


def _asked(config: Config) -> dict[str, Any]:
    """Return the settings of a configuration that determine its tokens, by key."""
    names = ("tokenizer", "d_vocab", "select_share", "report_share")
    tokens = {f"tokens.{name}": getattr(config.tokens, name) for name in names}
    corpus = {f"corpus.{key}": value for key, value in asdict(config.corpus).items()}
    return {"data": config.data} | corpus | tokens


def cache_key(config: Config) -> str:
    """Return a hash of everything that determines the cache: documents, splits, tokenizer and file format."""
    source: Source = plugins.pick("soluscope.data.sources", config.data)
    tokens = config.tokens
    return digest(
        {
            "format": _FORMAT,
            "source": [config.data, asdict(config.corpus), source.fingerprint(config.corpus)],
            "tokenizer": ["bpe", tokens.d_vocab, tokens.train_mb]
            if tokens.tokenizer == "bpe"
            else ["loaded", tokenizer.fingerprint(tokens.tokenizer)],
            "shares": [tokens.select_share, tokens.report_share],
        }
    )


def split_of(text: str, select_share: float, report_share: float) -> Split:
    """Return the split of a document with this text; it does not depend on the corpus.

    Raises:
        UnicodeEncodeError: if `text` contains a lone surrogate, which no tokenizer accepts either.
    """
    return _split_of(_hash(text.encode("utf8")), select_share, report_share)


def _hash(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


def _split_of(text_hash: bytes, select_share: float, report_share: float) -> Split:
    position = int.from_bytes(text_hash[:8]) / 2**64
    if position < select_share:
        return "select"
    return "report" if position < select_share + report_share else "train"


def open_cache(path: Path) -> TokenCache:
    """Return the cache in the folder `path`, after checking its files against its meta.json.

    Raises:
        UserError: if the folder is not a cache, has another format, or has missing or changed files.
    """
    if not (path / "meta.json").is_file():
        raise UserError(
            f"no token cache at {path}: give a folder that contains meta.json and tokens"
        )
    try:
        cache = TokenCache(path)
        if cache.meta["format"] != _FORMAT:
            raise UserError(
                f"token cache {path} has format {cache.meta['format']}, but this version needs {_FORMAT}: "
                "prepare the tokens again with this version"
            )
        problem = cache._problem()
    except (OSError, ValueError, KeyError) as error:
        problem = reason(error)
    if problem:
        raise UserError(_incomplete(path, problem))
    return cache


def _incomplete(path: Path, problem: str) -> str:
    return f"token cache {path} is incomplete ({problem}): delete it, and it will be prepared again"


class TokenCache:
    """A corpus as tokens, in three splits that have no document in common."""

    path: Path
    meta: Meta

    def __init__(self, path: Path) -> None:
        """Read the meta.json of the cache in the folder `path`.

        Raises:
            OSError: if it cannot be read.
            ValueError: if it is not the meta.json of a cache.
        """
        self.path = path
        try:
            self.meta = from_json((path / "meta.json").read_bytes(), Meta)
        except ValueError as error:
            raise ValueError(f"meta.json: {error}") from error
        least = [self.meta["bos"], self.meta["eos"], self.meta["pad"]]
        if not 0 <= min(least) <= max(least) < self.meta["d_vocab"] <= 2**32:
            raise ValueError(
                f"meta.json: BOS, EOS and PAD are not tokens below d_vocab={self.meta['d_vocab']}"
            )
        if missing := {"data", "tokens.d_vocab", "tokens.tokenizer"} - self.meta["asked"].keys():
            raise ValueError(f"meta.json: `asked` lacks {', '.join(sorted(missing))}")

    @property
    def kept(self) -> Sequence[Split]:
        """Return the splits that are there."""
        kept: Sequence[Split] = self.meta.get("kept", SPLITS)
        return kept

    @property
    def tokenizer_path(self) -> Path:
        return self.path / "tokenizer.json"

    def rows(self, split: Split, ctx: int) -> Rows:
        """Return the split as rows of `ctx` tokens.

        Raises:
            UserError: if the split has too few tokens for one row, or is not in a study's copy.
        """
        if split not in self.kept:
            raise UserError(
                f"{self.path} holds only the splits {', '.join(self.kept)}: set tokens.prepared to a whole token "
                "cache"
            )
        self.check(split)
        n_tokens = self.meta["splits"][split]["n_tokens"]
        if n_tokens < ctx - 1:
            raise UserError(
                f"model.ctx={ctx} is longer than the whole {split} split, which has {n_tokens} "
                "tokens: lower model.ctx or give more documents"
            )
        return Rows(self, split, ctx)

    def stream(self, split: Split) -> npt.NDArray[np.unsignedinteger[Any]]:
        """Return all tokens of a split as an array that stays on disk until it is read."""
        self.check(split)
        # A plain array over the map, because indexing np.memmap itself is several times slower.
        return np.asarray(np.memmap(self.path / f"{split}.tokens", self.meta["dtype"], mode="r"))

    def offsets(self, split: Split) -> npt.NDArray[np.int64]:
        """Return the positions of the documents' first tokens and the number of tokens, [n_documents + 1]."""
        self.check(split)
        return self._offsets(split)

    def _offsets(self, split: Split) -> npt.NDArray[np.int64]:
        try:
            offsets: npt.NDArray[np.int64] = np.lib.format.open_memmap(
                self.path / f"{split}.offsets.npy", mode="r"
            )
        except Exception as error:  # the header is a Python expression, with all of its errors
            raise ValueError(f"{split}.offsets.npy: {reason(error)}") from error
        return offsets

    def check(self, split: Split) -> None:
        """Compare a split's files with their checksums, unless that was done since they last changed.

        Raises:
            UserError: if a file differs.
        """
        for end in ENDS:
            name = f"{split}.{end}"
            wanted = self.meta.get("sha256", {}).get(name)
            path = self.path / name
            try:
                known = wanted is None or self._remembered.get(name) == stamp(path)
                if not known and not has_checksum(path, str(wanted)):
                    raise UserError(_incomplete(self.path, f"the sha256 of {name} is wrong"))
            except OSError as error:
                raise UserError(_incomplete(self.path, f"{name}: {reason(error)}")) from error

    def check_and_remember(self) -> None:
        """Compare all splits with their checksums, and write down the state of the files for other processes.

        Raises:
            UserError: if a file differs.
        """
        for split in self.kept:
            self.check(split)
        self.remember()

    def remember(self) -> None:
        """Write down the state of files that have the right checksums, if the folder can be written."""
        stamps = {name: stamp(self.path / name) for name in self.meta.get("sha256", {})}
        if stamps != self._remembered:
            with contextlib.suppress(OSError, UserError):
                write_text(self.path / _CHECKED, json.dumps(stamps) + "\n")

    @cached_property
    def _remembered(self) -> dict[str, Stamp]:
        # Nobody can forge the file in a copy, because a copy's inodes and times of change are its own.
        try:
            return read_json(self.path / _CHECKED, dict[str, Stamp], "")
        except UserError:
            return {}

    def _problem(self) -> str | None:
        """Return the first difference between the files and meta.json, or None without a difference."""
        if not self.tokenizer_path.is_file():
            return "tokenizer.json is missing"
        tokenizer_hash = checksum(self.tokenizer_path)
        if tokenizer_hash != self.meta["tokenizer_hash"]:
            return "tokenizer.json is not the tokenizer that produced the tokens"
        for split in self.kept:
            counts = self.meta["splits"][split]
            for end in ENDS:
                if not (self.path / f"{split}.{end}").is_file():
                    return f"{split}.{end} is missing"
            n_bytes = (self.path / f"{split}.tokens").stat().st_size
            wanted = counts["n_tokens"] * np.dtype(self.meta["dtype"]).itemsize
            if n_bytes != wanted:
                return f"{split}.tokens has {n_bytes} bytes instead of {wanted}, as meta.json gives"
            offsets = self._offsets(split)
            if offsets.dtype != np.int64 or offsets.shape != (counts["n_documents"] + 1,):
                return f"{split}.offsets.npy belongs to other documents than meta.json"
            if offsets[0] != 0 or offsets[-1] != counts["n_tokens"] or (np.diff(offsets) < 0).any():
                return f"{split}.offsets.npy belongs to other documents than meta.json"
        return None


def evenly_spaced(n_items: int, n_wanted: int) -> npt.NDArray[np.int64]:
    """Return the indices of `n_wanted` items (at least one), evenly spaced from the first item to the last.

    If there are fewer items, all indices are returned.
    """
    return np.linspace(0, n_items - 1, min(n_items, max(1, n_wanted))).astype(np.int64)


class Rows:
    """A split packed into full rows: BOS, then ctx - 1 tokens of the stream, across document boundaries.

    Row i covers stream[i * (ctx - 1) : (i + 1) * (ctx - 1)]. The last tokens, too few for a row, are left out.
    """

    def __init__(self, cache: TokenCache, split: Split, ctx: int) -> None:
        self._names_path = cache.path / f"{split}.names.jsonl"
        self._stream = cache.stream(split)
        self._ends = cache.offsets(split)[1:]
        self._bos, self._d_vocab = cache.meta["bos"], cache.meta["d_vocab"]
        self._ctx = ctx

    def __len__(self) -> int:
        return len(self._stream) // (self._ctx - 1)

    def __getitem__(self, indices: Indices) -> npt.NDArray[np.int64]:
        """Return the tokens of the rows `indices`, int64 [row ctx].

        Raises:
            IndexError: if an index is outside the split.
            UserError: if a token is not in the vocabulary.
        """
        rows = np.full((len(indices), self._ctx), self._bos, dtype=np.int64)
        rows[:, 1:] = self._stream[self._places(indices)]
        if (
            rows.size and rows.max() >= self._d_vocab
        ):  # only a cache without checksums gets this far
            problem = f"it contains the token {rows.max()}, but has d_vocab={self._d_vocab}"
            raise UserError(_incomplete(self._names_path.parent, problem))
        return rows

    def spread(self, n_tokens: int, most: int) -> npt.NDArray[np.int64]:
        """Return the indices of rows for a measurement: evenly spread over the split, and few of each document.

        Args:
            n_tokens: number of tokens of the rows, about.
            most: number of tokens at the beginning of each document from which rows are taken. A row may continue
                beyond them.
        """
        width = self._ctx - 1
        first = np.arange(len(self), dtype=np.int64) * width
        owner, last = (
            np.searchsorted(self._ends, places, side="right")
            for places in (first, first + width - 1)
        )
        starts = np.concatenate([[0], self._ends[:-1]])
        chosen = np.flatnonzero((first - starts[owner] < most) | (owner != last))
        return chosen[evenly_spaced(len(chosen), n_tokens // self._ctx)]

    def documents(self, indices: Indices) -> npt.NDArray[np.int64]:
        """Return the number of each token's document in the split, int64 [row ctx]; -1 at BOS.

        A document's EOS belongs to the document. The numbers are indices into `document_names`.

        Raises:
            IndexError: if an index is outside the split.
        """
        documents = np.full((len(indices), self._ctx), -1, dtype=np.int64)
        documents[:, 1:] = np.searchsorted(self._ends, self._places(indices), side="right")
        return documents

    @cached_property
    def document_names(self) -> list[str]:
        try:
            with self._names_path.open("rb") as file:
                return [from_json(line, str) for line in file]
        except (OSError, ValueError) as error:
            problem = f"{self._names_path.name}: {reason(error)}"
            raise UserError(_incomplete(self._names_path.parent, problem)) from error

    def _places(self, indices: Indices) -> npt.NDArray[np.int64]:
        """Return positions in the stream, [row ctx-1]."""
        rows = np.asarray(indices, dtype=np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(
                f"rows {rows.min()} to {rows.max()} were requested, but there are {len(self)}"
            )
        return rows[:, None] * (self._ctx - 1) + np.arange(self._ctx - 1)


@dataclass(frozen=True)
class _Placed:
    """A document of the corpus and its split."""

    split: Split
    name: str
    text: str
    n_bytes: int


class _Corpus:
    """The distinct documents of a source that have text, each with its split.

    A document is left out if it shares a passage with a document of a later split: a train document with one of
    select or report, and a select document with one of report. All passes (learning the BPE, tokenising) use this
    class, so that they agree on the documents.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._source: Source = plugins.pick("soluscope.data.sources", config.data)
        self._held_out: dict[Split, Passages] = {split: Passages() for split in HELD_OUT}
        self._hasher = Hasher()
        self._overlapping: dict[int, bool] = {}
        self.n_duplicates = 0
        self.n_overlapping: Counter[Split] = Counter()
        self.n_skipped = 0
        self.skipped: dict[str, str] = {}

    def read_held_out(self, count: Callable[[_Placed], None]) -> None:
        """Read the corpus once, to learn the passages of its held-out documents."""
        for _, document in self._documents():
            if document.split != "train":
                self._held_out[document.split].add(self._hasher.hashes_of(document.text))
            count(document)

    def documents(self, count: Callable[[_Placed], None]) -> Iterator[_Placed]:
        """Yield the documents in one pass, and reset the counts. `count` is called after each document."""
        self.n_overlapping.clear()
        for identity, document in self._documents():
            if self._is_overlapping(identity, document):
                self.n_overlapping[document.split] += 1
            else:
                yield document
            count(document)

    def _is_overlapping(self, identity: int, document: _Placed) -> bool:
        later = SPLITS[SPLITS.index(document.split) + 1 :]
        if not later:
            return False
        if identity not in self._overlapping:
            hashes = self._hasher.hashes_of(document.text)
            shared = any(self._held_out[split].any_of(hashes) for split in later)
            self._overlapping[identity] = shared
        return self._overlapping[identity]

    def _documents(self) -> Iterator[tuple[int, _Placed]]:
        """Yield each document's hash and the document, and reset the counts."""
        tokens = self._config.tokens
        self.n_duplicates = self.n_skipped = 0
        seen: set[int] = set()
        for document in self._source.documents(self._config.corpus, self._skip):
            if not document.text.strip():
                continue
            try:
                encoded = document.text.encode("utf8")
            except UnicodeEncodeError:
                self._skip(document.name, "contains a lone surrogate, which UTF-8 cannot encode")
                continue
            text_hash = _hash(encoded)
            identity = int.from_bytes(text_hash[:16])  # needs less memory in a set than bytes
            if identity in seen:
                self.n_duplicates += 1
                continue
            seen.add(identity)
            split = _split_of(text_hash, tokens.select_share, tokens.report_share)
            yield identity, _Placed(split, document.name, document.text, len(encoded))

    def more(self) -> str:
        """Return the change of a setting that gives more documents, as a request."""
        return self._source.more(self._config.corpus)

    def _skip(self, what: str, why: str) -> None:
        """Count a skipped document, and print its name unless an earlier pass has done so."""
        self.n_skipped += 1
        if what not in self.skipped and len(self.skipped) < _MOST_NAMED:
            self.skipped[what] = why
            warn(what, why)


@contextlib.contextmanager
def _progress(doing: str) -> Iterator[Callable[[_Placed], None]]:
    """Show a progress bar with the label `doing` on stderr if stderr is a terminal.

    Yields:
        A function that counts a document.
    """
    if not sys.stderr.isatty():
        yield lambda document: None
        return
    from rich.progress import Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}: {task.fields[n_documents]:,} documents"),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console(stderr=True)) as progress:
        task = progress.add_task(doing, total=None, n_documents=0)
        numbers = itertools.count(1)
        yield lambda document: progress.update(
            task, advance=document.n_bytes, n_documents=next(numbers)
        )


def _make(config: Config, key: str, folder: Path) -> None:
    """Write the cache beside `folder`, then rename it to `folder`. The caller holds the lock.

    After an error, no files are left.

    Raises:
        UserError: for the reasons that `prepare` lists.
        OSError: if the cache cannot be written.
    """
    remove_litter(folder.parent, name=folder.name)
    with replacing_folder(folder) as partial:
        _write(config, key, partial)
    TokenCache(folder).remember()


def _write(config: Config, key: str, folder: Path) -> None:
    from importlib.metadata import version

    corpus = _Corpus(config)
    with _progress("comparing held-out documents") as count:
        corpus.read_held_out(count)
    if config.tokens.tokenizer == "bpe":
        with _progress("learning the tokenizer") as count:
            texts = _texts_to_learn(corpus.documents(count), config.tokens)
            vocabulary = tokenizer.learn(texts, config.tokens.d_vocab)
    else:
        vocabulary = tokenizer.load(config.tokens.tokenizer)
    tokenizer_json = vocabulary.tokenizer.to_str(pretty=True).encode("utf8")
    dtype = "uint16" if vocabulary.d_vocab <= _LARGEST_UINT16_VOCAB else "uint32"
    writers, n_bytes = _tokenise(corpus, vocabulary, folder, dtype)
    _check_not_empty(config, corpus, {s: writer.n_documents for s, writer in writers.items()})
    for split, n in corpus.n_overlapping.items():
        n_all = n + writers[split].n_documents
        say(f"left out: {n:,} of {n_all:,} {split} documents, {_OVERLAP}")
    if corpus.n_skipped > len(corpus.skipped):
        warn(f"{corpus.n_skipped - len(corpus.skipped)} more", "reasons like those above")
    meta = {
        "format": _FORMAT,
        "key": key,
        "asked": _asked(config),
        "d_vocab": vocabulary.d_vocab,
        "bos": vocabulary.bos,
        "eos": vocabulary.eos,
        "pad": vocabulary.pad,
        "dtype": dtype,
        "tokenizer": config.tokens.tokenizer,
        "tokenizer_hash": hashlib.sha256(tokenizer_json).hexdigest(),
        "source": config.data,
        "corpus": asdict(config.corpus),
        "shares": {"select": config.tokens.select_share, "report": config.tokens.report_share},
        "splits": {
            split: {
                "n_documents": writer.n_documents,
                "n_tokens": writer.n_tokens,
                "n_bytes": n_bytes[split],
            }
            for split, writer in writers.items()
        },
        "dropped_duplicates": corpus.n_duplicates,
        "dropped_overlapping": {split: corpus.n_overlapping[split] for split in SPLITS[:-1]},
        "skipped": {"count": corpus.n_skipped, "why": corpus.skipped},
        "versions": {"python": platform.python_version(), "tokenizers": version("tokenizers")},
        "sha256": {
            name: checksum(folder / name)
            for split in SPLITS
            for name in (f"{split}.{end}" for end in ENDS)
        },
    }
    (folder / "tokenizer.json").write_bytes(tokenizer_json)
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf8")


def _tokenise(
    corpus: _Corpus, vocabulary: tokenizer.Vocabulary, folder: Path, dtype: str
) -> tuple[dict[Split, _SplitWriter], Counter[Split]]:
    """Write the tokens of each document to its split's files; return the closed writers and the bytes of text."""
    n_bytes: Counter[Split] = Counter()
    with contextlib.ExitStack() as stack:
        writers = {s: stack.enter_context(_SplitWriter(folder, s, dtype)) for s in SPLITS}
        count = stack.enter_context(_progress("tokenising"))
        for batch in _batches(corpus.documents(count)):
            encoded = vocabulary.encode([document.text for document in batch])
            for document, ids in zip(batch, encoded, strict=True):
                writers[document.split].add(document.name, [*ids, vocabulary.eos])
                n_bytes[document.split] += document.n_bytes
    return writers, n_bytes


def _texts_to_learn(documents: Iterator[_Placed], tokens: TokensConfig) -> Iterator[str]:
    """Yield the texts of the train split, up to tokens.train_mb megabytes, and name texts with a very long word."""
    n_bytes = n_long = 0
    for document in documents:
        if document.split != "train":
            continue
        if n_bytes >= tokens.train_mb * 1e6:
            break
        n_bytes += document.n_bytes
        if length := tokenizer.long_word(document.text):
            n_long += 1
            if n_long <= _MOST_NAMED:
                say(
                    f"{document.name}: a word of {length:,} bytes is cut into parts of "
                    f"{tokenizer.LONGEST_WORD} to learn the tokenizer"
                )
        yield document.text
    if n_long > _MOST_NAMED:
        say(f"{n_long - _MOST_NAMED} more documents have such words")


def _batches(documents: Iterator[_Placed]) -> Iterator[list[_Placed]]:
    """Yield batches of about a megabyte of documents: enough for all cores, and small enough for memory."""
    batch: list[_Placed] = []
    n_bytes = 0
    for document in documents:
        batch.append(document)
        n_bytes += document.n_bytes
        if n_bytes >= _BATCH_BYTES:
            yield batch
            batch, n_bytes = [], 0
    if batch:
        yield batch


class _SplitWriter(contextlib.AbstractContextManager["_SplitWriter"]):
    """A writer of one split's files, which adds one document at a time."""

    def __init__(self, folder: Path, split: Split, dtype: str) -> None:
        self._dtype = dtype
        self._offsets_path = folder / f"{split}.offsets.npy"
        self._tokens = (folder / f"{split}.tokens").open("wb")
        self._names = (folder / f"{split}.names.jsonl").open("w", encoding="utf8")
        self._offsets = array("q", [0])

    def add(self, name: str, ids: list[int]) -> None:
        self._tokens.write(np.array(ids, dtype=self._dtype).tobytes())
        self._names.write(json.dumps(name) + "\n")
        self._offsets.append(self._offsets[-1] + len(ids))

    @property
    def n_documents(self) -> int:
        return len(self._offsets) - 1

    @property
    def n_tokens(self) -> int:
        return self._offsets[-1]

    def __exit__(self, *failure: object) -> None:
        with self._tokens, self._names:
            if failure[0] is None:
                np.save(self._offsets_path, np.array(self._offsets, dtype=np.int64))


def _check_not_empty(config: Config, corpus: _Corpus, n_documents: dict[Split, int]) -> None:
    """Refuse a corpus without documents, and a split without documents."""
    n_all = sum(n_documents.values()) + corpus.n_overlapping.total()
    if n_all == 0:
        knobs = ", ".join(f"corpus.{key}={value}" for key, value in asdict(config.corpus).items())
        raise UserError(
            f"the corpus is empty: data={config.data} gave no document with text "
            f"({corpus.n_skipped} skipped); check {knobs}"
        )
    for split, count in n_documents.items():
        if count == 0:
            tokens = config.tokens
            knob = {
                "train": f"lower tokens.select_share={tokens.select_share} "
                f"and tokens.report_share={tokens.report_share}",
                "select": f"raise tokens.select_share={tokens.select_share}",
                "report": f"raise tokens.report_share={tokens.report_share}",
            }[split]
            if n_all < len(SPLITS):  # then no shares help
                knob = "give several hundred documents"
            copies = f" (copies left out: {corpus.n_duplicates})" if corpus.n_duplicates else ""
            if overlapping := corpus.n_overlapping[split]:
                copies += f" ({overlapping} left out, {_OVERLAP})"
            raise UserError(
                f"the {split} split is empty: it received none of {n_all} documents{copies}; "
                f"{corpus.more()}, or {knob}"
            )


@contextlib.contextmanager
def _lock(path: Path, doing: str) -> Iterator[None]:
    """Hold the lock file `path`, after waiting for another process that holds it; a long wait is reported."""
    file = file_lock(path)
    try:
        held = file.acquire(timeout=_PATIENCE_S)
    except Timeout:
        say(f"waiting: another process {doing}")
        held = file.acquire()
    with held:
        yield
