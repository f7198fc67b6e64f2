"""Near-duplicates: no document of an earlier split shares 50 words with a held-out document."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from soluscope.config import load_config
from soluscope.data import passages
from soluscope.data.cache import prepare, split_of
from soluscope.data.passages import WORDS, Hasher, Passages
from soluscope.errors import UserError


def runs_of(text: str) -> set[tuple[str, ...]]:
    """Return the runs of 50 words of a text, found word by word."""
    words = text.lower().split()
    return {tuple(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))}


def words(random: np.random.Generator, n: int, few: int = 1000) -> list[str]:
    return [f"w{i}" for i in random.integers(0, few, n)]


def test_two_texts_share_a_hash_exactly_if_they_share_fifty_words() -> None:
    random = np.random.default_rng(0)
    hashes_of = Hasher().hashes_of
    for _ in range(200):
        first, second = (
            words(random, random.integers(1, 200)),
            words(random, random.integers(1, 200)),
        )
        n_common = random.integers(0, 60)
        common = words(random, n_common)
        texts = [" ".join([*part[:9], *common, *part[9:]]) for part in (first, second)]
        held_out = Passages()
        held_out.add(hashes_of(texts[0]))
        assert held_out.any_of(hashes_of(texts[1])) == bool(runs_of(texts[0]) & runs_of(texts[1]))


def test_equal_runs_have_equal_hashes_wherever_they_stand() -> None:
    random = np.random.default_rng(1)
    text = words(random, 300)
    whole = Hasher().hashes_of(" ".join(text))
    assert len(whole) == 251
    assert len(set(whole.tolist())) == 251
    for start in (0, 7, 250):
        alone = Hasher().hashes_of(" ".join(text[start : start + WORDS]))
        assert alone.tolist() == [whole[start]]


def test_case_and_white_space_do_not_matter_and_short_texts_are_one_passage() -> None:
    hashes_of = Hasher().hashes_of
    assert hashes_of("A short\n text").tolist() == hashes_of("a  short text").tolist()
    assert len(hashes_of("one")) == 1
    assert hashes_of("one two").tolist() != hashes_of("two one").tolist()
    assert hashes_of("one two").tolist() != hashes_of("one two three").tolist()


def test_a_share_of_the_passages_is_kept_where_they_are_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = np.random.default_rng(2)
    texts = [" ".join(words(random, 400, 100_000)) for _ in range(40)]
    hasher, limited = Hasher(), Passages(most=2000)
    for text in texts:
        limited.add(hasher.hashes_of(text))
    assert all(limited.any_of(hasher.hashes_of(text)) for text in texts)
    assert len(limited._kept) <= 2000
    monkeypatch.setattr(passages, "_MOST_WORDS", 10)  # forgets words, not their hashes
    assert all(limited.any_of(hasher.hashes_of(text)) for text in texts)
    assert not limited.any_of(hasher.hashes_of(" ".join(words(random, 400, 100_000))))


def text_in(split: str, begin: str, random: np.random.Generator) -> str:
    """Return a text that begins with these words and is assigned to the split."""
    while True:
        text = begin + " " + " ".join(words(random, 60, 100_000))
        if split_of(text, 0.2, 0.2) == split:
            return text


def test_a_document_that_shares_fifty_words_with_a_later_split_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(3)
    licences = [" ".join(words(random, n, 100_000)) for n in (60, 60, 60, 40)]
    report, select, train, short = licences
    kept = [
        text_in("report", report, random),
        text_in("report", "none", random),
        text_in("select", select, random),
        text_in("select", short, random),
        text_in("train", short, random),  # 40 common words are not enough
        *(text_in("train", train, random) for _ in range(3)),  # inside train nothing is compared
    ]
    dropped = [
        text_in("train", report, random),
        text_in("select", report, random),
        text_in("train", select.upper(), random),
    ]
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in [*dropped, *kept])
    )
    shares = ("tokens.select_share=0.2", "tokens.report_share=0.2", "tokens.d_vocab=300")
    cache = prepare(
        load_config(["variant=solu", "size=tiny", "data=files", f"corpus.paths=[{tmp_path}/texts.jsonl]", *shares,
                     f"tokens.cache_dir={tmp_path}/tokens"])
    )  # fmt: skip
    assert cache.meta["dropped_overlapping"] == {"train": 2, "select": 1}
    decoder = Tokenizer.from_file(str(cache.tokenizer_path))
    found = []
    for split in ("train", "select", "report"):
        stream, offsets = cache.stream(split), cache.offsets(split)
        found += [decoder.decode(stream[a : b - 1]) for a, b in pairwise(offsets)]
    assert sorted(found) == sorted(kept)
    said = capsys.readouterr().err
    assert (
        "left out: 2 of 6 train documents, which share 50 consecutive words with a held-out" in said
    )
    assert "left out: 1 of 3 select documents" in said


def test_a_corpus_of_near_copies_is_refused_with_the_reason(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    licence = " ".join(words(random, 60, 100_000))
    texts = [text_in(split, licence, random) for split in ("train", "select", "report") * 4]
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    config = load_config(
        ["variant=solu", "size=tiny", "data=files", f"corpus.paths=[{tmp_path}/texts.jsonl]",
         "tokens.select_share=0.2", "tokens.report_share=0.2", f"tokens.cache_dir={tmp_path}/tokens"]
    )  # fmt: skip
    with pytest.raises(UserError, match="4 left out, which share 50 consecutive words"):
        prepare(config)


def test_the_standard_library_has_no_passage_in_two_splits(tmp_path: Path) -> None:
    cache = prepare(
        load_config(["variant=solu", "size=tiny", "corpus.max_mb=2", "tokens.d_vocab=1000",
                     f"tokens.cache_dir={tmp_path}"])
    )  # fmt: skip
    decoder = Tokenizer.from_file(str(cache.tokenizer_path))
    found: dict[str, list[set[int]]] = {}
    for split in ("train", "select", "report"):
        stream, offsets = cache.stream(split), cache.offsets(split)
        texts = (decoder.decode(stream[a : b - 1]) for a, b in pairwise(offsets))
        found[split] = [{hash(run) for run in runs_of(text)} for text in texts]
    train = set().union(*found["train"])
    for split in ("select", "report"):
        shared = sum(len(runs & train) for runs in found[split])
        assert shared / sum(map(len, found[split])) < 0.01
    assert sum(cache.meta["dropped_overlapping"].values()) > 0


def test_measurements_take_rows_from_the_beginnings_of_documents(tmp_path: Path) -> None:
    cache = prepare(
        load_config(["variant=solu", "size=tiny", "corpus.max_mb=2", "tokens.d_vocab=1000",
                     f"tokens.cache_dir={tmp_path}"])
    )  # fmt: skip
    rows, offsets = cache.rows("report", 16), cache.offsets("report")
    wanted = []
    for row in range(len(rows)):
        places = np.arange(row * 15, row * 15 + 15)
        owner = np.searchsorted(offsets[1:], places, side="right")
        if ((places - offsets[owner]) < 100).any():
            wanted.append(row)
    everything = rows.spread(10**9, 100)
    assert everything.tolist() == wanted
    assert len(wanted) < len(rows)
    some = rows.spread(50 * 16, 100)
    assert len(some) == 50
    assert set(some.tolist()) <= set(wanted)
    assert (some[0], some[-1]) == (wanted[0], wanted[-1])
    counts = np.bincount(rows.documents(everything)[:, 1:].ravel())
    assert counts.max() <= 100 + 2 * 15  # whole rows are taken, also at the document's end
