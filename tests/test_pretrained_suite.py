"""`eval/run.py` on pretrained models: small models in the family's layout, in folders, without a network."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import command
from test_pretrained import config_of, reference, repository, tokenizer_files, weights_of
from tokenizers import Tokenizer, models

from soluscope import results
from soluscope.config import EvalConfig, PretrainedConfig, load_typed
from soluscope.data import streams
from soluscope.data.cache import open_cache
from soluscope.errors import UserError
from soluscope.evaluation.pretrained_run import make_run
from soluscope.evaluation.suite import evaluate, evaluate_pretrained
from soluscope.hooked import activations
from soluscope.report import page
from soluscope.report.words import headline
from soluscope.results import (
    Comparison,
    GateResult,
    LeftOut,
    Measurement,
    ProbeWords,
    Record,
    Term,
    TokenValue,
    of_kind,
)

D_VOCAB = 1500
SMALL = ("n_tokens=1000", "n_loss_tokens=2000", "n_draws=200")
PROBES = ("engagement", "gain_variation", "scale_freeze")
CONFIG = config_of(d_vocab=D_VOCAB)
WEIGHTS = weights_of(CONFIG)


def put(folder: Path, config: dict, weights: dict) -> Path:
    """Write a model's folder in the layout of its family."""
    folder.mkdir(parents=True)
    for name, content in (repository(config, weights) | tokenizer_files(D_VOCAB)).items():
        (folder / name).write_bytes(content)
    return folder


def put_small(folder: Path, **changes: object) -> Path:
    config = config_of(d_vocab=D_VOCAB, **changes)
    return put(folder, config, weights_of(config))


def small(runs_dir: Path, *more: str) -> PretrainedConfig:
    return load_typed(PretrainedConfig, [*SMALL, f"runs_dir={runs_dir}", *more], "eval.yaml")


def on_stdlib(folder: Path, *more: str) -> Path:
    """Probe a model's folder on a short text, and return the study's folder."""
    text = ("data=stdlib", "corpus.max_mb=1")
    config = small(folder.parent / "runs", *text, *more)
    return evaluate_pretrained(str(folder), config, lambda text: None).parent


def records_of(study: Path) -> list[Record]:
    return results.read(study / "results.jsonl")


def facts_in(study: Path) -> list[Measurement]:
    """Return the measurements of the facts about the pretrained model."""
    measured = of_kind(records_of(study), Measurement)
    return [each for each in measured if each.probe == "pretrained"]


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """Run the command on a folder, without a reachable hub and without a named text."""
    root = tmp_path_factory.mktemp("pretrained")
    put(root / "solu-tiny", CONFIG, WEIGHTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        asked = (f"probes=[{','.join(PROBES)}]", *SMALL)
        done = command("probe", "solu-tiny", *asked, cwd=root)
    return root, done


@pytest.fixture
def copied(probed, tmp_path, monkeypatch):
    """Copy the folder of `probed`, for a test that changes it; relative paths stay valid."""
    shutil.copytree(probed[0], tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    return tmp_path / "there"


# --- the command ----------------------------------------------------------------------------------


def test_a_folder_is_probed_and_reported_in_a_study_of_its_own(probed):
    root, done = probed
    study = root / "runs" / "solu-tiny"
    assert "report: runs/solu-tiny/report.html" in done.stdout
    for name in (
        "report.html",
        "results.jsonl",
        "tokenizer.json",
        "data.json",
        "solu-tiny/model.json",
    ):
        assert (study / name).is_file(), name
    assert not list(study.rglob("*.safetensors"))
    records = records_of(study)
    kinds = {"measurement", "left out", "token", "gate", "probe"}
    assert {each.kind for each in records} <= kinds
    measured = of_kind(records, Measurement)
    assert {each.probe for each in measured} == {*PROBES, "pretrained", "output_size"}
    assert {each.probe for each in of_kind(records, GateResult)} == set(PROBES)
    assert sorted(each.probe for each in of_kind(records, ProbeWords)) == sorted(PROBES)
    of_model = [*measured, *of_kind(records, TokenValue)]
    assert {(r.study, r.run, r.arm, r.seed) for r in of_model} == {("solu-tiny",) * 3 + (None,)}
    streams_of = {each.stream for each in measured if each.probe == "engagement"}
    assert streams_of == {"natural", "prose", "code", "sentences", "repeated", "random"}
    assert {(each.variant, each.pretrained) for each in of_model} == {("solu_ln", True)}


def test_without_the_hub_the_standard_library_is_read_and_one_line_says_so(probed):
    root, done = probed
    (message,) = (line for line in done.stderr.splitlines() if "data=stdlib" in line)
    assert "data=hub cannot be" in message
    data = json.loads((root / "runs" / "solu-tiny" / "data.json").read_text())
    assert data["source"] == "stdlib"


def test_the_loss_is_that_of_the_familys_formulas_on_the_report_split(probed):
    root, _ = probed
    study = root / "runs" / "solu-tiny"
    cache = open_cache(root / json.loads((study / "data.json").read_text())["path"])
    rows = cache.rows("report", CONFIG["n_ctx"])
    tokens = torch.from_numpy(rows[rows.spread(2000, streams.DOCUMENT_TOKENS)])
    log_p = reference(WEIGHTS, CONFIG, tokens)[:, :-1].log_softmax(-1)
    loss = -log_p.gather(-1, tokens[:, 1:, None]).mean().item()
    (row,) = (row for row in facts_in(study) if row.quantity == "loss")
    assert row.value == pytest.approx(loss, abs=1e-4)
    assert row.n == tokens[:, 1:].numel()


def test_what_is_left_of_1_over_g_squared_without_the_variance_is_epsilon(probed):
    facts = {row.quantity: row for row in facts_in(probed[0] / "runs" / "solu-tiny")}
    weights = (probed[0] / "solu-tiny" / "model_final.pth").read_bytes()
    assert hashlib.sha256(weights).hexdigest()[:12] in facts["n_layers"].note
    assert facts["eps"].value == 1e-5
    assert facts["kappa"].value == pytest.approx(1e-5 * 48**2)
    assert facts["|g^2 (var + eps) - 1|"].value < 1e-5
    # In fp32 the error is about a millionth of the variance, which is about .04 here.
    assert facts["1/g^2 - var"].value == pytest.approx(1e-5, abs=4e-8)


def test_the_second_time_nothing_is_made_anew_and_a_study_is_shown_beside(copied, monkeypatch):
    study = copied / "runs" / "solu-tiny"
    first = copied / "runs" / "first"
    alone = records_of(study)
    ours = [
        replace(each, study="first", run="solu_ln-s0", arm="solu_ln", seed=0, pretrained=False)
        for each in of_kind(alone, Measurement)
        if each.probe in PROBES
    ]
    compared = Comparison(
        study="first", term=Term.LOSS, value=3.0, unit="nats / token", arm="solu_ln", variant="solu_ln",
        cluster="seed", n=2,
    )  # fmt: skip
    gates = [replace(each, study="first") for each in of_kind(alone, GateResult)]
    other_gate = replace(gates[0], probe="rotation")
    words = [replace(each, study="first") for each in of_kind(alone, ProbeWords)]
    other_words = replace(words[0], probe="rotation")
    elsewhere = [*words, other_words, *gates, other_gate, *ours, compared]
    results.write(first / "results.jsonl", elsewhere)
    before = {path: path.stat().st_mtime_ns for path in study.rglob("*.jsonl")}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = (f"probes=[{','.join(PROBES)}]", *SMALL, "study=runs/first")
    done = command("probe", "solu-tiny", *asked, cwd=copied)
    assert done.stderr == "solu-tiny: probed already\n"
    after = {path: path.stat().st_mtime_ns for path in study.rglob("*.jsonl")}
    assert {path.name for path in after if after[path] != before.get(path)} == {"results.jsonl"}
    merged = records_of(study)
    wanted = [*alone, other_words, other_gate, *ours, compared]
    assert Counter(map(results.line, merged)) == Counter(map(results.line, wanted))
    lines = headline(merged)
    assert any(text.startswith("solu-tiny: the gain varies between tokens") for text in lines)
    assert any(text.startswith("Compared here: 1 run of 1 arm (solu_ln)") for text in lines)
    assert any("No loss of solu-tiny is compared" in text for text in lines)
    shown = page.render(merged)
    assert "solu_ln-s0" in shown
    assert (study / "report.html").read_text() == shown
    # Evaluated again as an ordinary study, it resumes, and the study beside it stays.
    seen: list[str] = []
    evaluate(Path("runs/solu-tiny"), load_typed(EvalConfig, asked[:-1], "eval.yaml"), seen.append)
    assert seen == ["solu-tiny: probed already"]
    assert records_of(study) == merged


def test_another_text_makes_all_anew(copied):
    seen: list[str] = []
    asked = ("probes=[engagement]", "data=stdlib", "corpus.max_mb=1")
    evaluate_pretrained("solu-tiny", small(Path("runs"), *asked), seen.append)
    assert "the text is not that of the last time" in seen
    assert any("all results are recomputed" in text for text in seen)
    again: list[str] = []
    evaluate_pretrained("solu-tiny", small(Path("runs"), "probes=[engagement]"), again.append)
    assert again == ["solu-tiny: probed already"]


def test_weights_that_have_changed_since_are_refused(copied):
    study = copied / "runs" / "solu-tiny"
    shutil.rmtree(study / "solu-tiny" / "probes")
    shutil.rmtree(copied / "solu-tiny")
    record = study / "solu-tiny" / "pretrained.json"
    origin = json.loads(record.read_text())
    put(copied / "solu-tiny", CONFIG, weights_of(CONFIG, seed=1))
    record.write_text(json.dumps(origin | {"name": str(copied / "solu-tiny")}))
    config = load_typed(EvalConfig, [*SMALL, "probes=[engagement]"], "eval.yaml")
    with pytest.raises(
        UserError, match=r"other weights now than when .* was made: probe the new weights with"
    ):
        evaluate(study, config, lambda text: None)


# --- other models ---------------------------------------------------------------------------------


def test_a_gelu_model_has_no_norm_to_be_pinned(tmp_path):
    study = on_stdlib(put_small(tmp_path / "gelu", act_fn="gelu"), "probes=[engagement]")
    records = records_of(study)
    measured = of_kind(records, Measurement)
    assert {(each.variant, each.pretrained) for each in measured} == {("gelu", True)}
    r = {
        row.value
        for row in measured
        if (row.probe, row.quantity, row.statistic) == ("engagement", "r", "median")
    }
    assert r == {0.0}
    assert not {row.quantity for row in measured} & {"eps", "kappa", "1/g^2 - var"}
    assert headline(records)[0].startswith("gelu has no norm in its MLP")


def test_what_is_for_one_layer_is_left_out_of_a_deeper_model_and_named(tmp_path):
    folder = put_small(tmp_path / "deep", n_layers=2, final_rms=True)
    records = records_of(on_stdlib(folder, "probes=[engagement,scale_freeze]"))
    measured = of_kind(records, Measurement)
    assert "scale_freeze" not in {row.probe for row in measured}
    assert "scale_freeze" in {each.probe for each in of_kind(records, LeftOut)}
    assert any(row.probe == "engagement" and row.quantity == "r" for row in measured)
    wanted = "deep: probes left out: scale_freeze (exact for one layer only, and the model has 2)."
    assert wanted in headline(records)


def test_models_that_cannot_be_probed_are_refused_and_leave_nothing(tmp_path):
    folder = put_small(tmp_path / "attention", attn_only=True)
    with pytest.raises(UserError, match="the model has no MLP"):
        on_stdlib(folder)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("solu-1k", "no pretrained model called 'solu-1k'. Did you mean 'solu-1l'?"),
        ("nowhere", "no pretrained model called 'nowhere'. There are: "),
    ],
)
def test_a_name_that_is_no_models_is_answered_with_the_nearest(name, says, tmp_path):
    with pytest.raises(UserError) as refused:
        make_run(name, small(tmp_path))
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_taken_is_not_written_over(tmp_path):
    folder = put_small(tmp_path / "model")
    runs = tmp_path / "runs"
    with pytest.raises(UserError, match=r"is the model's own folder: choose another runs_dir= for"):
        make_run(str(folder), small(tmp_path))
    (runs / "model").mkdir(parents=True)
    (runs / "model" / "data.json").write_text("{}")
    with pytest.raises(UserError, match="is a study of other runs: choose another runs_dir="):
        make_run(str(folder), small(runs))
    with pytest.raises(UserError, match="study=runs/none has no results: make them with"):
        make_run(str(folder), small(runs, "study=runs/none"))


def test_two_studies_with_runs_of_one_name_are_not_put_on_one_page(tmp_path):
    row = Comparison(study="one", term=Term.LOSS, value=1.0, unit="nats", arm="solu_ln")
    for study in ("one", "two"):
        results.write(tmp_path / study / "results.jsonl", [replace(row, study=study)])
    both = f"study=[{tmp_path / 'one'},{tmp_path / 'two'}]"
    with pytest.raises(UserError, match="two and one both have runs of solu_ln"):
        make_run("solu-1l", small(tmp_path, both))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data=stdlb"], "Did you mean 'stdlib'?"),
        (["data=files"], "corpus.paths has no value"),
        (["corpus.max_md=3"], "Did you mean 'corpus.max_mb'?"),
        (["corpus=3"], "set keys below corpus"),
    ],
)
def test_a_text_that_is_none_is_refused_before_anything_is_loaded(words, says):
    with pytest.raises(UserError) as refused:
        load_typed(PretrainedConfig, words, "eval.yaml")
    assert says in str(refused.value)


def test_of_the_hub_little_is_read_unless_more_is_asked_for():
    def asked(*words: str) -> float:
        return load_typed(PretrainedConfig, words, "eval.yaml").text("hub", "bpe").corpus.max_mb

    assert asked() == 20
    assert asked("corpus.max_mb=300") == 300


# --- texts ----------------------------------------------------------------------------------------


def test_sentences_are_plain_and_of_graded_length():
    texts = streams.prompts("sentences")
    assert len(texts) >= 100
    assert len(set(texts)) == len(texts)
    lengths = [len(text.split()) for text in texts]
    assert lengths == sorted(lengths)
    assert (lengths[0], 55 <= lengths[-1] <= 65) == (3, True)
    by_ten = Counter((n - 1) // 10 for n in lengths)
    assert all(10 <= by_ten[ten] <= 30 for ten in range(6)), by_ten
    assert max(b - a for a, b in pairwise(lengths)) <= 3
    for text in texts:
        assert text.isascii()
        assert text[0].isupper()
        assert text[-1] == "."


def test_the_word_lists_are_words_each_once():
    repeatable, common = streams.prompts("repeatable"), streams.prompts("words")
    assert len(repeatable) == streams.N_ROWS
    assert len(common) >= 500
    for one in (repeatable, common):
        assert len(set(one)) == len(one)
        assert all(word.isascii() and word.isalpha() and word.islower() for word in one)


def tokenizer_of(words: list[str]) -> Tokenizer:
    """Return a tokenizer with one token per word, each after a space; any other text is unknown words."""
    vocab = {"<bos>": 0, "<unk>": 1} | {f"Ġ{word}": 2 + i for i, word in enumerate(words)}
    return Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))


def words_in(name: str, words: list[str]) -> list[list[str]]:
    """Return the rows of a stream that needs no corpus, as words."""
    cache = SimpleNamespace(meta={"bos": 0})
    stream = streams.make(name, cache, tokenizer_of(words), ctx=64, n_tokens=1280, seed=0)
    return [[stream.vocab[i].strip("Ġ ") for i in row[1:]] for row in stream.tokens.tolist()]


def test_repeated_and_random_words_are_the_shipped_ones_where_the_tokenizer_has_them():
    others = [f"zz{a}{b}" for a in "abcdefghijklmnop" for b in "abcdefghijklmnop"]
    lists = {name: streams.prompts(name) for name in ("repeatable", "words")}
    every = sorted({*lists["repeatable"], *lists["words"], *others})
    repeated = words_in("repeated", every)
    assert sorted(row[0] for row in repeated) == sorted(lists["repeatable"])
    assert all(len(set(row)) == 1 for row in repeated)
    drawn = {word for row in words_in("random", every) for word in row}
    assert drawn <= set(lists["words"])
    assert len(drawn) > 400


def test_where_the_tokenizer_has_few_of_them_its_own_words_fill_up():
    others = [f"zz{a}{b}" for a in "abcdefghijklmnop" for b in "abcdefghijklmnop"]
    some = streams.prompts("repeatable")[:3]
    repeated = [row[0] for row in words_in("repeated", [*some, *others])]
    assert len(set(repeated)) == len(repeated) == streams.N_ROWS
    assert set(some) < set(repeated)
    drawn = {word for row in words_in("random", [*some, *others]) for word in row}
    assert 150 < len(drawn) <= streams.N_RANDOM_WORDS


def test_the_sentences_of_a_stream_are_of_all_lengths_and_units_of_their_own():
    tokenizer = Tokenizer.from_str(tokenizer_files(D_VOCAB)["tokenizer.json"].decode())
    cache = SimpleNamespace(meta={"bos": tokenizer.token_to_id("<|BOS|>")})
    stream = streams.make("sentences", cache, tokenizer, ctx=1024, n_tokens=2000, seed=0)
    assert 1500 < stream.n_tokens < 2500
    assert len(set(stream.string[:, 0].tolist())) == len(stream.tokens) >= 20
    texts = streams.prompts("sentences")
    numbers = stream.string[:, 0].tolist()
    assert (numbers[0], numbers[-1]) == (0, len(texts) - 1)
    read = tokenizer.decode(stream.tokens[-1, 1:][stream.keep[-1, 1:]].tolist())
    assert texts[-1].startswith(read.strip())
    assert len(read.split()) > 20
    assert streams.unit_of("sentences") == "string"
    # With rows of up to 1024 tokens there would be only two rows, too few for an interval.
    assert stream.tokens.shape[1] <= streams.FEWEST_TOKENS


def test_few_tokens_of_a_long_context_still_come_in_many_rows(probed):
    root, _ = probed
    data = json.loads((root / "runs" / "solu-tiny" / "data.json").read_text())
    cache = open_cache(root / data["path"])
    tokenizer = Tokenizer.from_file(str(cache.tokenizer_path))
    for n_tokens, width in ((2000, 64), (10_000, 250), (50_000, 1024)):
        stream = streams.make("natural", cache, tokenizer, 1024, n_tokens, 0)
        assert stream.tokens.shape[1] == width
        assert len(stream.tokens) == n_tokens // width


def test_a_model_with_a_large_vocabulary_reads_fewer_rows_at_once(monkeypatch):
    assert activations.rows_at_once(64, 4096) == 16
    assert activations.rows_at_once(1024, 48262) == 1
    for width, d_vocab in ((128, 48262), (312, 48262), (1024, 48262)):
        n = activations.rows_at_once(width, d_vocab)
        assert n * width * d_vocab <= 2**26
        assert (n + 1) * width * d_vocab > 2**26


def test_nothing_depends_on_how_many_rows_are_read_at_once(tmp_path, monkeypatch):
    from soluscope.hooked.pretrained import load_pretrained

    model = load_pretrained(str(put(tmp_path / "model", CONFIG, WEIGHTS)))
    rng = np.random.default_rng(0)
    rows = [(i, rng.integers(3, 1000, size=20).tolist()) for i in range(7)]
    stream = streams.from_rows(rows, model.facts.bos, 32, "some")
    whole = activations.observe(model, stream)
    monkeypatch.setattr(activations, "LOGITS_AT_ONCE", 1)
    one_by_one = activations.observe(model, stream)
    for name in ("loss", "mid", "post", "scale"):
        torch.testing.assert_close(
            getattr(one_by_one, name), getattr(whole, name), rtol=1e-5, atol=1e-5, equal_nan=True
        )
