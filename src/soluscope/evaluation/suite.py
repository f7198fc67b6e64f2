"""Run folders x probes -> rows of the study, probe by probe, going on where it was interrupted.

A run folder is that of a run that was trained, or of a pretrained model (pretrained_run.py).

runs/<study>/<run>/probes/<probe>.parquet          one row a token
runs/<study>/<run>/probes/<probe>-neurons.parquet  one row a neuron, of the probes that have such
runs/<study>/<run>/probes/<probe>.jsonl            summary rows; written last: its presence means done
runs/<study>/<run>/probes/loss.parquet             one row a document: what comparisons resample
runs/<study>/.controls/controls-<probe>.jsonl      what the probe found on models with known answers
runs/<study>/results.jsonl                         all rows of the study, comparisons included
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer

from soluscope import plugins, results
from soluscope.comparison.compare import GAIN_OF_KAPPA, SETTINGS, compare, confirm
from soluscope.comparison.stats import document_bootstrap
from soluscope.config import EvalConfig, PretrainedConfig, read_config
from soluscope.data import streams
from soluscope.data.cache import Split, TokenCache, open_cache, prepare
from soluscope.errors import UserError
from soluscope.evaluation.calibration import check_gates, false_positives
from soluscope.evaluation.pretrained_run import RECORD, Record, load_again, make_run, read_record
from soluscope.evaluation.summaries import parameters, summarise, token_table
from soluscope.evaluation.wandb_probes import send_probes
from soluscope.files import digest, replacing, write_text
from soluscope.hooked.ablation import loss_at_post
from soluscope.hooked.activations import HookedRun, check_model, observe, rows_at_once
from soluscope.hooked.convert import SoluscopeTransformer, load
from soluscope.probes import Probe
from soluscope.results import PRETRAINED, Row
from soluscope.runs.folder import Run, lock
from soluscope.runs.weights import Facts, code_hash, commit, load_facts

PACKAGE = "soluscope.probes"
CONTROLS = ".controls"
TRAINING_POINTS = 60

Say = Callable[[str], None]


def evaluate(folder: Path, config: EvalConfig, say: Say = print) -> Path:
    """Probe every finished run below `folder` (or the run that it is), then compare the study's runs.

    A probe that a run has been through with the same configuration is not run again, so an
    interrupted evaluation goes on where it stopped.

    Returns:
        The study's results.jsonl.

    Raises:
        UserError: if there is no finished run, one cannot be read, or its tokens are gone.
    """
    run_dirs = finished_runs(folder)
    study_dir = run_dirs[0].parent
    for name in config.probes if config.probes is not None else plugins.names(PACKAGE):
        _calibrated("controls", name, study_dir, say)
    for number, run_dir in enumerate(run_dirs, start=1):
        place = f"[{number}/{len(run_dirs)}] {run_dir.name}:"
        _evaluate_run(run_dir, config, partial(_say_at, say, place))
    return write_results(study_dir)


def evaluate_pretrained(name: str, config: PretrainedConfig, say: Say = print) -> Path:
    """Probe a pretrained model in a study of its own, and report it; goes on where it was interrupted.

    Args:
        name: as for `load_pretrained`.
        config: how to probe it, on what text, and what to show beside it.
        say: where progress goes.

    Returns:
        The study's report.html.

    Raises:
        UserError: no such model, one that cannot be probed, or no text.
    """
    from soluscope.report import publish

    run_dir = make_run(name, config, say)
    probing = EvalConfig(**{each.name: getattr(config, each.name) for each in fields(EvalConfig)})
    return publish(evaluate(run_dir, probing, say).parent)


def _say_at(say: Say, place: str, text: str) -> None:
    say(f"{place} {text}")


def finished_runs(folder: Path) -> list[Path]:
    """Folders of finished runs and pretrained models: `folder` itself, or those directly in it."""
    folder = folder if folder.name else folder.resolve()  # "." has no parent
    if Run(folder).is_done() or (folder / RECORD).is_file():
        return [folder]
    trained = (path.parent for path in folder.glob("*/done.json") if Run(path.parent).is_done())
    found = sorted({*trained, *(path.parent for path in folder.glob(f"*/{RECORD}"))})
    if not found:
        raise UserError(f"no finished run in {folder}: train some with 'python train/run.py' first")
    return found


def calibrate(what: str, config: EvalConfig, folder: Path | None, say: Say = print) -> None:
    """Print what the probes find where the answer is known; with a study, keep it for its report.

    Args:
        what: `controls`, or `false-positives`.
        config: whose `probes` are asked; all of them if not set.
        folder: a study, or a run in it. What was kept there by the same code is not asked again.
        say: where progress goes.

    Raises:
        UserError: if there is no finished run in `folder`; or a control fails, after all are printed.
    """
    from rich.console import Console

    from soluscope.report import matrix

    study_dir = finished_runs(folder)[0].parent if folder else None
    rows: list[Row] = []
    for name in config.probes if config.probes is not None else plugins.names(PACKAGE):
        rows += _calibrated(what, name, study_dir, say)
    Console().print(matrix(rows))
    if study_dir and any(study_dir.glob("*/probes/loss.jsonl")):
        write_results(study_dir)
    failed = sorted({row.quantity for row in rows if row.note.startswith("FAIL")})
    if failed and what == "controls":
        raise UserError(f"not to be believed until it is mended: {', '.join(failed)}")


def _calibrated(what: str, name: str, study_dir: Path | None, say: Say) -> list[Row]:
    """A probe's rows on the planted models or on nothing, read where this code has made them."""
    ask = check_gates if what == "controls" else false_positives
    if study_dir is None:
        say(f"{what} of {name}")
        return list(ask(name))
    folder = study_dir / CONTROLS
    _discard_stale(folder, code_hash(but=("report/", *_probe_files())), say)
    path = folder / f"{what}-{name}.jsonl"
    if path.is_file():
        return results.read(path)
    say(f"{what} of {name}")
    rows = list(ask(name, study=study_dir.name))
    if rows:  # a probe that names no control leaves nothing to read
        results.write(path, rows)
    return rows


def write_results(study_dir: Path) -> Path:
    """Gather the rows of all runs that were evaluated, compare them, and write results.jsonl."""
    rows: list[Row] = []
    for path in sorted((study_dir / CONTROLS).glob("*.jsonl")):
        rows += results.read(path)
    losses = []
    beside: dict[str, None] = {}
    for run_dir in finished_runs(study_dir):
        folder = run_dir / "probes"
        if not (folder / "loss.jsonl").is_file():
            continue  # not evaluated yet, or interrupted before there was anything to compare
        rows += [row for path in sorted(folder.glob("*.jsonl")) for row in results.read(path)]
        if record := read_record(run_dir):  # of other tokens than any run's: compared with none
            beside |= dict.fromkeys(record.beside)
        else:
            losses.append(pd.read_parquet(folder / "loss.parquet").assign(**_settings(run_dir)))
    if losses:
        rows += compare(study_dir.name, pd.concat(losses, ignore_index=True), commit())
        asked = {name: plugins.pick(PACKAGE, name) for name in plugins.names(PACKAGE)}
        rows += confirm(rows, {name: one.tested for name, one in asked.items() if one.confirmatory})
    for other in beside:
        rows += _new_to(rows, results.read(Path(other) / "results.jsonl"))
    path = study_dir / "results.jsonl"
    results.write(path, rows)
    return path


def _new_to(rows: Sequence[Row], others: Sequence[Row]) -> list[Row]:
    """Another study's rows, without what calibrated the same probe here and what is here already."""
    calibrated = {(row.probe, row.quantity) for row in rows if not (row.run or row.arm)}
    here = set(rows)
    return [
        row for row in others if (row.probe, row.quantity) not in calibrated and row not in here
    ]


def _settings(run_dir: Path) -> dict[str, float | str]:
    """What tells a run's arm from others, as `compare` asks for it; nan for what the run has not."""
    facts, config = load_facts(run_dir), read_config(run_dir / "config.yaml")
    family = replace(config, seed=0, train=replace(config.train, lr=None))
    told: dict[str, Any] = {name: getattr(facts, name) for name in SETTINGS}
    if (
        getattr(config.mid, "gain", None) == "init"
    ):  # a static arm, matched to the LayerNorm of a kappa
        told[GAIN_OF_KAPPA] = config.mid.epsilon(facts.d_mlp) * facts.d_mlp**2
    told = {GAIN_OF_KAPPA: None} | told | {"family": family.hash}
    return {name: np.nan if value is None else value for name, value in told.items()}


def probe(
    model: SoluscopeTransformer, text: str | Sequence[str], probes: Sequence[str] | None = None
) -> tuple[pd.DataFrame, Figures]:
    """Run probes on a text of your own.

    Args:
        model: from `soluscope.load`.
        text: one text, or several; each is a unit of its own for intervals.
        probes: names of files in probes/; all of them if not given.

    Returns:
        A table with one row for each probe, quantity and token; and figures by title, which show
        themselves in a notebook.

    Raises:
        UserError: unknown probe, a text shorter than 2 tokens, or a model that cannot be probed.
    """
    names = list(probes) if probes is not None else plugins.names(PACKAGE)
    chosen = {name: plugins.pick(PACKAGE, name) for name in names}
    for name, why in _cannot(chosen, model.cfg.n_layers).items():
        if probes is not None:
            raise UserError(f"{name} is {why}")
        del chosen[name]
    texts = [text] if isinstance(text, str) else list(text)
    tokenizer = Tokenizer.from_str(model.tokenizer.backend_tokenizer.to_str())
    stream = streams.from_texts(texts, tokenizer, model.facts.bos, model.facts.ctx, 10**9, "text")
    run = observe(model, stream)
    base, defaults = _base_row(model.facts), EvalConfig()
    tables, figures = [], Figures()
    for name, one in chosen.items():
        table = token_table(one, run)
        row = replace(base, probe=name, stream="text")
        rows = list(summarise(one, run, table, row, defaults.n_draws, defaults.seed))
        figures.update(_draw(rows, one))
        long = table.melt(["string", "pos", "token"], list(one.quantities), "quantity")
        tables.append(long.assign(probe=name))
    frame = pd.concat(tables, ignore_index=True)
    frame["text"] = [
        tokenizer.decode([token], skip_special_tokens=False) for token in frame["token"]
    ]
    return frame[["probe", "quantity", "string", "pos", "token", "text", "value"]], figures


def _cannot(chosen: dict[str, Probe], n_layers: int) -> dict[str, str]:
    """Which probes have nothing to say about a text of one's own, and why."""
    why = {}
    for name, one in chosen.items():
        if all(stream.startswith(streams.PAIRS) for stream in one.streams):
            why[name] = "measured on pairs of prompts, and not on a text of your own"
        elif one.one_layer and n_layers > 1:
            why[name] = f"exact for one layer only, and the model has {n_layers}"
    return why


class Figures(dict[str, Any]):
    """Plotly figures by title; a notebook shows them all."""

    def _ipython_display_(self) -> None:
        for figure in self.values():
            figure.show()


def _draw(rows: list[Row], one: Probe) -> dict[str, Any]:
    from soluscope.report.figures import draw

    drawn = {spec.title: draw(rows, replace(spec, streams=())) for spec in one.figures}
    return {title: figure for title, figure in drawn.items() if figure.data}


# --- one run --------------------------------------------------------------------------------------


def _evaluate_run(run_dir: Path, config: EvalConfig, say: Say) -> None:
    with lock(run_dir):
        _probe_run(run_dir, config, say)
        send_probes(run_dir)


def _probe_run(run_dir: Path, config: EvalConfig, say: Say) -> None:
    folder = run_dir / "probes"
    _discard_stale(folder, _rests_on(run_dir, config), say)
    names = config.probes if config.probes is not None else plugins.names(PACKAGE)
    record = read_record(run_dir)
    course = () if record else ("training",)
    waiting = [
        name
        for name in (*course, "loss", "tokens", *names)
        if not (folder / f"{name}.jsonl").is_file()
    ]
    if not waiting:
        say("probed already")
        return
    facts = load_facts(run_dir)
    base = _base_row(facts)
    if record:
        base = replace(base, variant=f"{PRETRAINED}{facts.variant}", seed=None)
    model = load_again(run_dir, record, config.device) if record else load(run_dir, config.device)
    check_model(model)
    observed = _Observed(model, _tokens_of(run_dir, facts, config), config)
    for place, name in enumerate(waiting, start=1):
        say(f"{name} ({place} of {len(waiting)})")
        row = replace(base, probe=name)
        if name == "training":
            rows = training_rows(run_dir, row)
        elif name == "loss" and record:
            row = replace(base, probe=PRETRAINED.strip())
            rows = _pretrained_rows(observed, folder, record, row, config)
        elif name == "loss":
            rows = _loss_rows(observed, folder, facts, row, config)
        elif name == "tokens":
            rows = token_rows(observed("natural"), row)
        else:
            rows = _probe_rows(name, observed, folder, row, config)
        results.write(folder / f"{name}.jsonl", rows)


def _discard_stale(folder: Path, shared: str, say: Say) -> None:
    """Delete what was made from other inputs or by other code.

    Args:
        folder: of files named after probes.
        shared: hash of what all of them rest on; a probe's own file counts for its own rows alone.
        say: told where anything goes.
    """
    mark = folder / "made_with.json"
    now = {"shared": shared} | {path: code_hash(path) for path in _probe_files()}
    before = json.loads(mark.read_text(encoding="utf8")) if mark.is_file() else {}
    if before == now:
        return
    if before.get("shared") != shared:
        if before:
            say("other inputs or code than last time: all is made anew")
        shutil.rmtree(folder, ignore_errors=True)
    for path in _probe_files():
        if path in before and before[path] != now[path]:
            name = Path(path).stem
            say(f"{name} has changed and is made anew")
            for stale in (f"{name}.jsonl", f"{name}.parquet", f"{name}-neurons.parquet",
                          f"controls-{name}.jsonl", f"false-positives-{name}.jsonl"):  # fmt: skip
                (folder / stale).unlink(missing_ok=True)
    write_text(mark, json.dumps(now) + "\n")


def _probe_files() -> tuple[str, ...]:
    return tuple(f"probes/{name}.py" for name in plugins.names(PACKAGE))


def _rests_on(run_dir: Path, config: EvalConfig) -> str:
    """Hash of what all summaries of a run rest on, the probes' own files left out."""
    settings = {
        k: v for k, v in asdict(config).items() if k not in ("probes", "prepared", "device")
    }
    made_from = "done.json"
    if (run_dir / RECORD).is_file():
        made_from = "model.json"
        settings["tokens"] = json.loads((run_dir.parent / "data.json").read_text())["key"]
    trained = digest((run_dir / made_from).read_text(encoding="utf8"))
    prompts = [streams.prompts(name) for name in streams.PROMPTS]
    moves_nothing = ("report/", "controls/", "engines/", "launching/", "training/", "runs/folder.py",
                     "wandb_client.py")  # fmt: skip
    code = code_hash(but=(*moves_nothing, *_probe_files()))
    return digest([settings, trained, prompts, code])


def _tokens_of(run_dir: Path, facts: Facts, config: EvalConfig) -> TokenCache:
    """The tokens that the run was trained on, whatever has become of the corpus since; or the text of
    a pretrained model, which `pretrained_run` has made.

    Raises:
        UserError: if they are not to be had: other tokens would give numbers that look right.
    """
    data = run_dir.parent / "data.json"
    if not data.is_file():
        raise UserError(f"no {data}: a run folder is read from inside its study")
    trained_on = json.loads(data.read_text(encoding="utf8"))
    place = Path(config.prepared or trained_on["path"])
    if record := read_record(run_dir):
        if not place.is_dir():
            raise UserError(
                f"the tokens {place} are gone: make them again with 'python eval/run.py {record.name}'"
            )
        facts = replace(facts, tokenizer_hash=trained_on["tokenizer_hash"])
    cache = open_cache(place) if place.is_dir() else prepare(read_config(run_dir / "config.yaml"))
    same = (cache.meta["key"], cache.meta["tokenizer_hash"])
    if same != (trained_on["key"], facts.tokenizer_hash):
        raise UserError(
            f"{run_dir} was trained on the tokens {trained_on['key']}, and {cache.path} has others: "
            "set prepared= to the folder where they are now"
        )
    return cache


class _Observed:
    """The model's activations on each stream, made when first asked for."""

    def __init__(self, model: SoluscopeTransformer, cache: TokenCache, config: EvalConfig) -> None:
        self.model, self.cache, self.config = model, cache, config
        self.tokenizer = Tokenizer.from_file(str(cache.tokenizer_path))
        self._runs: dict[str, HookedRun] = {}

    def __call__(self, name: str) -> HookedRun:
        if name not in self._runs:
            ctx, c = self.model.facts.ctx, self.config
            stream = streams.make(name, self.cache, self.tokenizer, ctx, c.n_tokens, c.seed)
            self._runs[name] = observe(self.model, stream)
        return self._runs[name]


def _probe_rows(
    name: str, observed: _Observed, folder: Path, base: Row, config: EvalConfig
) -> list[Row]:
    one: Probe = plugins.pick(PACKAGE, name)
    n_layers = observed.model.cfg.n_layers
    if one.one_layer and n_layers > 1:
        return [_left_out(base, f"exact for one layer only, and the model has {n_layers}")]
    rows: list[Row] = []
    tables = {}
    for stream in one.streams:
        row = replace(base, stream=stream)
        try:
            run = observed(stream)
        except UserError as error:  # this corpus or tokenizer does not give the stream
            rows.append(_left_out(row, str(error)))
            continue
        tables[stream] = token_table(one, run).assign(stream=stream)
        rows += summarise(one, run, tables[stream], row, config.n_draws, config.seed)
    if tables:
        _write_parquet(folder / f"{name}.parquet", pd.concat(tables.values(), ignore_index=True))
    if one.neurons is not None and one.streams[0] in tables:
        columns = one.neurons(observed(one.streams[0]), parameters(one))
        neurons = pd.DataFrame({key: values.numpy() for key, values in columns.items()})
        _write_parquet(folder / f"{name}-neurons.parquet", neurons)
    return rows or [_left_out(base, "this model has nothing of what it measures")]


def _left_out(base: Row, why: str) -> Row:
    return replace(base, quantity=results.LEFT_OUT, note=why)


def token_rows(run: HookedRun, base: Row) -> list[Row]:
    """The first text of `run`, token by token: what the report's token view shows."""
    end = int(run.is_bos.nonzero()[1]) if run.is_bos.sum() > 1 else len(run.pos)
    text = run.subset(torch.arange(len(run.pos)) < end)
    columns = {
        "gain": ("1 / activation", text.gain),
        "r": ("share", text.engagement),
        "ablation effect": ("nats", loss_at_post(text, torch.zeros_like(text.post)) - text.loss),
    }
    return [
        replace(
            base, quantity=name, unit=unit, stream=run.stream, positions="all", x=float(place),
            value=float(value), n=1, note=text.vocab[int(text.tokens[place])],
        )
        for name, (unit, values) in columns.items()
        for place, value in enumerate(values)
    ]  # fmt: skip


def _loss_rows(
    observed: _Observed, folder: Path, facts: Facts, base: Row, config: EvalConfig
) -> list[Row]:
    """Loss on both validation splits by document, and its mean on the report split."""
    tables = [
        _document_losses(observed, split, config).assign(split=split)
        for split in ("select", "report")
    ]
    table = pd.concat(tables, ignore_index=True).assign(
        run=facts.run, arm=facts.arm, variant=facts.variant, seed=facts.seed, config=facts.config
    )
    table["document"] = table["document"].astype(str)
    _write_parquet(folder / "loss.parquet", table)
    return [_loss_row(table[table["split"] == "report"], base, config)]


def _loss_row(report: pd.DataFrame, base: Row, config: EvalConfig) -> Row:
    interval = document_bootstrap(
        report["loss_sum"], report["n_tokens"], config.n_draws, config.seed
    )
    return replace(
        base, quantity="loss", unit="nats / token", stream="natural", cluster="document",
        value=interval.value, low=interval.low, high=interval.high, n=interval.n,
        n_clusters=interval.n_clusters,
    )  # fmt: skip


def _pretrained_rows(
    observed: _Observed, folder: Path, record: Record, base: Row, config: EvalConfig
) -> list[Row]:
    """What is known of a pretrained model, its loss, and what its gain says that epsilon is."""
    facts, cache = observed.model.facts, observed.cache
    table = _document_losses(observed, "report", config)
    _write_parquet(folder / "loss.parquet", table)
    read = cache.meta["splits"]["report"]
    text = (
        f"the report split of data={cache.meta['source']} ({read['n_documents']:,} documents in all), and "
        "whether the model was trained on these is not known"
    )
    told = ("n_layers", "d_model", "n_heads", "d_mlp", "ctx", "d_vocab", "ln_eps", "eps", "kappa")
    known = {name: value for name in told if (value := getattr(facts, name)) is not None}
    rows = [replace(_loss_row(table, base, config), note=text)]
    rows += [
        replace(base, quantity=name, value=float(value), note=record.said)
        for name, value in known.items()
    ]
    run = observed("natural")
    if run.eps is not None:
        square = run.scale.double().square()  # 1 / g^2
        off = ((run.s2 + run.eps) / square - 1).abs()
        everywhere = replace(base, stream="natural", positions="all", n=len(square))
        rows += [
            replace(
                everywhere, quantity="1/g^2 - var", statistic="median",
                value=float((square - run.s2).median()),
            ),
            replace(
                everywhere, quantity="|g^2 (var + eps) - 1|", statistic="max", value=float(off.max())
            ),
        ]  # fmt: skip
    return rows


@torch.no_grad()
def _document_losses(observed: _Observed, split: Split, config: EvalConfig) -> pd.DataFrame:
    """Sum of losses and number of targets by document, the target's own; BOS targets left out."""
    model, ctx = observed.model, observed.model.facts.ctx
    stream = streams.from_cache(observed.cache, split, ctx, config.n_loss_tokens, split)
    sums: dict[int, float] = {}
    counts: dict[int, int] = {}
    step = rows_at_once(ctx, model.cfg.d_vocab)
    for start in range(0, len(stream.tokens), step):
        tokens = stream.tokens[start : start + step]
        losses = (
            model(tokens.to(model.cfg.device), return_type="loss", loss_per_token=True)
            .double()
            .cpu()
        )
        owner = stream.string[start : start + step, 1:]
        counted = tokens[:, 1:] != stream.bos
        for document in owner[counted].unique().tolist():
            mine = counted & (owner == document)
            sums[document] = sums.get(document, 0.0) + float(losses[mine].sum())
            counts[document] = counts.get(document, 0) + int(mine.sum())
    return pd.DataFrame(
        {"document": sums.keys(), "loss_sum": sums.values(), "n_tokens": counts.values()}
    )


def training_rows(run_dir: Path, base: Row) -> list[Row]:
    """The course of training: means over at most 60 stretches of metrics.jsonl."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    metrics = pd.DataFrame(lines)
    units = {"loss": "nats / token", "grad_norm": "norm", "r": "share", "gain": "1 / activation"}
    rows = []
    for part in np.array_split(np.arange(len(metrics)), min(TRAINING_POINTS, len(metrics))):
        stretch = metrics.iloc[part]
        rows += [
            replace(
                base, quantity=name, unit=unit, stream="train",
                x=float(stretch["tokens"].iloc[-1]), value=float(stretch[name].mean()), n=len(stretch),
            )
            for name, unit in units.items() if name in stretch
        ]  # fmt: skip
    return rows


def _base_row(facts: Facts) -> Row:
    return Row(
        study=facts.study, run=facts.run, arm=facts.arm, variant=facts.variant, seed=facts.seed,
        probe="", quantity="", value=None, unit="", commit=commit(), config=facts.config,
    )  # fmt: skip


def _write_parquet(path: Path, table: pd.DataFrame) -> None:
    try:
        with replacing(path) as beside:
            table.to_parquet(beside, index=False)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free disk space") from error
