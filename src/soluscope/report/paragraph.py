"""The methods paragraph of a paper, made from the records alone. A fact that no record contains is left out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from soluscope.report import citations, controls, latex, pretrained
from soluscope.report.blocks import Block, Paragraph, Source
from soluscope.report.findings import (
    Choice,
    choices,
    comparisons,
    listed,
    runs_of,
    seeds,
    settings,
    tuned,
)
from soluscope.results import (
    MARGIN,
    NOT_PROBES,
    Comparison,
    Grid,
    Measurement,
    Number,
    OfRun,
    Provenance,
    Record,
    Setting,
    Term,
    Untrained,
    Verdict,
    of_kind,
)
from soluscope.text import plural

SHAPE = {
    "d_model": "d_model {}",
    "d_mlp": "{} neurons in the MLP",
    "n_heads": "{} attention heads",
    "ctx": "and a context of {} tokens",
}
"""Texts for the parts of a model's size, after its number of layers."""
SPLITS = {"train": "for training", "select": "for choosing settings", "report": "for reporting"}
SOFTWARE = {
    "soluscope": ("soluscope", citations.OWN),
    "torch": ("PyTorch", "paszke2019pytorch"),
    "transformer-lens": ("TransformerLens", "nanda2022transformerlens"),
}
"""Packages that the paragraph names, with the key of a reference."""

OPTIMIZER: dict[str, tuple[str, ...]] = {
    "The optimizer is AdamW with beta1 {beta1} and beta2 {beta2}": ("loshchilov2019adamw",),
    "A step has {batch_size} rows": (),
    "Weight decay of {weight_decay} acts on the blocks' matrices and the unembedding": (),
    "Gradients with a norm above {clip} are scaled down to it": (),
    "Learning rates rise for {warmup_steps} steps; after that the schedule is {schedule}": (),
    "The last rate is {final_lr_share} of the highest": (),
    "Embeddings, the unembedding, norms and biases have the rate {lr_rest}, and the blocks' matrices one of the "
    "following rates": (),
}
"""Sentences on the optimizer, with their citations. A sentence is left out if runs differ in a setting of it."""


@dataclass(frozen=True)
class Sentence:
    """A sentence without its full stop, and the keys of the references that it cites."""

    text: str
    keys: tuple[str, ...] = ()


def plain(sentences: Iterable[Sentence]) -> str:
    """Return the paragraph as plain text."""
    return " ".join(
        each.text
        + (f" ({'; '.join(citations.SHORT[key] for key in each.keys)})" if each.keys else "")
        + "."
        for each in sentences
    )


def tex(sentences: Iterable[Sentence]) -> str:
    """Return the paragraph as LaTeX, one sentence per line."""
    lines = [
        latex.escape(each.text) + (rf"~\cite{{{','.join(each.keys)}}}" if each.keys else "") + "."
        for each in sentences
    ]
    return "\n".join([*lines, ""])


def bibtex(records: Sequence[Record]) -> str:
    """Return the BibTeX entries of soluscope and of all references of the paragraph."""
    keys = [key for each in sentences(records) for key in each.keys]
    versions = {each.versions.get("soluscope", "") for each in of_kind(records, Provenance)}
    version = versions.pop() if len(versions) == 1 else ""
    return citations.bibtex(keys, version, _commits(records))


def blocks(records: Sequence[Record]) -> list[Block]:
    """Return the paragraph and the BibTeX entries for the page, each in a block that one click selects."""
    made = sentences(records)
    if not made:
        return []
    lead = (
        "Generated from the records; facts that the records lack are left out. A click selects the whole text. "
        "The same text as LaTeX: soluscope report STUDY --tables DIR"
    )
    return [Paragraph(lead, style="soft"), Source(plain(made)), Source(bibtex(records))]


def sentences(records: Sequence[Record]) -> list[Sentence]:
    """Return the sentences of the methods paragraph, in their order."""
    compared = tuned(records)
    trained = pretrained.trained(compared)
    known = settings(trained)
    return [
        *_arms(trained, known),
        *_sizes(known),
        *_text(records),
        *_losses(trained),
        *_optimizer(records),
        *_rates(records, known),
        *_gains(records, known),
        *_seeds(trained),
        *_pretrained(records),
        *_probes(records),
        *_intervals(compared),
        *_tests(compared),
        *_software(records),
    ]


def _arms(records: Sequence[Record], known: Mapping[str, Setting]) -> Iterator[Sentence]:
    if not known:
        return
    roles = {each.role for each in known.values()}
    runs, studies = len(runs_of(records)), sorted({each.study for each in known.values()})
    counted = f" in {runs} {plural(runs, 'run')}" if runs else ""
    n_arms = f"{len(known)} {plural(len(known), 'configuration')}"
    yield Sentence(
        f"The study {listed(studies)} compares {n_arms}{counted}: {listed([*known])}", (citations.OWN,)
    )  # fmt: skip
    if "plain" in roles:
        yield Sentence("The activation of plain SoLU is x softmax(x)", ("elhage2022solu",))
    if "per_token" in roles:
        text = "A per-token norm after the activation, such as LayerNorm, has a gain for each token"
        yield Sentence(text, ("ba2016layernorm",))
    if "static" in roles:
        yield Sentence("A static arm has one gain for all tokens")


def _sizes(known: Mapping[str, Setting]) -> Iterator[Sentence]:
    """Yield a sentence on the models' sizes, and one on their number of training tokens."""
    if shapes := _grouped((_shape(each.values), arm) for arm, each in known.items()):
        yield Sentence(_each("Each model has", shapes))
    tokens = _grouped(
        (f"{each.values['tokens']:,.0f} tokens", arm)
        for arm, each in known.items()
        if "tokens" in each.values
    )
    if tokens:
        yield Sentence(_each("Each model was trained on", tokens))


def _each(start: str, groups: Mapping[str, Sequence[str]]) -> str:
    """Return a sentence that is true of each arm; with several groups, each group's arms follow its text."""
    if len(groups) == 1:
        return f"{start} {next(iter(groups))}"
    return f"{start} " + "; ".join(f"{text} ({listed(arms)})" for text, arms in groups.items())


def _shape(values: Mapping[str, float]) -> str:
    layers = values.get("n_layers")
    parts = [] if layers is None else [f"{layers:.0f} {plural(int(layers), 'layer')}"]
    parts += [text.format(f"{values[name]:.0f}") for name, text in SHAPE.items() if name in values]
    return ", ".join(parts)


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Return the arms by text; arms with an empty text are left out."""
    result: dict[str, list[str]] = {}
    for text, arm in pairs:
        if text:
            result.setdefault(text, []).append(arm)
    return result


def _text(records: Sequence[Record]) -> Iterator[Sentence]:
    for each in of_kind(records, Provenance):
        counts = [
            f"{each.documents[split]:,} {plural(each.documents[split], 'document')} "
            f"({each.tokens[split]:,} tokens) {use}"
            for split, use in SPLITS.items()
            if split in each.documents and split in each.tokens
        ]
        if each.source and counts:
            yield Sentence(f"The text comes from the source {each.source}: {'; '.join(counts)}")
        if each.d_vocab is not None:
            yield Sentence(f"The tokenizer has {each.d_vocab:,} entries")
        if each.n_copies is not None:
            copies = f"{each.n_copies:,} {plural(each.n_copies, 'document')}"
            yield Sentence(f"Removed as copies of another document: {copies}")
        removed = [f"{n:,} from the {split} split" for split, n in each.n_overlapping.items()]
        if removed:
            yield Sentence(
                "Removed as near-duplicates, because they share a passage with a held-out document: "
                f"{', '.join(removed)}"
            )


def _losses(records: Sequence[Record]) -> Iterator[Sentence]:
    rows = [row for row in of_kind(records, Measurement) if row.probe == "loss"]
    documents = _range(row.n_clusters for row in rows if row.cluster == "document")
    tokens = _range(row.n for row in rows if row.n)
    if documents and tokens:
        text = f"Losses, in nats per token, are measured on {documents} held-out documents"
        yield Sentence(f"{text} ({tokens} tokens)")


def _range(values: Iterable[int]) -> str:
    known = [*values]
    if not known:
        return ""
    low, high = min(known), max(known)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _optimizer(records: Sequence[Record]) -> Iterator[Sentence]:
    """Yield sentences on the settings of the optimizer that all trained runs of a study share."""
    for each in of_kind(records, Provenance):
        known = {name: _value(value) for name, value in each.training.items()}
        if known.get("schedule") == "constant":
            known.pop("final_lr_share", None)
        for text, cited in OPTIMIZER.items():
            if {*re.findall(r"{(\w+)}", text)} <= known.keys():
                yield Sentence(text.format(**known), cited)


def _value(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:,.6g}"


def _rates(records: Sequence[Record], known: Mapping[str, Setting]) -> Iterator[Sentence]:
    """Yield sentences on the learning rates that were chosen among several, and on all other rates."""
    made = {each.chosen.arm: each for each in choices(records) if each.chosen.setting == "lr"}
    chosen = [_chosen(arm, made[arm]) for arm in known if arm in made]
    if chosen:
        yield Sentence(
            "The learning rate with the least mean loss on the select split was chosen for each of these "
            f"configurations: {'; '.join(chosen)}"
        )
    others = _grouped(
        (f"{each.values['lr']:.3g}, which {each.rate or 'was tuned for these settings'}", arm)
        for arm, each in known.items()
        if arm not in made and "lr" in each.values
    )
    if others and not chosen:
        yield Sentence(_each("The learning rate is", others))
    elif others:
        texts = (f"{text} ({listed(arms)})" for text, arms in others.items())
        yield Sentence(f"The other learning rates are {'; '.join(texts)}")


def _gains(records: Sequence[Record], known: Mapping[str, Setting]) -> Iterator[Sentence]:
    made = [each for each in choices(records) if each.chosen.setting == "gain"]
    chosen = [_chosen(each.chosen.arm, each) for each in made if each.chosen.arm in known]
    if chosen:
        yield Sentence(
            f"Constant gains were chosen by the loss on the select split: {'; '.join(chosen)}"
        )


def _chosen(arm: str, choice: Choice) -> str:
    """Return the chosen setting with the settings that were tried, its place on their grid, and the seeds."""
    at = choice.chosen
    grid = f"; {at.grid}" if at.grid in (Grid.INSIDE, Grid.LOWER_EDGE, Grid.UPPER_EDGE) else ""
    return f"{at.x:.3g} for {arm} (tried: {choice.tried}{grid}; {seeds(at.n)})"


def _seeds(records: Sequence[Record]) -> Iterator[Sentence]:
    of_arm: dict[str, set[int]] = {}
    for each in records:
        if isinstance(each, OfRun) and each.seed is not None:
            of_arm.setdefault(each.arm, set()).add(each.seed)
    groups = _grouped(
        (f"{plural(len(every), 'seed')} {', '.join(map(str, sorted(every)))}", arm)
        for arm, every in of_arm.items()
    )
    if groups:
        yield Sentence(_each("Each configuration was trained at", groups))


def _pretrained(records: Sequence[Record]) -> Iterator[Sentence]:
    for arm in pretrained.arms(records):
        yield Sentence(f"{arm} is a published model, which was not trained here")


def _probes(records: Sequence[Record]) -> Iterator[Sentence]:
    found = {row.probe for row in of_kind(records, Measurement)} - NOT_PROBES
    if found:
        n = f"{len(found)} {plural(len(found), 'probe')}"
        yield Sentence(f"{n} measured the models: {', '.join(controls.in_order(records, found))}")
    checked = [probe for probe in found if controls.gates(records, probe)]
    if checked:
        wrong = [probe for probe in sorted(checked) if controls.failures(records, probe)]
        failed = f"{len(wrong)} failed ({', '.join(wrong)})" if wrong else "all passed"
        n = f"{len(checked)} of these {plural(len(checked), 'probe')}"
        yield Sentence(f"{n} ran on control models, whose answers are known, and {failed}")
    if of_kind(records, Untrained):
        yield Sentence("The same numbers were measured in each run's own initialisation")


def _intervals(records: Sequence[Record]) -> Iterator[Sentence]:
    bounded = [row for row in of_kind(records, Number) if row.low is not None]
    clusters = {row.cluster for row in bounded}
    texts = []
    if "document" in clusters:
        texts.append("for the trained models they come from resampling the documents")
    if any(isinstance(row, Comparison) and row.cluster == "seed" for row in bounded):
        texts.append("for new seeds they also contain the spread between training seeds")
    if texts:
        yield Sentence(f"Intervals are 95%: {'; '.join(texts)}", ("efron1993bootstrap",))
    if comparisons(records, Term.DIFFERENCE):
        yield Sentence("Differences between configurations are paired by seed")
    if comparisons(records, Term.SHARE):
        yield Sentence(
            "Phi_dyn is the share of the benefit of the per-token norm that the best static arm does not reach"
        )


def _tests(records: Sequence[Record]) -> Iterator[Sentence]:
    rows = of_kind(records, Comparison)
    if any(row.p is not None for row in rows):
        yield Sentence("p-values are of two-sided sign-flip tests over seeds")
    if any(row.p_adj is not None for row in rows):
        yield Sentence("They are corrected within each family of tests", ("holm1979",))
    if any(row.verdict is Verdict.EQUIVALENT for row in rows):
        yield Sentence(
            f"Losses are called equivalent if two one-sided tests place their difference closer to 0 than {MARGIN} "
            "nats per token",
            ("schuirmann1987",),
        )


def _software(records: Sequence[Record]) -> Iterator[Sentence]:
    for each in of_kind(records, Provenance):
        used = [name for name in SOFTWARE if each.versions.get(name)]
        commits = f" (commit {', '.join(each.commits)})" if each.commits else ""
        if used:
            named = (
                f"{SOFTWARE[name][0]} {each.versions[name]}{commits if name == 'soluscope' else ''}"
                for name in used
            )
            keys = tuple(SOFTWARE[name][1] for name in used)
            yield Sentence(f"The runs were trained with {', '.join(named)}", keys)
    if measured := _commits(records):
        yield Sentence(f"The numbers were measured with the code of commit {', '.join(measured)}")


def _commits(records: Iterable[Record]) -> list[str]:
    return sorted({each.commit for each in records} - {""})
