"""Removal of the per-token gain from trained models: the loss after each step, and whether the steps are in order.

Source: protocol.md section 7, P7.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from soluscope.report.blocks import Block, Bullets, Cell, Paragraph, Table
from soluscope.report.findings import estimate, measured, rescaled, seeds
from soluscope.results import (
    MARGIN,
    OUTPUT_SIZE,
    SCALED_SIZE,
    Bounded,
    ClaimTested,
    OfRemoval,
    Order,
    Record,
    Removal,
    RemovalOfArm,
    Removed,
    of_kind,
)

MEANINGS = {
    Removed.FROZEN: "one gain for all tokens, the best one on the select split; nothing else changes",
    Removed.REFIT: "the same, and W_out, b_out, gamma and beta are fitted again on the select split",
    Removed.FINE_TUNED: "one gain, and all weights are trained further",
    Removed.ALL: "all norms divide by constants, and all weights are trained further",
}
LEAD = (
    "Each trained model with a per-token gain gets one gain for all tokens. The numbers are its losses on the "
    "report split after this, minus its loss as trained, in nats per token. A later step can change more "
    "weights, so its number is at most the earlier one's if both fits found their optimum. A refit and "
    "further training also improve the model in other ways. So another column subtracts the loss of the same "
    "model with its per-token gain kept and the same adaptation: the difference is the worth of the per-token "
    "gain. A number near 0 there shows that one gain is enough for this trained model, unless ln_final "
    "rescales each token anyway (|o| / |r0| above 5, see P4). A number above 0 after a refit does not show "
    "that a per-token gain is needed, because the weights before the readout are not trained again."
)
ALL_LEAD = (
    "Further training replaces the per-token scale of every norm by a constant: of ln2, the mid norm, ln1 and "
    "ln_final in this order, then the separate constants of EOS and BOS. The numbers are losses minus the loss as "
    "trained, in nats per token. The fair comparison is with the same model after the same further training with "
    "all norms kept: that difference is the worth of all per-token scales together. Baroni et al. (arXiv "
    "2507.02559) make three claims about such models. Each is tested here in fp64, on the same documents of the "
    "report split."
)
FINAL = {
    "live": "ln_final live: it rescales each token separately, whatever the mid norm does.",
    "frozen": "ln_final's scale held at its value in the trained model: the refit is then a convex problem.",
}


def blocks(records: Sequence[Record]) -> list[Block]:
    """Return the numbers of each arm after each step, with warnings; empty without a removal."""
    rows = _rows(records)
    steps = [row for row in rows if row.step is not Removed.ALL]
    result: list[Block] = []
    if steps:
        result += [Paragraph(text, style="warn") for text in warnings(records)]
        result += [Paragraph(LEAD), Bullets(sentences(records))]
        for final_norm, meaning in FINAL.items():
            result += _table(
                records, [row for row in steps if row.final_norm == final_norm], meaning
            )
    of_all = [row for row in rows if row.step is Removed.ALL]
    if of_all:
        result += _table(records, of_all, ALL_LEAD)
        result += [*_claims(of_kind(records, ClaimTested))]
    return result


def _table(records: Sequence[Record], rows: Sequence[OfRemoval], meaning: str) -> list[Block]:
    """Return the table of the losses after some steps, below a paragraph; empty without a loss."""
    lines = [_line(rows, of_kind(records, Removal), row) for row in rows if _is_main(row)]
    heads = [
        "arm", "step", "minus the loss as trained", "by seed [95%, other documents]",
        "step before minus this step", "minus the same adaptation of the unchanged model",
        "minus one gain from the start", "note",
    ]  # fmt: skip
    return [Paragraph(meaning), Table(heads, lines, n_text=2)] if lines else []


def _claims(claims: Sequence[ClaimTested]) -> Iterator[Block]:
    """Yield the claims about models without per-token scales, one line for each claim and run."""
    heads = [
        "claim", "run", "number", "as trained", "trained further as it was", "without per-token scales",
        "change", "claim holds", "note",
    ]  # fmt: skip
    lines: list[list[Cell]] = [
        [
            row.claim, row.run, f"{row.probe}: {row.quantity}",
            *(_small(each) for each in (row.before, row.kept, row.after, row.change)),
            "not settled" if row.holds is None else "yes" if row.holds else "no", row.note,
        ]
        for row in sorted(claims, key=lambda row: (row.probe, row.quantity, row.run, row.n_tuned))
    ]  # fmt: skip
    if lines:
        yield Table(heads, lines, n_text=3)


def _small(number: Bounded | None) -> str:
    """Return a number that may be tiny, with its bounds if it has them."""
    if number is None or number.value is None:
        return ""
    if number.low is None or number.high is None:
        return f"{number.value:.3g}"
    return f"{number.value:.3g} [{number.low:.3g}, {number.high:.3g}]"


def warnings(records: Sequence[Record]) -> list[str]:
    """Return a sentence for each pair of steps whose order is violated."""
    return [
        f"{row.arm}, ln_final {row.final_norm}: {row.step} is above {row.before} by "
        f"{estimate(_turned(row), 4)} nats, which is the wrong order: the fit of {row.step} missed its optimum, or "
        "does not hold for other documents. More text (n_fit_tokens) may help."
        for row in _rows(records)
        if row.order == Order.VIOLATED
    ]


def sentences(records: Sequence[Record]) -> list[str]:
    """Return, for each arm, a sentence on the cost of one gain after each step, with ln_final live."""
    rows = _rows(records)
    result = []
    for arm in dict.fromkeys(row.arm for row in rows):
        first = _find(rows, arm, Removed.FROZEN)
        if first is None:
            continue
        before = _find(rows, arm, Removed.FROZEN, untrained=True)
        changes = f"with one gain for all tokens the loss changes by {estimate(first, 4)} nats"
        text = f"{arm} ({_basis(first)}): {changes}"
        text += f" (before training by {estimate(before, 4)})" if before else ""
        last = first
        for row in rows:
            if (row.arm, row.final_norm, row.against) == (arm, "live", "same adaptation"):
                text += f"; {_adapted(row)} the difference is {estimate(row, 4)}"
                last = row
        result.append(f"{text}. {_verdict(last, records)}")
    return result


def _verdict(row: OfRemoval, records: Sequence[Record]) -> str:
    """Return the meaning of a number for the per-token gain, from its interval, the margin and the MLP's size."""
    if row.low is None or row.high is None:
        return "Without an interval this settles nothing."
    if row.low > MARGIN:
        return "The per-token gain is worth more than the margin here; more further training may make up for it."
    if row.high >= MARGIN:
        return f"The interval contains the margin of {MARGIN} nats, so this is not settled."
    if rescaled(records, row.arm):
        return "ln_final rescales each token anyway, so this does not show that one gain is enough."
    if not measured(records, OUTPUT_SIZE, SCALED_SIZE, row.arm, "median"):
        return (
            f"This is below the margin of {MARGIN} nats. It shows that one gain is enough "
            "only if ln_final does not rescale each token anyway, which was not measured."
        )
    return f"One gain is enough here, to within {MARGIN} nats."


def _adapted(row: OfRemoval) -> str:
    if row.n_tuned:
        return f"after {row.n_tuned:,} tokens of further training of both"
    return "between two refitted readouts"


def _basis(row: OfRemoval) -> str:
    return seeds(row.n) if isinstance(row, RemovalOfArm) else "1 seed, interval for other documents"


def _rows(records: Iterable[Record]) -> list[OfRemoval]:
    """Return the means over the seeds of each arm, or the run's numbers of an arm with one seed, step by step."""
    of_arms = of_kind(records, RemovalOfArm)
    averaged = {row.arm for row in of_arms}
    rows = [*of_arms, *(row for row in of_kind(records, Removal) if row.arm not in averaged)]
    steps = [*Removed]
    return sorted(rows, key=lambda row: (steps.index(row.step), row.n_tuned))


def _is_main(row: OfRemoval) -> bool:
    """Return whether a number is a trained model's loss after a step minus its loss as trained."""
    return row.against == "as trained" and row.before is None and not row.untrained


def _find(
    rows: Sequence[OfRemoval], arm: str, step: Removed, untrained: bool = False
) -> OfRemoval | None:
    """Return an arm's number of a step with ln_final live, minus the loss as trained."""
    wanted = (arm, step, "live", "as trained", untrained, None)
    fields = ("arm", "step", "final_norm", "against", "untrained", "before")
    return next(
        (row for row in rows if tuple(getattr(row, name) for name in fields) == wanted), None
    )


def _line(rows: Sequence[OfRemoval], of_runs: Sequence[Removal], found: OfRemoval) -> list[Cell]:
    """Return the table's line of a step of an arm."""

    def alike(row: OfRemoval) -> bool:
        fields = ("arm", "step", "final_norm", "n_tuned", "untrained")
        return all(getattr(row, name) == getattr(found, name) for name in fields)

    by_seed = [row for row in of_runs if alike(row) and _is_main(row)]
    others = [row for row in rows if alike(row) and not _is_main(row)]
    falls = [f"{estimate(row, 4)}: {row.order}" for row in others if row.before]
    same = [estimate(row, 4) for row in others if row.against == "same adaptation"]
    from_start = [
        f"{row.against}: {estimate(row, 4)}"
        for row in others
        if row.against not in ("as trained", "same adaptation")
    ]
    tokens = [f"{found.n_tuned:,} tokens"] * bool(found.n_tuned)
    return [
        found.arm,
        [found.step, MEANINGS[found.step], *tokens],
        estimate(found, 4),
        [f"s{row.seed}: {estimate(row, 4)}" for row in by_seed],
        falls,
        same,
        from_start,
        [f"s{row.seed}: {row.note}" for row in by_seed if row.note],
    ]


def _turned(row: OfRemoval) -> OfRemoval:
    """Return a difference with its sign changed."""
    low, high = (None if each is None else -each for each in (row.high, row.low))
    return replace(row, value=None if row.value is None else -row.value, low=low, high=high)
