"""The tokens at which the best static arm loses more than an arm with a per-token norm.

Both arms are trained models, so this shows where a per-token scale is missed after training without it. H-dyn
predicts a difference at tokens of high gain. H-smear predicts it at those of them whose codes are diffuse.

The losses are paired token by token. A token's gain, K_eff and loss, by which tokens are sorted, are means over the
runs at the other seeds. A run's own values would sort its own luck: where a model is unsure by chance, its gain and
its loss can both be high, and the difference would then depend on the gain although nothing does. Contrasts compare
tokens of equal loss, because two models differ more at tokens that are hard for both.

Source: protocol.md section 4, "Where".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from soluscope.comparison import stats
from soluscope.comparison.stats import Floats
from soluscope.errors import UserError
from soluscope.results import (
    BOS_TOKENS,
    CONTRASTS,
    DIFFUSE,
    HIGH_GAIN,
    MARGIN,
    SIGNIFICANT,
    Comparison,
    Located,
    Record,
    Term,
    Verdict,
    Where,
    of_kind,
)

if TYPE_CHECKING:
    import pandas as pd

ALL, BOS = "not BOS", BOS_TOKENS
BY_GAIN = tuple(f"log gain Q{q}" for q in range(1, 5))
BY_K = tuple(f"K_eff Q{q}" for q in range(1, 5))
BY_BOTH = tuple(f"{quartile}, K_eff {half}" for quartile in BY_GAIN for half in ("lower", "upper"))
DIFFUSE_CODES = BY_BOTH[-1]
OF_GAIN, OF_CODE = CONTRASTS
PLACE = ["document", "pos", "token"]
"""Columns that identify a token."""
N_BINS = 8
"""Number of quantile bins of the loss, and of the gain within a quartile, in which tokens count as equal."""
N_LOSS_BINS = 4
"""The same of the loss where the gain is held equal too."""
TIE = 1e-4
"""Difference of log gains, or of log K_eff, below which tokens count as equal. Stored values are fp32."""
APART = math.log(1.5)
"""Least mean difference of log K_eff between the halves of a contrast; below it the codes are equally diffuse."""
NEARLY_ALL = 0.95
"""Share of the tokens from which all of them count as diffuse; below 1 minus this share, none does."""

Bools = NDArray[np.bool_]
Tables = Callable[[str], Mapping[int, "pd.DataFrame"]]
"""Function from an arm to a table for each reported seed: `PLACE`, loss, log_gain and k_eff of each token."""


@dataclass(frozen=True, eq=False)
class _Seed:
    """One seed's difference between the arms, and the values by which its tokens are sorted, [token]."""

    difference: Floats
    log_gain: Floats
    log_k: Floats
    loss: Floats


@dataclass(frozen=True, eq=False)
class _Tokens:
    document: NDArray[np.intp]
    """Number of each token's document, from 0, [token]."""
    content: Bools
    """True for tokens that are not BOS, [token]."""
    seeds: tuple[_Seed, ...]
    agreement: float | None


@dataclass(frozen=True, eq=False)
class _Estimate:
    """A weighted sum of one seed's differences."""

    value: float
    influence: Floats
    """Part of the value that each document brings: about the value minus that without the document."""
    n: Floats
    """Number of tokens, in the proportion of their weights, [document]."""


def where(compared: Sequence[Record], tables: Tables) -> list[Record]:
    """Compare the best static arm with each arm with a per-token norm, token by token.

    Args:
        compared: records of `compare`.
        tables: the losses by token of an arm's reported runs; empty for an arm without them.

    Returns:
        For each arm with a per-token norm: `WHERE` comparisons by quartile of the log gain, of K_eff and of both,
        at BOS and at all other tokens; two `CONTRAST`s, with p after Holm's correction over those of all arms;
        and the verdict, `Located`. The same for each fixed design, with a separate correction.

    Raises:
        UserError: if two runs were not measured on the same tokens.
    """
    rows = [
        row
        for row in of_kind(compared, Comparison)
        if (row.term, row.cluster, row.lr) == (Term.STATIC, "seed", None)
    ]
    return [
        record
        for design in dict.fromkeys(row.design for row in rows)
        for record in _of_design([row for row in rows if row.design == design], tables)
    ]


def _of_design(rows: Sequence[Comparison], tables: Tables) -> list[Record]:
    """Return the records of the arms of one design; their contrasts are a family of tests."""
    found: list[tuple[Comparison, _Tokens, dict[str, Comparison], list[Comparison]]] = []
    for row in rows:
        tokens = _tokens(row, tables(row.against), tables(row.arm))
        if tokens is not None:
            of_seeds, of_documents = _compared(row, tokens)
            found.append((row, tokens, of_seeds, of_documents))
    tests = {
        f"{row.arm}\0{name}": of_seeds[name].p
        for row, _, of_seeds, _ in found
        for name in CONTRASTS
        if name in of_seeds
    }
    adjusted = stats.holm({name: 1.0 if p is None else p for name, p in tests.items()})
    records: list[Record] = []
    for row, tokens, of_seeds, of_documents in found:
        for name in CONTRASTS:
            if name in of_seeds:
                p_adj = adjusted[f"{row.arm}\0{name}"]
                of_seeds[name] = _with_p(of_seeds[name], p_adj, len(tests))
        records += [*of_seeds.values(), *of_documents, _located(row, tokens, of_seeds)]
    return records


def _with_p(row: Comparison, p_adj: float, n_tests: int) -> Comparison:
    if row.p is None:
        return row
    note = f"sign-flip p = {row.p:.3g}; Holm-adjusted p = {p_adj:.3g} over {n_tests} contrasts"
    return replace(row, p_adj=p_adj, note="; ".join(part for part in (row.note, note) if part))


def _tokens(
    row: Comparison, static: Mapping[int, pd.DataFrame], ln: Mapping[int, pd.DataFrame]
) -> _Tokens | None:
    """Return the paired losses at the seeds that both arms share, or None without such a seed."""
    seeds = sorted(static.keys() & ln.keys())
    if not seeds:
        return None
    first = ln[seeds[0]]
    for table in (*(static[seed] for seed in seeds), *(ln[seed] for seed in seeds)):
        if not np.array_equal(table[PLACE].to_numpy(), first[PLACE].to_numpy()):
            raise UserError(
                f"runs of {row.arm!r} and {row.against!r} in {row.study!r} were not measured on the same tokens: "
                "probe them again"
            )
    left, right = (
        np.stack([each[seed]["loss"].to_numpy(np.float64) for seed in seeds])
        for each in (static, ln)
    )
    gain = np.stack([ln[seed]["log_gain"].to_numpy(np.float64) for seed in seeds])
    k = np.log(np.stack([ln[seed]["k_eff"].to_numpy(np.float64) for seed in seeds]))
    content = first["pos"].to_numpy() > 0
    of_others = [_of_others(each) for each in (gain, k, (left + right) / 2)]
    _, document = np.unique(first["document"].to_numpy(), return_inverse=True)
    return _Tokens(
        document, content,
        tuple(map(_Seed, left - right, *of_others)),
        _agreement(gain[:, content], of_others[0][:, content]) if len(seeds) > 1 else None,
    )  # fmt: skip


def _of_others(values: Floats) -> Floats:
    """Return the mean over the other seeds, [seed token]; with one seed, its own values."""
    n = len(values)
    return values if n == 1 else (values.sum(axis=0) - values) / (n - 1)


def _agreement(own: Floats, others: Floats) -> float | None:
    """Return the mean over seeds of the correlation of own and others' values; None where one is constant."""
    if min(np.ptp(own, axis=1).min(), np.ptp(others, axis=1).min()) <= TIE:
        return None
    pairs = zip(own, others, strict=True)
    return float(np.mean([np.corrcoef(mine, theirs)[0, 1] for mine, theirs in pairs]))


# --- numbers --------------------------------------------------------------------------------------


def _compared(row: Comparison, tokens: _Tokens) -> tuple[dict[str, Comparison], list[Comparison]]:
    """Return the comparisons of one arm by their tokens, for new seeds, and those for new documents."""
    of_seeds: dict[str, Comparison] = {}
    of_documents = []
    by_seed = [dict(_estimates(seed, tokens)) for seed in tokens.seeds]
    for name in (ALL, BOS, *BY_GAIN, *BY_K, *BY_BOTH, *CONTRASTS):
        if not all(name in found for found in by_seed):
            continue  # without such tokens in some run
        sums, counts = _pooled([found[name] for found in by_seed])
        new = stats.seeds_and_documents(sums, counts)
        fixed = stats.bootstrap_mean(sums.mean(axis=0), counts)
        p = new.p if name in CONTRASTS and len(sums) > 1 else None
        tested = stats.seeds_and_documents(sums, counts, level=0.90)
        base = replace(
            row, term=Term.CONTRAST if name in CONTRASTS else Term.WHERE, group=name, value=new.value,
            verdict=Verdict(stats.equivalence(tested, MARGIN)), choice="", n_candidates=0, optimism=0.0,
            p=None, p_adj=None, note="",
        )  # fmt: skip
        of_seeds[name] = replace(base, low=new.low, high=new.high, n=new.n, n_clusters=new.n, p=p)
        of_documents.append(
            replace(
                base, cluster="document", low=fixed.low, high=fixed.high, n=new.n, verdict=None,
                n_clusters=fixed.n_clusters, n_effective=fixed.n_effective,
            )
        )  # fmt: skip
    return of_seeds, of_documents


def _estimates(seed: _Seed, tokens: _Tokens) -> Iterator[tuple[str, _Estimate]]:
    """Yield one seed's estimates by their tokens; groups without tokens are left out."""
    content = tokens.content
    masks = {ALL: content, BOS: ~content}
    gain_quartile, k_quartile = (_bins(x, content, 4) for x in (seed.log_gain, seed.log_k))
    for names, quartile in ((BY_GAIN, gain_quartile), (BY_K, k_quartile)):
        masks |= {name: content & (quartile == q) for q, name in enumerate(names)}
    for q in range(4):
        inside = content & (gain_quartile == q)
        upper = _upper_half(seed.log_k, inside, _bins(seed.log_gain, inside, N_BINS))
        masks[BY_BOTH[2 * q]], masks[BY_BOTH[2 * q + 1]] = inside & ~upper, upper
    for name, mask in masks.items():
        if mask.any():
            yield name, _mean(seed.difference, tokens, mask)
    high = masks[HIGH_GAIN]
    loss_bin = _bins(seed.loss, content, N_BINS)
    if (found := _matched(seed.difference, tokens, high, content & ~high, loss_bin)) is not None:
        yield OF_GAIN, found
    cell = _bins(seed.log_gain, high, N_BINS) * N_LOSS_BINS + _bins(seed.loss, high, N_LOSS_BINS)
    upper = _upper_half(seed.log_k, high, cell)
    apart = _matched(seed.log_k, tokens, upper, high & ~upper, cell)
    found = _matched(seed.difference, tokens, upper, high & ~upper, cell)
    if apart is not None and found is not None and apart.value >= APART:
        yield OF_CODE, found


def _bins(values: Floats, inside: Bools, n: int) -> NDArray[np.intp]:
    """Return the quantile bin of each token, from 0, with edges from the tokens `inside`; equal values share one.

    With ties some bins are empty. The last one holds the tokens at its lower edge too.
    """
    if not inside.any():
        return np.zeros(len(values), np.intp)
    edges = np.quantile(values[inside], np.arange(1, n) / n)
    return np.searchsorted(edges - TIE, values, side="right")


def _upper_half(log_k: Floats, inside: Bools, cell: NDArray[np.intp]) -> Bools:
    """Return the tokens whose code is diffuse, and more so than that of the median token of their cell."""
    upper = np.zeros(len(log_k), dtype=bool)
    for each in np.unique(cell[inside]):
        here = inside & (cell == each)
        upper |= here & (log_k > np.median(log_k[here]) + TIE)
    return upper & (log_k >= math.log(DIFFUSE) - TIE)


def _mean(values: Floats, tokens: _Tokens, which: Bools) -> _Estimate:
    """Return the mean of the tokens `which`."""
    weight = which / which.sum()
    return _weighted(values, weight, np.full(len(values), weight @ values), tokens)


def _matched(
    values: Floats, tokens: _Tokens, one: Bools, other: Bools, stratum: NDArray[np.intp]
) -> _Estimate | None:
    """Return the mean of the tokens `one` minus that of the tokens `other` of the same stratum; None without any.

    A stratum with n and m tokens has the weight n m / (n + m), so that strata with few of either count little.
    """
    n, m = (np.bincount(stratum, part, int(stratum.max()) + 1) for part in (one, other))
    share = n * m / np.maximum(n + m, 1)
    if not share.any():
        return None
    share /= share.sum()
    weight, fitted = np.zeros(len(values)), np.zeros(len(values))
    for sign, part, count in ((1, one, n), (-1, other, m)):
        per_token = np.maximum(count, 1)
        means = np.bincount(stratum, values * part, len(count)) / per_token
        weight += sign * part * (share / per_token)[stratum]
        fitted += part * means[stratum]
    return _weighted(values, weight, fitted, tokens)


def _weighted(values: Floats, weight: Floats, fitted: Floats, tokens: _Tokens) -> _Estimate:
    """Return the weighted sum of the values; `fitted` are the means that the values of a document can move."""
    n_documents = int(tokens.document.max()) + 1
    size = np.abs(weight)
    return _Estimate(
        float(weight @ values),
        np.bincount(tokens.document, weight * (values - fitted), n_documents).astype(np.float64),
        np.bincount(tokens.document, size, n_documents) * (np.count_nonzero(size) / size.sum()),
    )


def _pooled(estimates: Sequence[_Estimate]) -> tuple[Floats, Floats]:
    """Return sums [seed document] and counts [document] whose quotients are the estimates.

    The counts are means over seeds. A document's part is its count times the estimate, plus its influence on the
    estimate, so that resampling documents moves the quotient as it would move the estimate, to first order.
    """
    counts = np.mean([each.n for each in estimates], axis=0)
    kept = counts > 0
    sums = [each.value * counts + counts.sum() * each.influence for each in estimates]
    return np.stack(sums)[:, kept], counts[kept]


# --- the verdict ----------------------------------------------------------------------------------


def _located(row: Comparison, tokens: _Tokens, found: Mapping[str, Comparison]) -> Located:
    agreement = tokens.agreement
    return Located(
        study=row.study, arm=row.arm, variant=row.variant, commit=row.commit, config=row.config,
        against=row.against, size=row.size, design=row.design, n=len(tokens.seeds), agreement=agreement,
        where=_verdict(tokens, found),
    )  # fmt: skip


def _verdict(tokens: _Tokens, found: Mapping[str, Comparison]) -> Where:
    """Return where the static arm loses more; see `Where`."""
    of_gain, of_code = found.get(OF_GAIN), found.get(OF_CODE)
    if of_gain is None:
        return Where.OPEN
    if not (_is_above(of_gain) and _is_above(found[HIGH_GAIN])):
        none = of_gain.verdict is Verdict.EQUIVALENT or (of_gain.high or 0.0) < 0
        return Where.NOT_HIGH_GAIN if none else Where.OPEN
    if of_code is None:
        return _of_equal_codes(tokens)
    if _is_above(of_code) and _is_above(found[DIFFUSE_CODES]):
        return Where.DIFFUSE
    none = of_code.verdict is Verdict.EQUIVALENT or (of_code.high or 0.0) < 0
    return Where.HIGH_GAIN if none else Where.CODE_OPEN


def _is_above(row: Comparison) -> bool:
    """Return whether a difference is above 0 for new seeds, after correction where it was tested."""
    is_shown = row.term is not Term.CONTRAST or (row.p_adj or 1.0) < SIGNIFICANT
    return is_shown and row.low is not None and row.low > 0


def _of_equal_codes(tokens: _Tokens) -> Where:
    """Return the verdict where tokens of high gain do not differ enough in K_eff for a contrast."""
    shares = []
    for seed in tokens.seeds:
        high = tokens.content & (_bins(seed.log_gain, tokens.content, 4) == 3)
        shares.append(float(np.mean(seed.log_k[high] >= math.log(DIFFUSE) - TIE)))
    if min(shares) >= NEARLY_ALL:
        return Where.ALL_DIFFUSE
    return Where.HIGH_GAIN if max(shares) <= 1 - NEARLY_ALL else Where.CODE_OPEN
