"""Sentences of the report's headline: the findings and their uncertainty, made from the numbers.

No sentence claims more than its interval. A sign is called settled only if the interval for new seeds
and new documents excludes 0. Every sentence about a comparison states its number of seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from soluscope.report import controls, findings, plan, pretrained, robustness, verdicts, where
from soluscope.report.findings import (
    NO_COST,
    Choice,
    at_one_rate,
    by_kappa,
    choices,
    comparisons,
    engagement,
    envelope,
    for_these_models,
    gain_varies,
    listed,
    measured,
    normed,
    number,
    per_token,
    remarks,
    rescaled,
    runs_of,
    seeds,
    seeds_of,
    settings,
    signed,
    sizes,
    span,
    tuned,
    twins,
)
from soluscope.results import (
    MARGIN,
    SCALED_SIZE,
    ChoicePoint,
    Comparison,
    Grid,
    Measurement,
    NoChoice,
    Number,
    OfRun,
    Provenance,
    Record,
    Registered,
    Removal,
    Term,
    of_kind,
)
from soluscope.text import plural

NO_VERDICT = (
    "No verdict on LayerNorm is possible: it needs runs of plain SoLU and of an arm with a per-token norm that "
    "share a seed."
)
N_NAMED = 12
"""Largest number of arms that a sentence lists by name. With more arms, it lists their variants."""
FREEZES = (
    ("frozen at geometric mean", "the geometric mean"),
    ("frozen at best constant", "the constant with the least loss on the other documents"),
)


def headline(records: list[Record]) -> list[str]:
    """Return the headline's sentences, the most important one first, for the page and the terminal."""
    models, trained = pretrained.arms(records), pretrained.trained(tuned(records))
    result = [*warnings(records), *pretrained.sentences(records)]
    if controls.standing(records, "scale_freeze") == "passed":
        result += [sentence for arm in models for sentence in _freeze(records, arm)]
    if not models or any(isinstance(record, OfRun) for record in trained):
        result += _headline(trained, pretrained.trained(records))
    return [*result, *_not_summarised(records)]


def warnings(records: list[Record]) -> list[str]:
    """Return the reasons why the comparisons may be wrong, the most serious one first."""
    return [*unclaimed(records), *edges(records), *untuned(records), *unchosen(records)]


def answer(records: list[Record]) -> str:
    """Return the answer to the study's question in a few sentences, the most important one first."""
    trained = pretrained.trained(records)
    return " ".join(
        [
            *first_answer(records),
            *verdicts.static(trained),
            *verdicts.details(trained),
            *verdicts.at_fixed_scales(trained),
        ]
    )


def first_answer(records: list[Record]) -> list[str]:
    """Return the first sentences of the answer: the loss at each arm's best settings, and the learning rate.

    A study of pretrained models alone is answered by the behaviour of the first model's norm.
    """
    trained = pretrained.trained(records)
    if pretrained.arms(records) and not any(isinstance(record, OfRun) for record in trained):
        return pretrained.sentences(records)[:1]
    return verdicts.first(trained) or [NO_VERDICT]


def certainty(records: list[Record]) -> list[str]:
    """Return how sure the answer is: the seeds, the documents, the controls, and the choice of the static arm."""
    trained = pretrained.trained(tuned(records))
    result = []
    if each := _seeds_per_arm(trained):
        result.append(f"{each} per arm")
    documents, _, effective = _documents(records)
    if documents:
        counted = f" (effective number {effective:.0f})" if effective is not None else ""
        result.append(f"{documents:,} held-out {plural(documents, 'document')}{counted}")
    if apart := sorted({name for each in of_kind(records, Provenance) for name in each.apart}):
        result.append(f"the arms differ in {listed(apart)}")
    result.append(controls.summary(records))
    for made in of_kind(records, Registered):
        n = len(made.departures)
        followed = f"{n} {plural(n, 'departure')} from the plan" if n else "the plan was followed"
        result.append(f"preregistered {made.at[:10]}, sha256 {made.sha256[:12]}: {followed}")
    static = comparisons(trained, Term.STATIC)
    known = [row.optimism for row in static if row.optimism is not None]
    if static and len(known) < len(static):
        result.append("the choice of the static arm favours it by an unknown amount")
    elif known and max(known) > 0:
        result.append(f"the choice of the static arm may favour it by {max(known):.4f} nats")
    elif any(row.n_candidates > 1 for row in static):
        result.append("the static arm was chosen at seeds that are not reported")
    if _rates_at_reported_seeds(records):
        result.append(
            "learning rates were chosen at the reported seeds, which favours arms with more rates by an unknown "
            "amount"
        )
    return result


def _rates_at_reported_seeds(records: list[Record]) -> bool:
    """Return whether learning rates were chosen at the reported seeds.

    With select seeds, the arms that were not chosen have no reported runs.
    """
    tried = {
        point.arm
        for point in of_kind(records, ChoicePoint)
        if point.setting == "lr" and point.eligible
    }
    return len(tried) > 1 and not any(each.only_tried for each in settings(records).values())


def not_shown(records: list[Record]) -> str:
    """Return a sentence on the open questions: the study's scale, and the arms and measurements that it lacks."""
    known = settings(tuned(records))
    normed = [each for each in known.values() if each.role == "per_token"]
    if not normed:
        return ""
    values = normed[0].values
    scale = ", ".join(
        f"{name} {values[name]:,.0f}"
        for name in ("n_layers", "d_model", "d_mlp", "tokens")
        if name in values
    )
    parts = [f"models of another size or after longer training ({scale} here)"]
    there = {each.variant for each in known.values()}
    missing = {s.variant: s for each in normed for s in each.chain if s.variant not in there}
    if missing:
        steps = listed([f"{name} ({step.adds})" for name, step in sorted(missing.items())])
        parts.append(f"the separate steps of the chain through {steps}, which this study lacks")
    if not of_kind(records, Removal):
        parts.append("the loss of a readout that is fitted again with one gain (soluscope remove)")
    return f"Not shown: {'; '.join(parts)}."


def in_view(sentences: Sequence[str], n: int) -> list[str]:
    """Return the sentences; if there are many, the first `n` and the number of further ones in the report."""
    if len(sentences) <= 1 + n:
        return list(sentences)
    return [*sentences[:n], f"{len(sentences) - n} more in the report"]


def unclaimed(records: list[Record]) -> list[str]:
    """Return a warning about settings that differ between arms and are no part of any arm."""
    names = sorted({name for each in of_kind(records, Provenance) for name in each.unclaimed})
    if not names:
        return []
    return [
        f"The arms differ in more than their variants and the settings that are tuned for each: {listed(names)}. A "
        f"difference between arms may come from {'it' if len(names) == 1 else 'these'}. Train the arms with equal "
        "settings."
    ]


def edges(records: list[Record]) -> list[str]:
    """Return warnings about chosen settings at the edge of their grid, where a better setting may exist.

    At a wrong learning rate no comparison holds. At a wrong gain, comparisons with the best static arm
    do not hold.

    Source: protocol.md section 10.2 (c).
    """
    made = choices(records)
    rates, gains = ([c for c in made if c.chosen.setting == name] for name in ("lr", "gain"))
    sentences = []
    if at := _at_edges(rates):
        sentences.append(
            "Do not rely on any comparison here yet: on the select split, the best learning rate lies at the "
            f"edge of its grid for {at}. Widen these grids."
        )
    two = _grouped((c.tried, c.chosen.arm) for c in rates if c.chosen.grid is Grid.TOO_FEW)
    if two:
        tried = "; ".join(f"{listed(arms)} ({grid})" for grid, arms in two.items())
        sentences.append(
            "Fewer than three learning rates were tried, and a better rate may lie outside them: "
            f"{tried}."
        )
    if at := _at_edges(gains):
        sentences.append(
            "A better static arm may exist, so static - LN and Phi_dyn are not settled: on the select split, "
            f"the best gain lies at the edge of its grid for {at}. Widen these grids."
        )
    return sentences


def untuned(records: list[Record]) -> list[str]:
    """Return warnings about compared arms whose one learning rate was not tuned for them."""
    arms = _grouped((each.rate, each.arm) for each in findings.untuned(records))
    if not arms:
        return []
    reasons = "; ".join(f"{listed(of_reason)} (the rate {why})" for why, of_reason in arms.items())
    return [
        "A learning rate that is not tuned can reverse the answer. The rates of these arms are not tuned: "
        f"{reasons}. Tune them with the sweep lr."
    ]


def _at_edges(made: Sequence[Choice]) -> str:
    """Return the arms whose chosen setting is at an edge, grouped by edge and grid."""
    extreme = {Grid.LOWER_EDGE: "lowest", Grid.UPPER_EDGE: "highest"}
    by_edge = _grouped(
        (f"{at.setting} {at.x:.3g} is the {extreme[at.grid]} of {choice.tried}", at.arm)
        for choice in made
        if (at := choice.chosen).grid in extreme
    )
    return "; ".join(f"{listed(arms)} ({where})" for where, arms in by_edge.items())


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    result: dict[str, list[str]] = {}
    for key, value in pairs:
        result.setdefault(key, []).append(value)
    return result


def unchosen(records: list[Record]) -> list[str]:
    """Return warnings about arms among which no choice was made, and about chosen arms that are not trained yet."""
    sentences = []
    for each in of_kind(records, NoChoice):
        why = "; ".join(part for part in (each.note, each.size) if part)
        if len(each.arms) == 1:
            sentences.append(
                f"{each.arms[0]} is missing: {why}. Launch the sweep again to train it."
            )
        else:
            sentences.append(
                f"No choice was made between {listed(each.arms)}: {why}. The lowest loss could come from easier "
                "seeds. Train these arms at the same seeds."
            )
    return sentences


def one_rate(records: list[Record]) -> str:
    """Return a sentence that lists the arms trained at one rate only; empty if the study compares no settings."""
    arms = at_one_rate(records)
    if not arms:
        return ""
    if len(arms) > N_NAMED:
        variants = sorted({each.variant for each in records if each.arm in arms and each.variant})
        return f"Trained at one untuned rate only: {len(arms)} arms of {', '.join(variants)}."
    return f"Trained at one untuned rate only: {listed(arms)}."


def _headline(records: list[Record], with_line: list[Record]) -> list[str]:
    """Return the sentences on trained runs.

    Args:
        records: the records of the arms that are compared.
        with_line: these, and the records of arms at other rates and scales of the MLP's output.
    """
    sentences = [_basis(records)]
    several_kappas = any(by_kappa(of_one) for of_one in sizes(records).values())
    several_gains = any(point.setting == "gain" for point in of_kind(records, ChoicePoint))
    if (several_kappas or several_gains) and (untuned := one_rate(records)):
        sentences.append(untuned)
    arms, benefits = normed(records), _benefits(records)
    judged = [verdicts.tuned(records, each.arm, each.arm) for each in benefits]
    sentences[:0] = [*(judged or [NO_VERDICT]), *verdicts.robust(with_line)]
    for benefit in benefits:
        sentences += [_benefit(records, benefit), *_phi_dyn(records, benefit.arm)]
        sentences += [*_static(records, benefit.arm), *_twins(records, benefit.arm)]
    sentences += where.sentences(records)
    sentences += robustness.sentences(with_line)
    for arm in arms:
        for probe, summarise in SUMMARISED.items():
            if controls.standing(records, probe) == "passed":
                sentences += summarise(records, arm)
    return sentences


def _benefits(records: list[Record]) -> list[Comparison]:
    return [each for arm in normed(records) for each in comparisons(records, Term.BENEFIT, arm)]


def _not_summarised(records: list[Record]) -> list[str]:
    """Return, for each summarised probe whose numbers the headline leaves out, a sentence with the reason."""
    sentences = []
    for probe in SUMMARISED:
        standing = controls.standing(records, probe)
        if standing == "failed":
            sentences.append(not_citable(probe, controls.failures(records, probe)))
        elif standing == "not run" and any(
            each.probe == probe for each in of_kind(records, Measurement)
        ):
            sentences.append(
                f"{probe} has not been validated on the control models, so its results are not summarised."
            )
    return sentences


def not_citable(probe: str, wrong: Sequence[str]) -> str:
    """Return the sentence that replaces the numbers of a probe that failed its controls."""
    noun = plural(len(wrong), "control")
    return f"{probe} failed its {noun} {', '.join(wrong)}: do not cite its numbers."


def _interval(row: Number) -> str:
    if row.low is None or row.high is None:
        return "no interval can be given"
    return f"95% interval {signed(row.low)} to {signed(row.high)}"


def _basis(records: list[Record]) -> str:
    runs = runs_of(records)
    arms = sorted({record.arm for record in records if record.arm})
    counts = _seed_counts(records)
    n_runs, n_arms = (f"{len(x)} {plural(len(x), w)}" for x, w in ((runs, "run"), (arms, "arm")))
    variants = sorted({record.variant for record in records if record.variant})
    named = arms if len(arms) <= N_NAMED else variants
    each = _seeds_per_arm(records) or "0 seeds"
    text = f"Compared here: {n_runs} of {n_arms} ({listed(named)}), {each} per arm"
    documents, tokens, effective = _documents(records)
    if documents:
        measured_on = f"{documents:,} {plural(documents, 'document')}" + (
            f" ({tokens:,} tokens)" if tokens else ""
        )
        text += f"; losses are measured on {measured_on} that were not used in training"
        if effective is not None and effective < 0.9 * documents:
            text += f", which count as {effective:.0f} documents of equal size"
    text += "."
    if counts and counts[0] == 1:
        text += " With one seed, results describe these trained models, not their variants."
    elif counts and (few := plan.cannot_reject(counts[0], len(per_token(records)))):
        text += f" {few}"
    return text


def _seed_counts(records: list[Record]) -> list[int]:
    arms = {record.arm for record in records if record.arm}
    return sorted({seeds_of(records, arm) or _n_of_loss(records, arm) for arm in arms})


def _seeds_per_arm(records: list[Record]) -> str:
    """Return the number of seeds per arm, as in `2 to 4 seeds`; empty without arms."""
    counts = _seed_counts(records)
    if not counts:
        return ""
    return f"{counts[0]} to {counts[-1]} seeds" if counts[0] < counts[-1] else seeds(counts[0])


def _documents(records: list[Record]) -> tuple[int, int, float | None]:
    """Return on how many documents and tokens the losses are measured, and the documents' effective number."""
    losses = [row for row in of_kind(records, Measurement) if row.probe == "loss"]
    effective = [row.n_effective for row in losses if row.n_effective is not None]
    return (
        max((row.n_clusters for row in losses), default=0),
        max((row.n for row in losses), default=0),
        min(effective, default=None),
    )


def _n_of_loss(records: list[Record], arm: str) -> int:
    return max((row.n for row in comparisons(records, Term.LOSS, arm)), default=0)


def _benefit(records: list[Record], benefit: Comparison) -> str:
    value = benefit.value or 0.0
    lower = "plain SoLU" if value < 0 else benefit.arm
    other = benefit.arm if value < 0 else "plain SoLU"
    text = f"Benefit of LN: {lower} had a loss {abs(value):.4f} nats per token lower than {other}"
    fixed = for_these_models(records, benefit)
    text += f" (benefit {signed(value)}"
    if fixed is not None:
        text += f"; for these trained models on other documents, {_interval(fixed)}"
    text += f"). For new seeds and documents: {_interval(benefit)}, from {seeds(benefit.n)}"
    if benefit.low is None or benefit.high is None:
        return f"{text}, so nothing is known about other seeds."
    if benefit.low <= 0 <= benefit.high:
        return f"{text}, so the sign is not settled."
    return f"{text}, so the sign is settled at the 95% level."


def _phi_dyn(records: list[Record], arm: str) -> list[str]:
    """Return a sentence with Phi_dyn, its meaning and its method, or with the reason why it is undefined.

    The next sentence of the headline, on the best static arm, explains how that arm was chosen.
    """
    sentences = []
    for row in comparisons(records, Term.SHARE, arm):
        if row.value is None:
            sentences.append(f"Phi_dyn ({arm}) is {row.note}.")
            continue
        interval = "no interval"
        if row.low is not None and row.high is not None:
            interval = f"95% interval {row.low:.2f} to {row.high:.2f}"
        sentences.append(
            f"Phi_dyn ({arm}) is {row.value:.2f} ({interval}, {seeds(row.n)}): the share of the benefit of LN "
            "that the best static arm trained here does not reach (0: none, 1: all, below 0: the static arm "
            f"is better){_then(row.note)}."
        )
    return sentences


def _static(records: list[Record], arm: str) -> list[str]:
    return [
        f"Loss of the best static arm minus loss of {arm}: {signed(row.value or 0.0)} nats per token "
        f"({_interval(row)} for new seeds and documents, {seeds(row.n)}){_then(remarks(row))}."
        f"{_supplied(records, row.against)}{_optimism(row)}"
        for row in comparisons(records, Term.STATIC, arm)
    ]


def _supplied(records: list[Record], static: str) -> str:
    """Return a sentence on a static arm in which ln_final rescales each token; empty for other arms."""
    rows = rescaled(records, static)
    if not rows:
        return ""
    return (
        f" In {static} the part of the residual stream that the gain multiplies is "
        f"{span(row.value for row in rows)} times as long as the rest ({SCALED_SIZE}), so ln_final gives this arm "
        "a scale for each token too. Equal losses do not show that one gain is enough."
    )


def _then(text: str) -> str:
    """Return the text after a semicolon; nothing for no text."""
    return f"; {text}" if text else ""


def _optimism(row: Comparison) -> str:
    """Return a sentence on the choice of the static arm at the reported seeds; empty if it was made elsewhere."""
    if row.optimism == 0.0:
        return ""
    chosen = f" It was chosen among {row.n_candidates} arms at the reported seeds. This can flatter it by "
    amount = "an unknown amount" if row.optimism is None else f"{row.optimism:.4f} nats"
    return f"{chosen}{amount}; with select_seeds= it cannot."


def _twins(records: list[Record], arm: str) -> list[str]:
    """Return sentences on the trained arms that differ from `arm` only in having one gain for all tokens."""
    found = twins(records, arm)
    sentences = []
    for row in comparisons(records, Term.DIFFERENCE, against=arm):
        if row.arm not in found:
            continue
        judged = ""
        if row.low is not None and row.high is not None and max(-row.low, row.high) < MARGIN:
            judged = f"; this is within {MARGIN} nats of 0"
        sentences.append(
            f"The static twin of {arm} is {row.arm}, trained with one gain for all tokens. Its loss minus that of "
            f"{arm} is {signed(row.value or 0.0)} nats per token ({_interval(row)} for new seeds and documents, "
            f"{seeds(row.n)}){judged}."
        )
    return sentences


def _engagement(records: list[Record], arm: str) -> list[str]:
    """Return a sentence on whether the gain varies, judged by the seeds' interval bounds, not by estimates."""
    content = engagement(records, arm, "not BOS")
    if not content:
        return []
    n = seeds(len(content))
    text = f"{arm}: {pretrained.VERDICTS[gain_varies(records, arm)]}"
    if spread := measured(records, "engagement", "log gain", arm, "sd"):
        text += f" (sd of log gain {span(row.value for row in spread)} over {n}"
        if bounds := envelope(spread):
            each = "95% interval" if len(spread) == 1 else "their 95% intervals reach from"
            text += f"; {each} {number(bounds[0])} to {number(bounds[1])}"
        text += ")"
    text += f"; median r {span(row.value for row in content)}"
    if top := measured(records, "engagement", "r", arm, "q99"):
        text += f"; r is at most {span(row.value for row in top)} at 99% of the tokens"
    text += ", where 0 means one gain for all tokens and 1 a true LayerNorm"
    groups = ("BOS", "1", "2-15", ">=16")
    labels = {
        "BOS": "BOS", "1": "position 1", "2-15": "positions 2-15", ">=16": "from position 16",
    }  # fmt: skip
    by_position = [
        f"{labels[group]} {span(row.value for row in rows)}"
        for group in groups
        if (rows := engagement(records, arm, group))
    ]
    if not by_position:
        return [f"{text}."]
    is_same = len(by_position) > 1 and len({part.rsplit(" ", 1)[1] for part in by_position}) == 1
    return [
        f"{text}; {'the same at every position' if is_same else f'by position: {listed(by_position)}'}."
    ]


def _freeze(records: list[Record], arm: str) -> list[str]:
    """Return a sentence on how one gain for all tokens changes the loss of a trained model."""
    parts = []
    for quantity, name in FREEZES:
        rows = measured(records, "scale_freeze", quantity, arm)
        if not rows:
            continue
        text = f"at {name} the loss changes by {_signed_span(rows)} nats per token"
        bounds = envelope(rows)
        if bounds is None:
            parts.append(f"{text} (no interval)")
            continue
        if max(-bounds[0], bounds[1]) < NO_COST:
            judged = f"within {NO_COST} nats of 0, so negligible at inference"
        elif bounds[0] > 0:
            judged = "a cost"
        elif bounds[1] < 0:
            judged = "an improvement"
        else:
            judged = "not settled"
        each = "95% interval" if len(rows) == 1 else "the 95% intervals of the runs reach from"
        parts.append(f"{text} ({judged}; {each} {signed(bounds[0])} to {signed(bounds[1])})")
    if not parts:
        return []
    return [f"The trained {arm}, given one gain for all tokens: {'; '.join(parts)}."]


def _signed_span(rows: Sequence[Number]) -> str:
    values = [row.value for row in rows if row.value is not None]
    low, high = signed(min(values)), signed(max(values))
    return low if low == high else f"{low} to {high}"


SUMMARISED = {"engagement": _engagement, "scale_freeze": _freeze}
"""Probes whose numbers the headline cites, and the functions that write the sentences."""
