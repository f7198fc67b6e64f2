"""Sources, tokenizer and token cache: training reads the whole corpus, and every document once."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import http.server
import json
import lzma
import os
import random
import shutil
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import HANGS_AFTER_S
from tokenizers import Tokenizer, decoders, models

from soluscope import files as all_files
from soluscope import plugins
from soluscope.config import Config, load_config
from soluscope.data import cache as cache_module
from soluscope.data import streams, tokenizer
from soluscope.data.cache import (
    SPLITS,
    TokenCache,
    cache_key,
    of_study,
    open_cache,
    prepare,
    share_with_study,
    split_of,
)
from soluscope.data.sources import Document, Source
from soluscope.data.sources.files import Params, documents
from soluscope.errors import UserError
from soluscope.text import readable

ROOT = Path(__file__).parents[1]
PROSE = ROOT.parent / "shared" / "data" / "prose"
WORDS = ["river", "stone", "été", "def f(x):", "42", "<|BOS|>", "  ", "\n", "naïve", "mountain"]


def text_of(seed: int, n_words: int = 60) -> str:
    return f"document {seed}: " + " ".join(random.Random(seed).choices(WORDS, k=n_words))


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf8")
    return path


def config_of(tmp_path: Path, *words: str) -> Config:
    """Return a configuration in which no split of 80 documents is empty."""
    shares = ("tokens.select_share=0.2", "tokens.report_share=0.2", "tokens.d_vocab=300")
    folder = f"tokens.cache_dir={tmp_path / 'cache'}"
    return load_config(["variant=solu", "size=tiny", folder, *shares, *words])


def files_config(tmp_path: Path, *words: str) -> Config:
    """Return a configuration that reads all files in `tmp_path`/texts."""
    return config_of(tmp_path, "data=files", f"corpus.paths=[{tmp_path}/texts/*.*]", *words)


def documents_of(name: str, *words: str) -> tuple[list[Document], dict[str, str]]:
    """Return a source's documents, and by name the reason for each text that it skipped."""
    config = load_config(["variant=solu", "size=tiny", f"data={name}", *words])
    source: Source = plugins.pick("soluscope.data.sources", name)
    skipped: dict[str, str] = {}
    return list(source.documents(config.corpus, skipped.__setitem__)), skipped


def run_python(
    code: str, *arguments: str, stdin: int | None = None, **environment: str
) -> subprocess.Popen[str]:
    """Start a fresh interpreter that runs `code` and can import soluscope."""
    search_path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": search_path, **environment},
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Write 80 documents, five duplicates and a blank document to `tmp_path`/texts; return the 80."""
    found = [text_of(seed) for seed in range(80)]
    (tmp_path / "texts").mkdir()
    write_jsonl(tmp_path / "texts" / "all.jsonl", [*found, *found[:5], " \n"])
    return found


@pytest.fixture
def cache(tmp_path: Path, texts: list[str]) -> TokenCache:
    return prepare(files_config(tmp_path))


def decoded_documents(cache: TokenCache, split: str) -> list[str]:
    """Return the documents of a split: its stream, cut at its offsets and decoded."""
    decoder = Tokenizer.from_file(str(cache.tokenizer_path))
    stream, offsets = cache.stream(split), cache.offsets(split)
    assert all(stream[offsets[1:] - 1] == cache.meta["eos"])
    pairs = zip(offsets, offsets[1:] - 1, strict=False)
    return [decoder.decode(stream[a:b], skip_special_tokens=False) for a, b in pairs]


# Splits and packing


def test_each_document_is_in_one_split_and_once(cache: TokenCache, texts: list[str]) -> None:
    found = {split: decoded_documents(cache, split) for split in SPLITS}
    assert sorted(text for split in SPLITS for text in found[split]) == sorted(texts)
    for split in SPLITS:
        assert {split_of(text, 0.2, 0.2) for text in found[split]} == {split}
        assert cache.meta["splits"][split]["n_documents"] == len(found[split])
        assert cache.meta["splits"][split]["n_bytes"] == len("".join(found[split]).encode())
    assert cache.meta["dropped_duplicates"] == 5


def test_shares_of_the_splits_are_those_asked_for() -> None:
    splits = [split_of(str(number), 0.1, 0.3) for number in range(4000)]
    assert abs(splits.count("select") / 4000 - 0.1) < 0.02
    assert abs(splits.count("report") / 4000 - 0.3) < 0.03


def test_split_of_a_document_does_not_depend_on_its_corpus(
    tmp_path: Path, cache: TokenCache
) -> None:
    write_jsonl(tmp_path / "texts" / "more.jsonl", [text_of(seed) for seed in range(80, 160)])
    larger = prepare(files_config(tmp_path))
    assert larger.path != cache.path
    for split in SPLITS:
        assert set(decoded_documents(cache, split)) <= set(decoded_documents(larger, split))


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_bos_and_then_the_stream_in_order(cache: TokenCache, split: str) -> None:
    ctx = 17
    rows, stream = cache.rows(split, ctx), cache.stream(split)
    assert len(rows) == len(stream) // (ctx - 1)
    tokens = rows[range(len(rows))]
    assert tokens.dtype == np.int64
    assert tokens.shape == (len(rows), ctx)
    assert (tokens[:, 0] == cache.meta["bos"]).all()
    assert (tokens[:, 1:] != cache.meta["bos"]).all()
    assert (tokens[:, 1:].ravel() == stream[: len(rows) * (ctx - 1)]).all()
    assert (rows[np.array([3, 1])] == tokens[[3, 1]]).all()


def test_eos_stands_after_each_document_and_nowhere_else(cache: TokenCache) -> None:
    for split in SPLITS:
        ends = np.flatnonzero(cache.stream(split) == cache.meta["eos"]) + 1
        assert ends.tolist() == cache.offsets(split)[1:].tolist()


def test_document_numbers_name_the_document_of_each_token(
    cache: TokenCache, texts: list[str]
) -> None:
    rows = cache.rows("train", 9)
    every = range(len(rows))
    tokens, documents = rows[every], rows.documents(every)
    assert (documents[:, 0] == -1).all()
    number_of = documents[:, 1:].ravel()
    # EOS belongs to the document that it ends, so the number rises right after it.
    ended_before = np.cumsum(tokens[:, 1:].ravel() == cache.meta["eos"])
    assert number_of.tolist() == [0, *ended_before[:-1]]
    decoder = Tokenizer.from_file(str(cache.tokenizer_path))
    for number in (0, 3):
        line = int(rows.document_names[number].rsplit(":", 1)[1])
        assert decoder.decode(tokens[:, 1:].ravel()[number_of == number]) == texts[line - 1]


def test_rows_that_are_not_there_are_refused(cache: TokenCache) -> None:
    rows = cache.rows("train", 9)
    for index in (-1, len(rows)):
        with pytest.raises(IndexError):
            rows[[index]]


def test_ctx_longer_than_the_stream_is_refused(cache: TokenCache) -> None:
    n_tokens = cache.meta["splits"]["select"]["n_tokens"]
    assert len(cache.rows("select", n_tokens + 1)) == 1
    with pytest.raises(
        UserError, match=rf"model.ctx={n_tokens + 2} .* select .* {n_tokens} tokens"
    ):
        cache.rows("select", n_tokens + 2)


# Tokenizer


def test_specials_come_first_and_bos_is_prepended_only_on_request(cache: TokenCache) -> None:
    saved = Tokenizer.from_file(str(cache.tokenizer_path))
    assert [saved.id_to_token(i) for i in range(3)] == ["<|BOS|>", "<|EOS|>", "<|PAD|>"]
    assert [cache.meta[name] for name in ("bos", "eos", "pad")] == [0, 1, 2]
    assert cache.meta["d_vocab"] == saved.get_vocab_size() == 300
    assert saved.encode("river").ids == [0, *saved.encode("river", add_special_tokens=False).ids]


def test_digits_are_single_tokens_and_every_byte_has_one() -> None:
    learned = tokenizer.learn(iter(["2024 2024 2024"] * 10), 300)
    pieces = learned.tokenizer.encode("2024", add_special_tokens=False).tokens
    assert pieces == ["2", "0", "2", "4"]
    text = "".join(map(chr, range(1, 3000))) + "\U0001f600"
    [ids] = learned.encode([text])
    assert learned.tokenizer.decode(ids, skip_special_tokens=False) == text


def test_text_that_spells_out_a_special_token_is_text() -> None:
    learned = tokenizer.learn(iter(["a b"]), 300)
    [ids] = learned.encode(["a<|BOS|>b<|EOS|>"])
    assert min(ids) > 2
    assert learned.tokenizer.decode(ids, skip_special_tokens=False) == "a<|BOS|>b<|EOS|>"


def test_learning_twice_gives_the_same_tokenizer() -> None:
    corpus = [text_of(seed) for seed in range(200)]
    first, second = (tokenizer.learn(iter(corpus), 600).tokenizer.to_str() for _ in range(2))
    assert first == second


def test_word_of_any_length_is_cut_for_learning_and_its_document_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts").mkdir()
    for name, part in (("letters", "ab"), ("dashes", "-="), ("blanks", " \t"), ("chinese", "中文")):
        words = [
            text for i in range(80) if split_of(text := f"{part * 2000} {i}", 0.2, 0.2) == "train"
        ]
        ordinary = [f"{text_of(seed)} https://x.org/{'a1' * 200}" for seed in range(80)]
        path = write_jsonl(tmp_path / "texts" / "all.jsonl", [words[0], *ordinary])
        cache = prepare(files_config(tmp_path, "tokens.d_vocab=400"))
        assert max(map(len, Tokenizer.from_file(str(cache.tokenizer_path)).get_vocab())) <= 256
        first = capsys.readouterr().err.splitlines()[0]
        n_bytes = first.partition(f"{path}:1: a word of ")[2].split(" ")[0].replace(",", "")
        assert int(n_bytes) - len((part * 2000).encode()) in (0, 1), (
            name,
            first,
        )  # 1: the last space
        assert words[0] in decoded_documents(cache, "train")
    write_jsonl(path, [f"{'ab' * 200} {i}" for i in range(80)])
    n_train = prepare(files_config(tmp_path)).meta["splits"]["train"]["n_documents"]
    *named, more = capsys.readouterr().err.splitlines()
    assert (len(named), more) == (20, f"{n_train - 20} more documents have such words")


def test_bpe_is_learned_from_the_train_split_alone(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    train = [text for text in map(text_of, range(80)) if split_of(text, 0.2, 0.2) == "train"]
    others = [f"{i} zqzqzqzq zqzqzqzq zqzqzqzq" for i in range(400)]
    others = [text for text in others if split_of(text, 0.2, 0.2) != "train"]
    write_jsonl(tmp_path / "texts" / "all.jsonl", train + others)
    learned = Tokenizer.from_file(str(prepare(files_config(tmp_path)).tokenizer_path))
    assert not [token for token in learned.get_vocab() if "zq" in token]


def test_vocabulary_is_its_real_size_where_the_corpus_gives_fewer_pairs(
    tmp_path: Path, texts: list[str]
) -> None:
    cache = prepare(files_config(tmp_path, "tokens.d_vocab=9000"))
    saved = Tokenizer.from_file(str(cache.tokenizer_path))
    assert cache.meta["d_vocab"] == saved.get_vocab_size() < 9000


def save_word_tokenizer(path: Path, words: list[str]) -> Path:
    """Write a tokenizer.json of whole words, and return its path."""
    from tokenizers import pre_tokenizers

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path.parent.mkdir(exist_ok=True, parents=True)
    made.save(str(path))
    return path


def test_loaded_tokenizer_with_a_large_vocabulary_is_packed_as_uint32(
    tmp_path: Path, texts: list[str]
) -> None:
    words = ["?", *(f"w{i}" for i in range(70_000)), "river", "<s>", "</s>"]
    path = save_word_tokenizer(tmp_path / "mine" / "tokenizer.json", words)
    cache = prepare(files_config(tmp_path, f"tokens.tokenizer={path}"))
    assert (cache.meta["dtype"], cache.meta["d_vocab"]) == ("uint32", 70_004)
    assert (cache.meta["bos"], cache.meta["eos"]) == (70_002, 70_003)
    assert cache.rows("train", 17)[[0]][0, 0] == 70_002
    assert (cache.stream("train") == 70_001).any()
    assert (cache.offsets("train")[1:] - 1).tolist() == np.flatnonzero(
        cache.stream("train") == 70_003
    ).tolist()
    assert tokenizer.load(str(path.parent)).bos == 70_002


def test_tokenizer_with_gaps_in_its_ids_has_a_row_and_a_text_for_every_id(
    tmp_path: Path, cache: TokenCache
) -> None:
    content = json.loads(cache.tokenizer_path.read_text(encoding="utf8"))
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = {t: i if i < 200 else i + 1000 for t, i in vocab.items()}
    path = tmp_path / "gaps" / "tokenizer.json"
    path.parent.mkdir()
    path.write_text(json.dumps(content))
    gaps = prepare(files_config(tmp_path, f"tokens.tokenizer={path}"))
    assert gaps.meta["d_vocab"] == 1300
    saved = Tokenizer.from_file(str(gaps.tokenizer_path))
    texts = tokenizer.texts_of(saved)
    assert len(texts) == 1300
    assert not any(texts[200:1200])
    stream = streams.make("natural", gaps, saved, ctx=17, n_tokens=1000, seed=0)
    assert int(stream.tokens.max()) >= 1200
    wanted = tokenizer.texts_of(Tokenizer.from_file(str(cache.tokenizer_path)))
    old = np.where(stream.tokens < 200, stream.tokens, stream.tokens - 1000)
    assert [stream.vocab[i] for i in stream.tokens.ravel()] == [wanted[i] for i in old.ravel()]


def tokenizer_with(decoder: decoders.Decoder, tokens: list[str]) -> Tokenizer:
    """Return a tokenizer of `tokens`, of the token `a`, and of the special token <s>."""
    made = Tokenizer(models.BPE({token: i for i, token in enumerate([*tokens, "a"])}, []))
    made.add_special_tokens(["<s>"])
    made.decoder = decoder
    return made


LLAMA = [
    decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
]  # fmt: skip


@pytest.mark.parametrize(
    ("decoder", "tokens", "texts"),
    [
        (decoders.Metaspace(), ["▁the", "▁", "▁▁", "all"], [" the", " ", "  ", "all"]),
        (decoders.Sequence(LLAMA), ["▁the", "▁", "all", "<0xE4>", "<0x41>"],
         [" the", " ", "all", "\udce4", "A"]),
        (decoders.ByteLevel(), ["Ġthe", "Ġ", "ĠÃ¤", "Ġä½", "ï¿½", "âĢį"],
         [" the", " ", " ä", " \udce4\udcbd", "\ufffd", "\u200d"]),
        (decoders.WordPiece(), ["the", "##s", ","], [" the", "s", ","]),
    ],
)  # fmt: skip
def test_text_of_a_token_has_its_space_and_its_bytes(
    decoder: decoders.Decoder, tokens: list[str], texts: list[str]
) -> None:
    found = tokenizer.texts_of(tokenizer_with(decoder, tokens))
    assert list(found[: len(tokens)]) == texts
    assert found[-1] == "<s>"


def test_readable_text_of_a_token_shows_what_cannot_be_seen() -> None:
    shown = {
        " the": " the", "é": "é", "中": "中", "e\u0301": "e\u0301", "\ufffd": "\ufffd", "\n\t": "\n\t",
        " ": "␣", "  ": "␣␣", "": "",
        " \udce4\udcb8": r" \xe4\xb8",
        "\u200d": r"\u200d", "\u200b": r"\u200b", "\u00ad": r"\xad", "\ufeff": r"\ufeff",
        "\u0301": r"\u0301", "\ufe0f": r"\ufe0f", "\u202e": r"\u202e", "\xa0": r"\xa0", "\x00": r"\x00",
    }  # fmt: skip
    assert {text: readable(text) for text in shown} == shown


def test_what_lies_beside_a_tokenizer_says_its_bos(tmp_path: Path) -> None:
    path = save_word_tokenizer(tmp_path / "tokenizer.json", ["?", "<s>", "start", "stop"])
    with pytest.raises(UserError, match=r"has no eos_token: .* tokenizer_config.json"):
        tokenizer.load(str(path))
    said = {"bos_token": {"content": "start"}, "eos_token": "stop", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    loaded = tokenizer.load(str(path))
    assert (loaded.bos, loaded.eos, loaded.pad) == (2, 3, 3)


def test_tokenizer_that_is_not_there_or_not_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no such file"):
        tokenizer.load(str(tmp_path / "missing.json"))
    with pytest.raises(UserError, match=r"contains no tokenizer.json"):
        tokenizer.load(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"cannot read"):
        tokenizer.load(str(tmp_path))


# The cache's key


def test_key_changes_with_all_that_determines_the_tokens(tmp_path: Path, texts: list[str]) -> None:
    words = save_word_tokenizer(tmp_path / "a" / "tokenizer.json", ["?", "<s>", "</s>"])
    others = save_word_tokenizer(tmp_path / "b" / "tokenizer.json", ["?", "<s>", "</s>", "more"])
    changed = [
        [],
        ["tokens.d_vocab=301"],
        ["tokens.train_mb=2"],
        ["tokens.select_share=0.3"],
        ["tokens.report_share=0.3"],
        ["corpus.text_field=body"],
        [f"tokens.tokenizer={words}"],
        [f"tokens.tokenizer={others}"],
    ]
    keys = [cache_key(files_config(tmp_path, *change)) for change in changed]
    keys += [
        cache_key(config_of(tmp_path, f"data={source}", *change))
        for source in ("stdlib", "hub")
        for change in ([], ["corpus.max_mb=1"])
    ]
    write_jsonl(tmp_path / "texts" / "all.jsonl", texts[:-1])
    keys.append(cache_key(files_config(tmp_path)))
    assert len(set(keys)) == len(keys)


def test_key_does_not_change_with_what_determines_no_token(
    tmp_path: Path, texts: list[str]
) -> None:
    unchanged = ["seed=3", "variant=gelu", "size=demo", "model.ctx=64", "train.lr=1e-3", "study=x",
                 "tokens.cache_dir=elsewhere"]  # fmt: skip
    keys = {cache_key(files_config(tmp_path, word)) for word in unchanged}
    assert keys == {cache_key(files_config(tmp_path))}


def test_key_of_a_loaded_tokenizer_is_of_its_contents_not_of_d_vocab(
    tmp_path: Path, texts: list[str]
) -> None:
    keys = []
    for name in ("a", "b"):
        path = save_word_tokenizer(tmp_path / name / "tokenizer.json", ["?", "<s>", "</s>"])
        for d_vocab in (300, 400):
            change = (f"tokens.tokenizer={path}", f"tokens.d_vocab={d_vocab}")
            keys.append(cache_key(files_config(tmp_path, *change)))
    assert len(set(keys)) == 1


# The cache on disk


def test_second_preparation_opens_what_the_first_made(tmp_path: Path, cache: TokenCache) -> None:
    before = (cache.path / "meta.json").stat()
    again = prepare(files_config(tmp_path))
    assert again.path == cache.path
    assert (again.path / "meta.json").stat() == before


PREPARE = """
import sys
from soluscope.config import load_config
from soluscope.data import cache
from soluscope.errors import UserError
made, write = [], cache._write
cache._write = lambda *arguments: (made.append(1), write(*arguments))
try:
    print(cache.prepare(load_config(sys.argv[1:])).path, len(made))
except UserError as error:
    sys.exit(f"error: {error}")
"""


def words_of(config: Config) -> list[str]:
    """Return the command line of `files_config`, for another process."""
    return [
        "variant=solu", "size=tiny", "data=files", f"corpus.paths={config.corpus.paths}",
        f"tokens.cache_dir={config.tokens.cache_dir}",
    ]  # fmt: skip


def test_processes_that_start_together_make_one_cache(tmp_path: Path, texts: list[str]) -> None:
    words = words_of(files_config(tmp_path))
    processes = [run_python(PREPARE, *words) for _ in range(3)]
    answers = [process.communicate(timeout=HANGS_AFTER_S) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], answers
    paths, made = zip(*(output.split() for output, _ in answers), strict=True)
    assert len(set(paths)) == 1
    assert sorted(made) == ["0", "0", "1"]
    assert [p.name for p in (tmp_path / "cache").iterdir() if p.is_dir()] == [Path(paths[0]).name]


def test_disk_that_is_full_leaves_nothing_half_written(tmp_path: Path, texts: list[str]) -> None:
    words = words_of(files_config(tmp_path))
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
    process = run_python(limit + PREPARE, *words)
    _, errors = process.communicate(timeout=HANGS_AFTER_S)
    assert process.returncode == 1
    assert errors.startswith("error: cannot write the token cache")
    assert "tokens.cache_dir" in errors
    assert len(errors.splitlines()) == 1
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_what_a_killed_preparation_left_is_no_cache_and_no_obstacle(
    tmp_path: Path, texts: list[str]
) -> None:
    config = files_config(tmp_path)
    partial = tmp_path / "cache" / f".{cache_key(config)}.partial"
    partial.mkdir(parents=True)
    (partial / "train.tokens").write_bytes(b"half")
    assert prepare(config).meta["key"] == cache_key(config)
    assert not partial.exists()


def test_the_next_preparation_removes_what_killed_ones_left(
    tmp_path: Path, texts: list[str]
) -> None:
    config = files_config(tmp_path)
    folder, key = tmp_path / "cache", cache_key(config)
    names = [f".{key}.00000000-1-00000000.part", f".{key}.partial", f".{key}.12345"]
    for name in names:
        (folder / name).mkdir(parents=True)
    other = folder / ".another.00000000-1-00000000.part"  # perhaps being written on another machine
    other.mkdir()
    prepare(config)
    assert not [name for name in names if (folder / name).exists()]
    assert other.exists()


def changed_copy(cache: TokenCache, folder: Path, **changes: Any) -> Path:
    """Return a copy of a cache with other values in its meta.json; None leaves a key out."""
    shutil.copytree(cache.path, folder)
    meta = json.loads((folder / "meta.json").read_text()) | changes
    meta = {key: value for key, value in meta.items() if value is not None}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.mark.parametrize(
    "dtype", ["O", "object", "uint8", "int64", "float64", "V2", ">u2", "M8[s]", 2, None]
)
def test_tokens_of_another_type_than_uint16_and_uint32_are_never_opened(
    cache: TokenCache, tmp_path: Path, dtype: Any
) -> None:
    changed = changed_copy(cache, tmp_path / "changed", dtype=dtype)
    with pytest.raises(UserError, match=r"token cache .* is incomplete \(.*dtype"):
        open_cache(changed)


@pytest.mark.parametrize(
    "changes",
    [
        {"bos": -1}, {"eos": 10**9}, {"pad": "x"}, {"d_vocab": 2**40}, {"d_vocab": 0}, {"splits": {}},
        {"splits": {"train": 1}}, {"kept": ["train", "secret"]}, {"kept": "train"}, {"asked": {}},
        {"shares": {"select": "x", "report": 0.1}}, {"sha256": ["x"]}, {"format": "2"}, {"key": [1]},
        {"d_vocab": 10**400}, {"skipped": None}, {"tokenizer_hash": "0" * 64},
    ],
    ids=str,
)  # fmt: skip
def test_a_cache_whose_meta_is_of_another_form_is_refused_in_one_line(
    cache: TokenCache, tmp_path: Path, changes: dict[str, Any]
) -> None:
    changed = changed_copy(cache, tmp_path / "changed", **changes)
    with pytest.raises(UserError, match=r"^token cache [^\n]*$"):
        open_cache(changed)


def test_counts_that_do_not_fit_the_files_are_refused(cache: TokenCache, tmp_path: Path) -> None:
    counts = cache.meta["splits"]["train"]
    for number, changes in enumerate(
        [
            {"n_tokens": counts["n_tokens"] + 1}, {"n_tokens": 2**62}, {"n_tokens": -2},
            {"n_documents": 0}, {"n_documents": 2**62}, {"n_documents": counts["n_documents"] - 1},
        ]
    ):  # fmt: skip
        splits = cache.meta["splits"] | {"train": counts | changes}
        changed = changed_copy(cache, tmp_path / str(number), splits=splits)
        with pytest.raises(UserError, match=r"is incomplete \(train\."):
            open_cache(changed)


@pytest.mark.parametrize("end", ["tokens", "offsets.npy", "names.jsonl"])
def test_files_of_equal_size_with_other_content_are_refused_before_they_are_used(
    cache: TokenCache, tmp_path: Path, end: str
) -> None:
    changed = changed_copy(cache, tmp_path / "changed")
    path = changed / f"train.{end}"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"train\.{end}|belongs to other documents"):
        open_cache(changed).rows("train", 32)
    open_cache(changed).rows("report", 32)  # the other splits are whole


def test_shuffled_tokens_are_refused_before_training(texts: list[str], tmp_path: Path) -> None:
    config = files_config(tmp_path)
    path = prepare(config).path / "train.tokens"
    times = path.stat()
    path.write_bytes(np.random.default_rng(0).permutation(np.fromfile(path, np.uint16)).tobytes())
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UserError, match=r"the sha256 of train\.tokens is wrong"):
        prepare(config)
    with pytest.raises(UserError, match=r"the sha256 of train\.tokens is wrong"):
        open_cache(path.parent).stream("train")


def test_checksums_are_computed_once_and_again_in_a_copy(
    texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = files_config(tmp_path)
    computed: list[str] = []

    def counted(path: Path) -> str:
        computed.append(path.name)
        return real(path)

    real = all_files.checksum
    monkeypatch.setattr(all_files, "checksum", counted)
    folder = prepare(config).path
    monkeypatch.setattr(all_files, "_checked", {})  # as in another process
    computed.clear()
    prepare(config)
    assert computed == []
    shutil.copytree(folder, tmp_path / "copy")  # with its .checked.json
    prepared = files_config(tmp_path, f"tokens.prepared={tmp_path / 'copy'}")
    prepare(prepared)
    assert len(computed) == 9
    computed.clear()
    monkeypatch.setattr(all_files, "_checked", {})
    prepare(prepared)
    assert computed == []


def test_a_cache_of_an_older_version_without_checksums_is_read_but_no_token_beyond_its_vocabulary(
    cache: TokenCache, tmp_path: Path
) -> None:
    changed = changed_copy(cache, tmp_path / "changed", sha256=None)
    assert (open_cache(changed).rows("train", 32)[[0]] == cache.rows("train", 32)[[0]]).all()
    tokens = np.fromfile(changed / "train.tokens", np.uint16)
    np.full_like(tokens, 65_535).tofile(changed / "train.tokens")
    with pytest.raises(UserError, match=r"contains the token 65535, but has d_vocab="):
        open_cache(changed).rows("train", 32)[[0]]


def test_offsets_that_numpy_would_unpickle_or_that_decrease_are_refused(
    cache: TokenCache, tmp_path: Path
) -> None:
    offsets = np.array(cache.offsets("train"))
    decreasing = np.r_[offsets[:1], offsets[-1] + offsets[1:-1], offsets[-1:]]
    for number, other in enumerate(
        [
            np.array([{}] * len(offsets), dtype=object),
            offsets.astype(float),
            decreasing,
            offsets[:, None],
        ]
    ):
        changed = changed_copy(cache, tmp_path / str(number), sha256=None)
        np.save(changed / "train.offsets.npy", other)
        with pytest.raises(UserError, match=r"is incomplete \("):
            open_cache(changed)
    for content in (
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00\x10\x00{'shape': (2**99,)",
        b"PK\x03\x04",
    ):
        (changed / "train.offsets.npy").write_bytes(content)
        with pytest.raises(UserError, match=r"is incomplete \("):
            open_cache(changed)


def test_folder_that_cannot_be_written_is_refused(tmp_path: Path, texts: list[str]) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"cannot write the token cache .* tokens.cache_dir"):
        prepare(files_config(tmp_path))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("train.tokens", "train.tokens has"),
        ("meta.json", "incomplete"),
        ("select.offsets.npy", "incomplete"),
        ("tokenizer.json", "not the tokenizer that produced the tokens"),
    ],
)
def test_cache_with_a_truncated_file_is_refused(cache: TokenCache, name: str, says: str) -> None:
    path = cache.path / name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=says):
        open_cache(cache.path)


@pytest.mark.parametrize("name", ["report.tokens", "train.names.jsonl", "train.offsets.npy"])
def test_cache_without_one_of_its_files_is_refused(cache: TokenCache, name: str) -> None:
    (cache.path / name).unlink()
    with pytest.raises(UserError, match=f"incomplete.*{name}"):
        open_cache(cache.path)


def test_folder_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no token cache at"):
        prepare(config_of(tmp_path, f"tokens.prepared={tmp_path}"))


def test_carried_cache_is_read_with_numpy_alone(tmp_path: Path, cache: TokenCache) -> None:
    carried = tmp_path / "carried"
    cache.path.rename(carried)
    code = """
import sys
from soluscope.config import load_config
from soluscope.data.cache import prepare
rows = prepare(load_config(sys.argv[1:])).rows("train", 17)
assert rows[[0]].shape == rows.documents([0]).shape == (1, 17) and rows.document_names
heavy = {"datasets", "tokenizers", "transformers", "pyarrow", "rich", "huggingface_hub"}
print(sorted(heavy & set(sys.modules)))
"""
    asked = [f"{key}={json.dumps(value)}" for key, value in cache.meta["asked"].items()]
    words = ["variant=solu", "size=tiny", *asked, f"tokens.prepared={carried}"]
    process = run_python(code, *words)
    output, errors = process.communicate(timeout=HANGS_AFTER_S)
    assert (output.strip(), errors) == ("[]", "")


# A study's copy


def test_study_keeps_its_held_out_tokens_where_it_is_moved(
    tmp_path: Path, cache: TokenCache
) -> None:
    study = tmp_path / "study"
    share_with_study(cache, study)
    shutil.move(study, tmp_path / "moved")
    whole = {split: (cache.rows(split, 17)[[0, 1]], cache.stream(split)) for split in SPLITS}
    names = cache.rows("report", 17).document_names
    shutil.rmtree(cache.path)
    kept = of_study(tmp_path / "moved")
    assert kept is not None
    for split in ("select", "report"):
        rows, stream = whole[split]
        assert (kept.rows(split, 17)[[0, 1]] == rows).all()
        assert (kept.stream(split) == stream).all()
    assert kept.rows("report", 17).document_names == names
    assert kept.meta["key"] == cache.meta["key"]
    with pytest.raises(
        UserError, match=r"holds only the splits select, report: set tokens.prepared"
    ):
        kept.rows("train", 17)


def test_incomplete_copy_in_a_study_is_made_again_and_no_other_tokens_replace_it(
    tmp_path: Path, cache: TokenCache
) -> None:
    study = tmp_path / "study"
    share_with_study(cache, study)
    (study / "tokens" / "report.tokens").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"tokens is incomplete"):
        of_study(study)
    share_with_study(cache, study)
    assert of_study(study) is not None
    other = prepare(files_config(tmp_path, "tokens.d_vocab=301"))
    with pytest.raises(UserError, match="was trained on other tokens"):
        share_with_study(other, study)
    shutil.rmtree(study / "tokens")  # as in a study of an older version
    of_cache = of_study(study)
    assert of_cache is not None
    assert of_cache.path == cache.path
    shutil.rmtree(cache.path)
    assert of_study(study) is None
    (study / "data.json").write_text("{}")
    with pytest.raises(UserError, match=r"data.json lacks key, path, tokenizer_hash: .* delete it"):
        of_study(study)


@pytest.mark.parametrize("patience_s", [HANGS_AFTER_S, 0.0])
def test_only_a_long_wait_for_another_process_is_reported(
    patience_s: float, tmp_path: Path, cache: TokenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs of one sweep that start together wait for each other; nothing is wrong then."""
    said, reported = [], threading.Event()
    monkeypatch.setattr(cache_module, "say", lambda line: (said.append(line), reported.set()))
    monkeypatch.setattr(cache_module, "_PATIENCE_S", patience_s)
    study = tmp_path / "study"
    study.mkdir()
    waits = threading.Thread(target=share_with_study, args=(cache, study))
    with all_files.file_lock(study / ".data.lock"):
        waits.start()
        reported.wait(0.3 if patience_s else HANGS_AFTER_S)
    waits.join(timeout=HANGS_AFTER_S)
    assert (study / "tokenizer.json").is_file()
    line = "waiting: another process is writing the study's tokenizer"
    assert said == ([] if patience_s else [line])


# Sources


def test_every_source_lists_its_parameters_without_heavy_imports() -> None:
    code = """
import sys
from dataclasses import fields
from soluscope import files as all_files
from soluscope import plugins
from soluscope.config_help import help_lines
for name in plugins.names("soluscope.data.sources"):
    params = plugins.pick("soluscope.data.sources", name).params
    lines = [line for line in help_lines(params, "corpus.") if line.startswith("  corpus.")]
    assert [line.split()[0] for line in lines] == [f"corpus.{f.name}" for f in fields(params)]
    assert all(len(line.split()) > 4 for line in lines), lines
print(sorted({"datasets", "tokenizers", "pyarrow", "torch", "numpy"} & set(sys.modules)))
"""
    output, errors = run_python(code).communicate(timeout=HANGS_AFTER_S)
    assert (output.strip(), errors) == ("[]", "")


def test_stdlib_is_pythons_own_code_without_tests_and_packages() -> None:
    found, skipped = documents_of("stdlib")
    names = [document.name for document in found]
    assert names == sorted(set(names))
    assert {"json/decoder.py", "argparse.py"} <= set(names)
    assert not [name for name in names if "site-packages" in name or "/test/" in name]
    assert sum(len(document.text) for document in found) > 5e6
    assert not skipped


def test_max_mb_takes_a_prefix_of_stdlib(tmp_path: Path) -> None:
    everything, _ = documents_of("stdlib")
    prefix, _ = documents_of("stdlib", "corpus.max_mb=0.5")
    assert prefix == everything[: len(prefix)]
    assert 0.3e6 < sum(len(document.text.encode()) for document in prefix) <= 0.5e6
    with pytest.raises(UserError, match=r"corpus.max_mb=-1"):
        documents_of("stdlib", "corpus.max_mb=-1")
    cache = prepare(config_of(tmp_path, "data=stdlib", "corpus.max_mb=0.5"))
    assert cache.meta["corpus"] == {"max_mb": 0.5}


def test_files_gives_the_same_texts_from_each_format(tmp_path: Path) -> None:
    wanted = ["one\r\ntwo", "été", "three\n"]
    for number, text in enumerate(wanted):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
    write_jsonl(tmp_path / "a.jsonl", wanted, field="body")
    pyarrow.parquet.write_table(pyarrow.table({"body": wanted}), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps([{"body": text} for text in wanted], indent=1))
    write_jsonl(tmp_path / "b.ndjson", wanted, field="body")
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with (tmp_path / name).open("w", encoding="utf-8-sig", newline="") as file:
            rows = csv.writer(file, delimiter=delimiter)
            rows.writerows([["id", "body"], *enumerate(wanted)])
    for ending in ("txt", "jsonl", "ndjson", "json", "csv", "tsv", "parquet"):
        words = (f"corpus.paths=[{tmp_path}/**/*.{ending}]", "corpus.text_field=body")
        found, skipped = documents_of("files", *words)
        assert [document.text for document in found] == wanted
        assert len({document.name for document in found}) == 3
        assert not skipped


COMPRESS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda content: pyarrow.compress(content, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("ending", COMPRESS)
def test_compressed_file_gives_its_documents_and_a_truncated_one_is_skipped(
    tmp_path: Path, ending: str
) -> None:
    wanted = [text_of(seed) for seed in range(200)]
    compressed = COMPRESS[ending](write_jsonl(tmp_path / "plain", wanted).read_bytes())
    path = tmp_path / f"A.JSONL.{ending}"
    words = f"corpus.paths=[{path}]"
    path.write_bytes(compressed * 2)  # as several processes append to one file
    found, skipped = documents_of("files", words)
    assert ([document.text for document in found], skipped) == (wanted * 2, {})
    path.write_bytes(compressed[:-10])
    found, skipped = documents_of("files", words)
    assert not found
    assert "cannot be decompressed" in skipped[str(path)]
    (tmp_path / f"a.parquet.{ending}").write_bytes(compressed)
    with pytest.raises(UserError, match=rf"ends in '.parquet.{ending}'"):
        documents_of("files", f"corpus.paths=[{tmp_path}/a.*]")


def test_json_file_holds_an_array_an_object_or_one_object_per_line(tmp_path: Path) -> None:
    record = {"text": "one", "id": 1}
    for content, wanted in (
        (json.dumps([record, {"text": "two"}]), ["one", "two"]),
        (json.dumps(record), ["one"]),
        (json.dumps(record, indent=2), ["one"]),
        (f"{json.dumps(record)}\n{json.dumps(record)}\n", ["one", "one"]),
        ("", []),
    ):
        (tmp_path / "a.json").write_text(content)
        found, skipped = documents_of("files", f"corpus.paths=[{tmp_path}/a.json]")
        assert ([document.text for document in found], skipped) == (wanted, {}), content


@pytest.mark.parametrize("text", [b"\xc3\xa9", "\u00e9"])
def test_text_field_leads_into_nested_records_and_bytes_are_utf8(
    tmp_path: Path, text: str | bytes
) -> None:
    records = [{"meta": {"text": text, "id": 1}}, {"meta": None}]
    table = pyarrow.table({"meta": [record["meta"] for record in records]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"meta.text": [text, None]}), tmp_path / "b.parquet")
    names = ["a.parquet", "b.parquet"]
    if isinstance(text, str):
        names.append("c.jsonl")
        (tmp_path / "c.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    for name in names:
        words = (f"corpus.paths=[{tmp_path / name}]", "corpus.text_field=meta.text")
        found, skipped = documents_of("files", *words)
        assert [document.text for document in found] == ["\u00e9"]
        assert list(skipped) == [f"{tmp_path / name}:2"]
    words = (f"corpus.paths=[{tmp_path}/a.parquet]", "corpus.text_field=meta.body")
    with pytest.raises(UserError, match=r"'meta.body' is not in .*; it has: meta.text, meta.id"):
        documents_of("files", *words)


def test_csv_row_with_broken_quotes_is_skipped_and_a_long_text_is_not(tmp_path: Path) -> None:
    long = "a" * 200_000
    (tmp_path / "a.csv").write_text(f'id,text\n1,"a"b\n2,{long}\n3\n4,"open\n5,lost\n')
    found, skipped = documents_of("files", f"corpus.paths=[{tmp_path}/a.csv]")
    assert [document.text for document in found] == [long]
    assert list(skipped) == [f"{tmp_path}/a.csv:{row}" for row in (1, 3, 4)]


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_json_that_is_nested_too_deeply_is_skipped_by_name(tmp_path: Path, ending: str) -> None:
    deep = '{"text": "deep", "tree": ' + "[" * 200_000 + "]" * 200_000 + "}"
    (tmp_path / f"a.{ending}").write_text('{"text": "flat"}\n' + deep + "\n")
    found, skipped = documents_of("files", f"corpus.paths=[{tmp_path}/a.{ending}]")
    assert [document.text for document in found] == ["flat"]
    assert skipped == {f"{tmp_path}/a.{ending}:2": "not JSON (it is nested too deeply)"}


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("separator", ["\n\n", "\r\n\r\n", "\n---\n"])
def test_separator_matches_line_ends_of_any_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line_end: str, separator: str
) -> None:
    between = separator.replace("\r\n", "\n").replace("\n", line_end)
    wanted = [f"one{line_end}line", "two", "three"]
    (tmp_path / "a.txt").write_bytes(between.join(wanted).encode())
    for n_bytes in (1, 2, 3, 1 << 20):
        monkeypatch.setattr("soluscope.data.sources.files._CHUNK_BYTES", n_bytes)
        params = Params(paths=[f"{tmp_path}/a.txt"], separator=separator)
        assert [document.text for document in documents(params)] == wanted


def test_separator_that_is_in_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    words = (f"corpus.paths=[{tmp_path}/*.txt]", "corpus.separator=<END>")
    with pytest.raises(UserError, match=r"corpus.separator='<END>' is in none of .*separator=null"):
        documents_of("files", *words)
    (tmp_path / "b.txt").write_text("one<END>two")
    found, _ = documents_of("files", *words)
    assert [document.text for document in found] == ["one\ntwo\n", "one", "two"]


def test_separator_cuts_a_file_into_documents_also_across_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("soluscope.data.sources.files._CHUNK_BYTES", 3)
    (tmp_path / "all.txt").write_text("one<END>two\n<END><END>été", encoding="utf8")
    words = (f"corpus.paths=[{tmp_path}/all.txt]", "corpus.separator=<END>")
    found, _ = documents_of("files", *words)
    assert [document.text for document in found] == ["one", "two\n", "", "été"]


def test_what_cannot_be_read_is_named_skipped_and_counted(
    tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "texts"
    (folder / "latin.txt").write_bytes("été".encode("latin1"))
    (folder / "cut.txt").write_bytes("fine until here é".encode()[:-1])
    (folder / "utf16.jsonl").write_bytes('{"text": "x"}'.encode("utf16"))
    (folder / "no.parquet").write_bytes(b"not parquet")
    table = pyarrow.table({"text": ["in the table", None]})
    pyarrow.parquet.write_table(table, folder / "null.parquet")
    broken = ['{"text": "whole"}', '{"text": "hal', "[1]", '{"text": null}', '{"text": "\\ud800"}']
    (folder / "broken.jsonl").write_text("\n".join(broken))
    cache = prepare(files_config(tmp_path))
    skipped = {str(folder / name) for name in ("latin.txt", "cut.txt", "utf16.jsonl", "no.parquet")}
    skipped |= {str(folder / f"broken.jsonl:{line}") for line in (2, 3, 4, 5)}
    skipped |= {str(folder / "null.parquet:2")}
    assert set(cache.meta["skipped"]["why"]) == skipped
    assert cache.meta["skipped"]["count"] == len(skipped)
    errors = capsys.readouterr().err.splitlines()
    assert {line.removeprefix("skipped ").split(": ")[0] for line in errors} == skipped
    assert len(errors) == len(skipped)
    assert sum(cache.meta["splits"][split]["n_documents"] for split in SPLITS) == len(texts) + 2


def test_many_broken_lines_are_counted_and_the_first_named(
    tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts" / "broken.jsonl").write_text("{\n" * 500)
    cache = prepare(files_config(tmp_path))
    assert cache.meta["skipped"]["count"] == 500
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == len(cache.meta["skipped"]["why"]) + 1
    assert errors[-1].startswith(f"skipped {500 - len(errors) + 1} more")


@pytest.mark.parametrize("name", ["texts[1]", "a*b", "what?", "[!x]", "lr=0.1, x"])
def test_pattern_that_is_a_file_is_that_file(tmp_path: Path, name: str) -> None:
    for folder in (tmp_path / name, tmp_path / "texts1"):
        folder.mkdir()
        (folder / f"{name}.txt").write_text(folder.name)
    path = tmp_path / name / f"{name}.txt"
    for pattern in (path, tmp_path / name / "*.txt", tmp_path / name / "**" / "*.txt"):
        (document,) = documents(Params(paths=[str(pattern)]))
        assert (document.name, document.text) == (str(path), name)
    with pytest.raises(UserError, match="it is a folder; give a glob"):
        list(documents(Params(paths=[str(tmp_path / name)])))


def test_glob_that_matches_nothing_and_endings_not_known_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'.*/\*\.txt' matches no file"):
        documents_of("files", f"corpus.paths=[{tmp_path}/*.txt]")
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(
        UserError, match=r"ends in '.pdf'; only .txt, .jsonl, .*.parquet can be read"
    ):
        documents_of("files", f"corpus.paths=[{tmp_path}/*]")
    with pytest.raises(UserError, match=r"corpus.paths.* missing|corpus.paths has no value"):
        documents_of("files")
    with pytest.raises(UserError, match=r"corpus.paths is empty"):
        documents_of("files", "corpus.paths=[]")


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_text_field_that_is_not_there_is_refused(tmp_path: Path, ending: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["x"], field="body")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"corpus.text_field='text' is not in .*; it has: body"):
        documents_of("files", f"corpus.paths=[{tmp_path}/a.{ending}]")


def test_empty_corpus_is_refused_naming_its_knobs(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "blank.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"corpus is empty: data=files .* corpus.paths=\["):
        prepare(files_config(tmp_path))
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_split_without_documents_is_refused_naming_its_share(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    write_jsonl(tmp_path / "texts" / "few.jsonl", [text_of(seed) for seed in range(3)])
    with pytest.raises(UserError, match=r"select split is empty.* tokens.select_share=1e-06"):
        prepare(files_config(tmp_path, "tokens.select_share=1e-6"))


def test_single_document_is_refused_naming_the_setting_that_gives_more(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    path = tmp_path / "texts" / "all.txt"
    path.write_text("\n\n".join(text_of(seed) for seed in range(200)))
    with pytest.raises(
        UserError, match=r"split is empty.* none of 1 documents; set corpus.separator"
    ) as refused:
        prepare(files_config(tmp_path))
    assert "share" not in str(refused.value)
    path.unlink()
    write_jsonl(tmp_path / "texts" / "all.jsonl", ["the same"] * 50)
    with pytest.raises(
        UserError, match=r"none of 1 documents \(copies left out: 49\); add files to corpus.paths"
    ):
        prepare(files_config(tmp_path))
    with pytest.raises(UserError, match=r"split is empty.*; raise corpus.max_mb, or "):
        prepare(config_of(tmp_path, "data=stdlib", "corpus.max_mb=0.03"))


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("english", "raise tokens.d_vocab, or give text with more English words"),
        ("chinese", "give text with English words"),
        ("wordpiece", r"use a tokenizer \(tokens.tokenizer=\) whose tokens are English words"),
    ],
)
def test_advice_for_a_tokenizer_without_whole_words_fits_the_tokenizer(
    tmp_path: Path, kind: str, advice: str
) -> None:
    (tmp_path / "texts").mkdir()
    words = ["tokens.d_vocab=270"]
    texts = [text_of(seed) for seed in range(80)]
    if kind == "chinese":
        words = ["tokens.d_vocab=400"]
        texts = [
            "".join(random.Random(seed).choices("中文字符很多我你他她", k=60)) for seed in range(80)
        ]
    if kind == "wordpiece":
        path = save_word_tokenizer(
            tmp_path / "mine" / "tokenizer.json", ["?", "<s>", "</s>", "river"]
        )
        words = [f"tokens.tokenizer={path}"]
    write_jsonl(tmp_path / "texts" / "all.jsonl", texts)
    cache = prepare(files_config(tmp_path, *words))
    saved = Tokenizer.from_file(str(cache.tokenizer_path))
    for stream in ("random", "repeated", "pairs: induction"):
        with pytest.raises(UserError, match=f"whole word.*: {advice}"):
            streams.make(stream, cache, saved, ctx=32, n_tokens=1000, seed=0)


def test_prose_comes_through_files(tmp_path: Path) -> None:
    shard = PROSE / "validation.parquet"
    if not shard.is_file():
        pytest.skip(f"no real prose at {PROSE}")
    words = ("data=files", f"corpus.paths=[{shard}]", "tokens.d_vocab=1024")
    cache = prepare(config_of(tmp_path, *words))
    counts = cache.meta["splits"].values()
    assert sum(split["n_documents"] for split in counts) == 275
    assert sum(split["n_bytes"] for split in counts) == 1_938_086
    table = pyarrow.parquet.read_table(shard, columns=["text"])
    found = [text for split in SPLITS for text in decoded_documents(cache, split)]
    assert sorted(found) == sorted(table.column("text").to_pylist())


# The hub, on loopback, through the real client

COMMIT = "0" * 40
REPOSITORIES = {
    "someone/tales": {
        "README.md": b"---\nlicense: mit\n---\n",
        "data/train.jsonl": b"".join(
            json.dumps({"text": f"tale {i} " * 20}).encode() + b"\n" for i in range(200)
        ),
    },
    "someone/nested": {
        "train.jsonl": json.dumps({"meta": {"text": "inside", "id": 1}}).encode() + b"\n",
    },
    "someone/code": {
        "train.jsonl": b"".join(
            json.dumps({"content": f"x = {i}\n" * 10}).encode() + b"\n" for i in range(200)
        ),
    },
}


class Hub(http.server.BaseHTTPRequestHandler):
    """The hub's answers to the client's requests for REPOSITORIES."""

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        for repository, files in REPOSITORIES.items():
            api = f"/api/datasets/{repository}"
            if path.startswith(f"/datasets/{repository}/resolve/"):
                self._file(files, path.split("/", 6)[6])
            elif path == api or path.startswith(f"{api}/revision/"):
                siblings = [{"rfilename": name} for name in files]
                self._json({"id": repository, "sha": COMMIT, "siblings": siblings, "tags": []})
            elif path.startswith(f"{api}/tree/{COMMIT}"):
                self._json(self._tree(files, path.removeprefix(f"{api}/tree/{COMMIT}").strip("/")))
            elif path == f"{api}/paths-info/{COMMIT}":
                asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
                names = urllib.parse.parse_qs(asked).get("paths") or json.loads(asked)["paths"]
                self._json([self._entry(files, name) for name in names if name in files])
            else:
                continue
            return
        self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_POST = do_GET

    def log_message(self, *arguments: object) -> None:
        pass

    def _file(self, files: dict[str, bytes], name: str) -> None:
        if name in files:
            etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
            self._answer(200, files[name], {"ETag": etag, "X-Repo-Commit": COMMIT})
        else:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    def _tree(self, files: dict[str, bytes], folder: str) -> list[dict[str, object]]:
        prefix = f"{folder}/" if folder else ""
        below = [name.removeprefix(prefix) for name in files if name.startswith(prefix)]
        folders = sorted({name.split("/")[0] for name in below if "/" in name})
        found = [self._entry(files, prefix + name) for name in below if "/" not in name]
        return found + [{"type": "directory", "path": prefix + f, "oid": COMMIT} for f in folders]

    @staticmethod
    def _entry(files: dict[str, bytes], name: str) -> dict[str, object]:
        oid = hashlib.sha1(files[name]).hexdigest()
        return {"type": "file", "path": name, "size": len(files[name]), "oid": oid}

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    """Yield the address of a hub that has REPOSITORIES."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


HUB_DOCUMENTS = """
import io, json, sys
from contextlib import redirect_stderr
from soluscope.data.sources.hub import HubSet, Params, documents
from soluscope.errors import UserError
for line in sys.stdin:
    asked, found = json.loads(line), []
    with redirect_stderr(io.StringIO()) as errors:
        try:
            params = Params(sets=[HubSet(**s) for s in asked.pop("sets")], **asked)
            found = [(d.name, d.text) for d in documents(params)]
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
    print(json.dumps([found, errors.getvalue()]), flush=True)
"""
TALES = {"path": "someone/tales", "weight": 0.8}
CODE = {"path": "someone/code", "text_field": "content", "weight": 0.2}


Ask = Callable[..., tuple[list[list[str]], str]]
"""Function from a data set's settings to its documents and the lines on stderr."""


@contextmanager
def asking(address: str, home: Path, **environment: str) -> Iterator[Ask]:
    """Yield a function that reads data sets in another process: the client reads HF_ENDPOINT when imported."""
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    process = run_python(HUB_DOCUMENTS, stdin=subprocess.PIPE, **environment)
    assert process.stdin is not None
    assert process.stdout is not None

    def ask(**params: object) -> tuple[list[list[str]], str]:
        print(json.dumps(params), file=process.stdin, flush=True)
        found, errors = json.loads(process.stdout.readline())
        return found, errors

    yield ask
    process.communicate(timeout=HANGS_AFTER_S)
    assert process.returncode == 0


@pytest.fixture(scope="module")
def hub_documents(hub: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    with asking(hub, tmp_path_factory.mktemp("hub")) as ask:
        yield ask


@pytest.fixture(scope="module")
def documents_offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    # Without HF_HUB_OFFLINE, the client would retry for 25 seconds.
    with asking(
        "http://127.0.0.1:9", tmp_path_factory.mktemp("offline"), HF_HUB_OFFLINE="1"
    ) as ask:
        yield ask


@pytest.mark.parametrize("streaming", [True, False])
def test_hub_sets_are_mixed_by_weight_in_bytes(hub_documents: Ask, streaming: bool) -> None:
    found, errors = hub_documents(sets=[TALES, CODE], streaming=streaming, max_mb=0.02)
    assert found, errors
    n_bytes = {"tales": 0, "code": 0}
    for name, text in found:
        # Each document is drawn from the set that is furthest behind its share.
        behind = "tales" if n_bytes["tales"] / 0.8 <= n_bytes["code"] / 0.2 else "code"
        assert name.startswith(f"someone/{behind}:train:")
        n_bytes[behind] += len(text)
    assert 0.02e6 <= sum(n_bytes.values()) < 0.0203e6
    assert abs(n_bytes["tales"] / sum(n_bytes.values()) - 0.8) < 0.01


def test_hub_mix_ends_where_a_set_runs_out_and_says_so(hub_documents: Ask) -> None:
    found, errors = hub_documents(sets=[TALES, {**CODE, "weight": 8}], max_mb=9)
    assert 0 < len(found) < 400
    assert "skipped the rest of someone/tales: someone/code ended" in errors


def test_hub_text_field_leads_into_nested_columns(hub_documents: Ask) -> None:
    nested = {"path": "someone/nested", "text_field": "meta.text"}
    found, errors = hub_documents(sets=[nested], max_mb=1)
    assert [text for _, text in found] == ["inside"], errors


def test_hub_errors_name_the_set_in_one_line(hub_documents: Ask) -> None:
    for asked, says in (
        ({"path": "someone/nothing"}, "cannot read someone/nothing"),
        ({"path": "someone/code"}, "no text_field='text' in someone/code; it has: content"),
        (
            {"path": "someone/nested"},
            "no text_field='text' in someone/nested; it has: meta.text, meta.id",
        ),
        ({"path": "someone/tales", "split": "nowhere"}, "split=nowhere"),
    ):
        found, errors = hub_documents(sets=[asked], max_mb=1)
        assert not found
        assert errors.startswith("error: corpus.sets")
        assert says in errors
        assert len(errors.splitlines()) == 1


def test_hub_that_cannot_be_reached_is_one_line_that_names_the_set(documents_offline: Ask) -> None:
    found, errors = documents_offline(sets=[TALES], max_mb=1)
    assert not found
    assert errors.startswith("error: corpus.sets: cannot read someone/tales")
    assert len(errors.splitlines()) == 1


def test_hub_reads_a_local_folder_of_the_same_layout(
    tmp_path: Path, documents_offline: Ask
) -> None:
    folder = tmp_path / "tales" / "data"
    folder.mkdir(parents=True)
    lines = REPOSITORIES["someone/tales"]["data/train.jsonl"]
    (folder / "train.jsonl").write_bytes(lines)
    sets = [{"path": str(tmp_path / "tales")}]
    found, errors = documents_offline(sets=sets, max_mb=1)
    assert [text for _, text in found] == [json.loads(line)["text"] for line in lines.splitlines()]
    assert errors == ""
    words = ("data=hub", f"corpus.sets=[{{path: {tmp_path}/tales}}]")
    before = cache_key(config_of(tmp_path, *words))
    (folder / "train.jsonl").write_bytes(lines * 2)
    assert cache_key(config_of(tmp_path, *words)) != before


def test_streaming_without_an_end_is_refused() -> None:
    with pytest.raises(UserError, match=r"corpus.max_mb is null, but streaming needs a limit"):
        documents_of("hub", "corpus.max_mb=null")
    with pytest.raises(UserError, match=r"corpus.sets is empty"):
        documents_of("hub", "corpus.sets=[]")
    with pytest.raises(UserError, match=r"corpus.sets\[0\].path"):
        documents_of("hub", "corpus.sets=[{weight: 1}]")


def test_hub_preset_is_web_text_and_code_80_to_20() -> None:
    config = load_config(["variant=solu", "size=tiny", "data=hub"])
    shares = {hub_set.path: hub_set.weight for hub_set in config.corpus.sets}
    assert shares == {"allenai/c4": 0.8, "codeparrot/codeparrot-clean": 0.2}


def test_prepared_cache_that_the_configuration_does_not_describe_is_refused(
    tmp_path: Path, cache: TokenCache
) -> None:
    asked = [f"{key}={json.dumps(value)}" for key, value in cache.meta["asked"].items()]
    words = ["variant=solu", "size=tiny", *asked, f"tokens.prepared={cache.path}"]
    assert prepare(load_config(words)).meta["key"] == cache.meta["key"]
    wrong = load_config([*words, "tokens.d_vocab=4096"])
    with pytest.raises(
        UserError, match=r"made with tokens.d_vocab=\d+, .*has tokens.d_vocab=4096: set tokens.d"
    ):
        prepare(wrong)
