"""The functions of `import soluscope`, against the files they read, hooks in fp64 and closed forms."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from _page import figures_in
from _records import LN, RUN, number, token_values, words
from conftest import run_python
from IPython.core.completer import IPCompleter, provisionalcompleter
from IPython.core.interactiveshell import InteractiveShell

import soluscope
from soluscope import UserError, plugins, results
from soluscope.notebook.examples import Example, Examples
from soluscope.report import packing, page
from soluscope.results import Comparison, Figure, Term, Untrained
from soluscope.text import readable

NASTY = "<script>alert(1)</script>\x1b[31m$x$"
CTX = 32


@pytest.fixture(scope="module")
def run_dir(tiny_study: Path) -> Path:
    return tiny_study / "solu_ln-s0"


@pytest.fixture(scope="module")
def model(run_dir: Path) -> Any:
    return soluscope.load(run_dir)


# --- names ----------------------------------------------------------------------------------------


def test_the_names_are_the_public_ones_and_need_no_torch() -> None:
    code = "import soluscope, sys; print(*dir(soluscope), '|', *sys.modules)"
    names, _, modules = run_python("-c", code).stdout.partition("|")
    assert names.split() == soluscope.__all__ == sorted(soluscope.__all__)
    assert {"tokens", "top_examples", "logit_effect", "quantities", "study"} <= set(names.split())
    assert not {"torch", "pandas", "transformer_lens"} & set(modules.split())


@pytest.mark.parametrize("name", soluscope.__all__)
def test_every_public_name_can_be_imported_and_is_documented(name: str) -> None:
    assert getattr(soluscope, name).__doc__


def test_completion_shows_the_public_names_only() -> None:
    shell = InteractiveShell.instance()
    shell.user_ns["soluscope"] = soluscope
    completer = IPCompleter(shell=shell, namespace=shell.user_ns)
    with provisionalcompleter():
        found = [each.text for each in completer.completions("soluscope.", len("soluscope."))]
    names = {each.rpartition(".")[2] for each in found}
    assert {name for name in names if not name.startswith("_")} == set(soluscope.__all__)


# --- tokens ---------------------------------------------------------------------------------------


def stream(folder: Path, split: str) -> np.ndarray:
    """Return a split's tokens, read from the file without the package."""
    dtype = json.loads((folder / "meta.json").read_text())["dtype"]
    return np.fromfile(folder / f"{split}.tokens", dtype=dtype).astype(np.int64)


@pytest.mark.parametrize("split", ["select", "report"])
def test_held_out_tokens_are_the_studys_copy_with_bos_first(
    model: Any, run_dir: Path, split: str
) -> None:
    tokens = soluscope.tokens(model, split)
    wanted = stream(run_dir.parent / "tokens", split)
    assert tokens.dtype == torch.int64
    assert (tokens[:, 0] == model.facts.bos).all()
    whole_rows = len(wanted) // (CTX - 1) * (CTX - 1)
    np.testing.assert_array_equal(tokens[:, 1:].flatten().numpy(), wanted[:whole_rows])
    torch.testing.assert_close(tokens, soluscope.tokens(str(run_dir), split))
    assert model(tokens[:2]).isfinite().all()


def test_train_tokens_come_from_the_whole_cache_and_without_it_one_line_names_prepared(
    run_dir: Path, tmp_path: Path
) -> None:
    path = Path(json.loads((run_dir.parent / "data.json").read_text())["path"])
    wanted = stream(path, "train")
    rows = soluscope.tokens(run_dir, "train")
    np.testing.assert_array_equal(rows[:, 1:].flatten().numpy(), wanted[: rows[:, 1:].numel()])

    moved = tmp_path / "tiny"
    shutil.copytree(run_dir, moved / run_dir.name)
    shutil.copytree(run_dir.parent / "tokens", moved / "tokens")
    shutil.copy(run_dir.parent / "tokenizer.json", moved)
    facts = json.loads((run_dir.parent / "data.json").read_text())
    (moved / "data.json").write_text(json.dumps(facts | {"path": str(tmp_path / "gone")}))
    here = moved / run_dir.name
    torch.testing.assert_close(soluscope.tokens(here), soluscope.tokens(run_dir))
    with pytest.raises(UserError, match=r"no train split.*is gone: set prepared= to") as error:
        soluscope.tokens(here, "train")
    assert facts["key"] in str(error.value)
    assert "\n" not in str(error.value)
    torch.testing.assert_close(soluscope.tokens(here, "train", prepared=path), rows)


def test_n_tokens_gives_the_rows_on_which_a_loss_of_as_many_tokens_is_measured(
    model: Any, run_dir: Path
) -> None:
    from soluscope.data import streams
    from soluscope.data.cache import open_cache

    cache = open_cache(run_dir.parent / "tokens")
    wanted = streams.from_cache(cache, "report", CTX, 640, "report")
    torch.testing.assert_close(soluscope.tokens(model, n_tokens=640), wanted.tokens)
    assert soluscope.tokens(model, n_tokens=640).shape == (640 // CTX, CTX)


# --- top_examples ---------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["hook_mid", "hook_post"])
def test_top_examples_are_each_documents_largest_activations(
    model: Any, run_dir: Path, hook: str
) -> None:
    found = soluscope.top_examples(model, 7, n=3, hook=hook)
    tokens = soluscope.tokens(model, n_tokens=50_000)
    _, cache = model.run_with_cache(tokens)
    values = cache[f"blocks.0.mlp.{hook}"][:, :, 7]
    names = [
        json.loads(line)
        for line in (run_dir.parent / "tokens/report.names.jsonl").read_text().splitlines()
    ]
    offsets = np.load(run_dir.parent / "tokens/report.offsets.npy")
    everything = soluscope.tokens(model).tolist()
    best: dict[str, float] = {}
    for row, of_row in zip(tokens.tolist(), values.tolist(), strict=True):
        first = everything.index(row) * (CTX - 1)
        for pos in range(1, CTX):
            document = int(np.searchsorted(offsets, first + pos - 1, side="right")) - 1
            name = names[document]
            best[name] = max(best.get(name, -np.inf), of_row[pos])
    wanted = sorted(best.items(), key=lambda item: -item[1])[:3]
    assert [each.document for each in found] == [name for name, _ in wanted]
    assert [each.activation for each in found] == pytest.approx([v for _, v in wanted], rel=1e-5)
    for each in found:
        assert float(values[each.row, each.pos]) == pytest.approx(each.activation, rel=1e-5)


def test_the_context_stays_in_the_document_and_rows_of_ones_own_text_end_at_eos(model: Any) -> None:
    facts = model.facts
    words = model.to_tokens("abcdefgh", prepend_bos=False)[0].tolist()
    row = [facts.bos, *words, facts.eos, *words]
    found = soluscope.top_examples(model, 3, n=5, tokens=torch.tensor([row]), context=100)
    assert [each.document for each in found] == ["row 0"] * 2  # two documents, then none is left
    for each in found:
        text = each.before + each.token + each.after
        assert text == ("abcdefgh<|EOS|>" if each.pos <= len(words) + 1 else "abcdefgh")
    near = soluscope.top_examples(model, 3, n=1, tokens=torch.tensor([row]), context=1)[0]
    assert len(model.to_tokens(near.before, prepend_bos=False)[0]) <= 1
    assert soluscope.top_examples(model, 3, tokens=[row], context=0)[0].before == ""


def test_equal_activations_are_found_in_reading_order_and_bos_and_padding_never(model: Any) -> None:
    texts = model.to_tokens(["abc abc", "a", "abc abc"])
    found = soluscope.top_examples(model, 0, tokens=texts)
    assert len(found) == 3
    first, again = (each for each in found if each.row != 1)
    assert (first.row, again.row) == (0, 2)
    assert first.activation == again.activation
    assert "<|" not in "".join(each.before + each.token + each.after for each in found)


def test_a_character_in_several_tokens_is_shown_whole_in_the_context(model: Any) -> None:
    texts = model.to_tokens(["a\u00e9\U0001f600b"])
    shown = (soluscope.top_examples(model, neuron, 1, texts)[0] for neuron in range(128))
    of_b = next(each for each in shown if each.token == "b")
    assert of_b.before.endswith("\u00e9\U0001f600")


def test_a_model_without_a_mid_norm_has_mid_equal_to_post(tiny_study: Path) -> None:
    plain = soluscope.load(tiny_study / "solu-s0")
    mid, post = (soluscope.top_examples(plain, 1, 2, hook=h) for h in ("hook_mid", "hook_post"))
    assert list(mid) == list(post)


def test_text_from_data_is_escaped_wherever_examples_are_shown() -> None:
    found = Examples(NASTY, [Example(1.5, NASTY, 0, 3, readable(NASTY), "<b>", "&\n")])
    html = found._repr_html_()
    assert "<script" not in html
    assert "\x1b" not in html
    assert "<mark>&lt;b&gt;</mark>&amp;\n" in html
    assert re.match(r'<div class="tex2jax_ignore mathjax_ignore">', html)
    assert len(repr(found).splitlines()) == 2
    assert "\x1b" not in repr(found)
    assert pd.DataFrame(found)["activation"].tolist() == [1.5]


# --- logit_effect ---------------------------------------------------------------------------------


@torch.no_grad()
def test_logit_effect_is_the_change_of_the_logits_with_the_scale_of_ln_final_held(
    model: Any,
) -> None:
    neuron, d_vocab = 11, model.cfg.d_vocab
    exact = soluscope.load(model.run_dir).to(torch.float64, print_details=False)
    tokens = soluscope.tokens(model, n_tokens=32)
    _, cache = exact.run_with_cache(tokens)
    scale = cache["ln_final.hook_scale"]

    def add_one(post: torch.Tensor, hook: Any) -> torch.Tensor:
        post[:, :, neuron] += 1
        return post

    hooks = [
        ("blocks.0.mlp.hook_post", add_one),
        ("ln_final.hook_scale", lambda live, hook: scale),
    ]
    change = (exact.run_with_hooks(tokens, fwd_hooks=hooks) - exact(tokens)) * scale
    table = soluscope.logit_effect(model, neuron, n=d_vocab)
    highest = table[table["side"] == "highest"].sort_values("token")["logit"]
    for at in change.flatten(0, 1):
        np.testing.assert_allclose(highest, at, atol=1e-9)
    few = soluscope.logit_effect(model, neuron, n=4)
    ordered = np.sort(change[0, 0].numpy())
    np.testing.assert_allclose(few["logit"], [*ordered[:-5:-1], *ordered[:4]], atol=1e-9)
    assert few["side"].tolist() == ["highest"] * 4 + ["lowest"] * 4
    assert few["text"].map(len).all()


def test_logit_effect_of_a_neuron_that_writes_one_coordinate_is_a_row_of_the_unembedding(
    run_dir: Path,
) -> None:
    """W_out = e_k and w = 2 give B = 2 (W_U[k] - mean over coordinates of W_U)."""
    planted = soluscope.load(run_dir)
    planted.blocks[0].mlp.W_out.data[4] = torch.eye(planted.cfg.d_model)[9]
    planted.ln_final.w.data.fill_(2)
    W_U = planted.unembed.W_U.detach().double()
    wanted = 2 * (W_U[9] - W_U.mean(0))
    table = soluscope.logit_effect(planted, 4, n=1)
    assert table["token"].tolist() == [int(wanted.argmax()), int(wanted.argmin())]
    assert table["logit"].tolist() == pytest.approx([float(wanted.max()), float(wanted.min())])


# --- bad input ------------------------------------------------------------------------------------

BAD: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a study": (lambda m: soluscope.tokens(m.run_dir.parent), "is a study.*folder of one run"),
    "no run": (lambda m: soluscope.tokens("/nowhere/x"), "the run does not exist"),
    "no model": (lambda m: soluscope.tokens(None), "type NoneType: give a model from"),
    "split": (lambda m: soluscope.tokens(m, "test"), "no split called 'test'.*train, select, rep"),
    "n_tokens": (lambda m: soluscope.tokens(m, n_tokens=0), "n_tokens=0 .* of 1 or more"),
    "neuron": (lambda m: soluscope.top_examples(m, 128), "neuron=128 .* from 0 to 127"),
    "half": (lambda m: soluscope.logit_effect(m, 0.5), "neuron=0.5 .* from 0 to 127"),
    "n": (lambda m: soluscope.logit_effect(m, 0, 513), "n=513 .* from 1 to 512"),
    "folder": (lambda m: soluscope.top_examples("x", 0), r"type str.*soluscope.load\(folder\)"),
    "hook": (lambda m: soluscope.top_examples(m, 0, hook="hook_pre"), "no hook called 'hook_pre'"),
    "text": (lambda m: soluscope.top_examples(m, 0, tokens="a"), "type str, wanted whole num"),
    "ragged": (lambda m: soluscope.top_examples(m, 0, tokens=[[1], [1, 2]]), "type list, wanted"),
    "shape": (lambda m: soluscope.top_examples(m, 0, tokens=[1, 2]), r"int64 \[2\], wanted"),
    "floats": (lambda m: soluscope.top_examples(m, 0, tokens=[[1.0]]), r"float32 \[1, 1\], wan"),
    "range": (lambda m: soluscope.top_examples(m, 0, tokens=[[512]]), "but the model's are 0 to 511"),
    "only BOS": (lambda m: soluscope.top_examples(m, 0, tokens=[[m.facts.bos]]), "only BOS and"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line(model: Any, case: str) -> None:
    call, wanted = BAD[case]
    with pytest.raises(UserError, match=wanted) as error:
        call(model)
    assert "\n" not in str(error.value)


def test_a_model_of_no_study_needs_tokens(run_dir: Path) -> None:
    alone = soluscope.load(run_dir)
    alone.run_dir = None
    with pytest.raises(UserError, match="was loaded from no study: set tokens="):
        soluscope.top_examples(alone, 0)
    with pytest.raises(UserError, match="was loaded from no study: give a model from"):
        soluscope.tokens(alone)
    assert len(soluscope.top_examples(alone, 0, tokens=alone.to_tokens("some text"))) == 1


# --- quantities -----------------------------------------------------------------------------------


def test_quantities_are_those_that_the_probes_declare() -> None:
    table = soluscope.quantities()
    assert list(table) == ["probe", "quantity", "unit", "meaning", "confirmatory"]
    assert not table.duplicated(["probe", "quantity"]).any()
    for name in plugins.names("soluscope.probes"):
        probe = plugins.pick("soluscope.probes", name)
        rows = table[table["probe"] == name]
        assert rows["quantity"].tolist() == [*probe.quantities, *probe.estimates]
        tested = [probe.tested] if probe.confirmatory else []
        assert rows[rows["confirmatory"]]["quantity"].tolist() == tested
    assert (table["meaning"].str.len() > 0).all()
    assert table["probe"].iloc[0] == "engagement"  # P1


# --- study ----------------------------------------------------------------------------------------


def records() -> list[results.Record]:
    """Return records of every kind that has a table, with a text that must be escaped."""
    loss = number("loss", "loss", 3.5, unit="nats / token", note=NASTY)
    return [
        replace(LN, n=2, values={"lr": 0.01, "kappa": 2.0}, chain=(results.Step("solu"), results.Step("solu_ln"))),
        loss,
        replace(loss, run="solu_ln-s1", seed=1, value=3.6),
        replace(loss, probe="training", x=10.0),
        words("engagement"),
        number("engagement", "r", 0.5, statistic="median", unit="share"),
        Untrained(**{k: getattr(RUN, k) for k in ("study", "run", "arm", "variant", "seed")},
                  probe="engagement", quantity="r", value=0.1, unit="share", difference=0.4),
        Comparison(study="synthetic", arm="solu_ln", term=Term.LOSS, value=3.55, unit="nats / token",
                   n=2, cluster="seed"),
        *token_values(["a", "\n"]),
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    results.write(tmp_path / "results.jsonl", records())
    return tmp_path


def test_a_studys_tables_are_the_lines_of_results_jsonl(folder: Path) -> None:
    found = soluscope.study(folder)
    lines = [json.loads(each) for each in (folder / "results.jsonl").read_text().splitlines()]
    tables = {
        "losses": [each for each in lines if each.get("probe") == "loss"],
        "comparisons": [each for each in lines if each["kind"] == "comparison"],
        "untrained": [each for each in lines if each["kind"] == "untrained"],
        "tokens": [each for each in lines if each["kind"] == "token"],
        "probes": [
            each
            for each in lines
            if each["kind"] == "measurement" and each["probe"] not in ("loss", "training")
        ],
    }
    for name, wanted in tables.items():
        table = getattr(found, name)
        assert len(table) == len(wanted) > 0, name
        for column in set(table) & {
            "value",
            "arm",
            "run",
            "seed",
            "quantity",
            "term",
            "difference",
        }:
            read = [None if pd.isna(each) else each for each in table[column]]
            assert read == [each[column] for each in wanted], (name, column)
    assert found.settings[["arm", "role", "lr", "kappa", "chain"]].to_dict("records") == [
        {"arm": "solu_ln", "role": "per_token", "lr": 0.01, "kappa": 2.0, "chain": "solu -> solu_ln"}
    ]  # fmt: skip
    assert repr(found) == f"Study {folder}: 2 runs, 1 arm, 1 probe, {len(lines)} records"


def test_a_studys_figures_are_those_of_its_page(folder: Path) -> None:
    figures = soluscope.study(folder).figures
    on_page = figures_in(page.render(records()))
    assert len(figures) == len(on_page) > 1
    for figure, drawn in zip(figures.values(), on_page, strict=True):
        assert json.loads(packing.as_text(figure))["data"] == json.loads(drawn.to_json())["data"]
    assert "loss" in figures
    assert repr(figures).splitlines() == list(figures)
    with pytest.raises(UserError, match=r"no figure called 'los'. Did you mean 'loss'"):
        figures["los"]
    assert figures.get("los") is None


def test_text_of_results_is_escaped_in_tables_and_figures(folder: Path) -> None:
    described = replace(words("engagement"), figures=(Figure(NASTY, ("r",), statistic="median"),))
    results.write(
        folder / "results.jsonl",
        [replace(each, note=NASTY, arm=NASTY) if isinstance(each, results.Number) else each for each in records()]
        + [described],
    )  # fmt: skip
    found = soluscope.study(folder)
    for table in (found.losses, found.comparisons, found.probes, found.untrained, found.tokens):
        assert "\x1b" not in table.to_string()
        assert "<script" not in table._repr_html_()
    assert "\x1b" not in repr(found.figures)
    for figure in found.figures.values():
        assert "<script" not in json.dumps(figure.layout.title.to_plotly_json())


def test_a_study_without_some_records_has_empty_tables(tmp_path: Path) -> None:
    results.write(tmp_path / "results.jsonl", [LN])
    found = soluscope.study(str(tmp_path))
    for name in ("losses", "comparisons", "probes", "untrained", "tokens"):
        assert len(getattr(found, name)) == 0
        assert "value" in getattr(found, name)
    assert len(found.figures) == 0
    assert len(found.settings) == 1


def test_missing_and_broken_results_give_the_line_of_the_reader(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no results at .*soluscope probe"):
        soluscope.study(folder / "nothing")
    (folder / "results.jsonl").write_text('{"kind": "of tomorrow"}\n')
    with pytest.raises(UserError, match="was written by another version"):
        soluscope.study(folder)
    (folder / "results.jsonl").write_text("not a record\n")
    with pytest.raises(UserError, match="contains no records"):
        soluscope.study(folder)
