"""The records of results.jsonl, the report's input: one line per record, distinguished by `kind`.

A record is a number with its interval and its origin, or a fact needed to read the numbers: an arm's
settings, the runs that a probe leaves out, a probe's description. Verdicts are enumerated; `note` is
prose for people and is never parsed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, cast

from soluscope.errors import UserError
from soluscope.files import Whole, from_json, reason, write_text
from soluscope.terminal import say

MARGIN = 0.005
"""Smallest difference of losses that matters, in nats per token. Phi_dyn needs a larger benefit of LN.

Source: protocol.md section 4."""

HELD_OUT = "loss on held-out documents"
"""Quantity of the training curves: the mean over the same tokens of the select split in every run."""

SIGNIFICANT = 0.05
"""Largest corrected p of a difference that counts as shown."""

DIFFUSE = 4.0
"""Fewest effective neurons of a diffuse code. With fewer, one neuron has over a quarter of the code's square."""

DYNAMICS = "dynamics"
"""Name in the place of a probe's, of a run's numbers at the steps whose weights it kept."""
UNPINNED = 0.5
"""Median r from which a LayerNorm counts as no longer pinned by its epsilon."""
CROSSES = f"tokens at which the median r crosses {UNPINNED}"
"""Quantity of `DYNAMICS`: the number of tokens after which a LayerNorm is no longer pinned."""
OUTPUT_SIZE = "output_size"
"""Name in the place of a probe's, of the size of the MLP's output, which every evaluated run has."""
SCALED_SIZE = "|o| / |r0|"
"""Quantity of `OUTPUT_SIZE`: the norm of the stream's part that the gain multiplies, over the norm of the rest."""
NOT_PROBES = frozenset({"loss", OUTPUT_SIZE, "training", DYNAMICS, "neurons", "pretrained"})
"""Names in the place of a probe's, of numbers that no probe measures."""
READABILITY = "rule F1: mid"
"""Quantity of `soluscope neurons`: the F1 of a neuron's best rule with its activations before the norm."""
RATINGS = "rating"
"""Folder of people's ratings in a study's folder, and name of the file of their records in it."""
PROXIES = "proxies"
"""Name of the file of the automatic proxies' records in `RATINGS`, and of the folder of their numbers there."""

HIGH_GAIN = "log gain Q4"
"""Group of the tokens of high gain."""
BOS_TOKENS = "BOS"
"""Group of the first position of every row."""
CONTRASTS = (
    "log gain Q4 minus Q1 to Q3, at equal loss",
    "log gain Q4: K_eff upper minus lower, at equal gain and loss",
)
"""Groups of the two contrasts between tokens: of the gain, and of the code at high gain."""

Direction = Literal["higher", "lower", "neither"]
R = TypeVar("R", bound="Record")
T = TypeVar("T")


class Verdict(StrEnum):
    """Outcome of a comparison."""

    EQUIVALENT = "equivalent"
    """The difference is closer to 0 than `MARGIN`, by two one-sided tests."""
    DIFFERENT = "different"
    """The difference is farther from 0 than `MARGIN`."""
    INCONCLUSIVE = "inconclusive"
    UNDEFINED = "undefined"
    """The comparison is a ratio, and the lower bound of its denominator is not above `MARGIN`."""


class Term(StrEnum):
    """Quantity that a comparison estimates."""

    LOSS = "loss"
    """Mean loss of an arm over its seeds."""
    DIFFERENCE = "difference"
    """Loss of `arm` minus loss of `against`."""
    BENEFIT = "benefit of LN"
    """Loss of the plain arm `against` minus loss of `arm`, which has a per-token norm."""
    STATIC = "static - LN"
    """Loss of the best static arm `against` minus loss of `arm`."""
    SHARE = "Phi_dyn"
    """`STATIC` as a share of `BENEFIT`."""
    STEP = "step"
    """One step of the telescoping sum from the plain arm to `arm`: the loss before it minus the loss after it."""
    SENSITIVITY = "rate sensitivity"
    """Mean over common learning rates of the loss of `arm` above its loss at its best rate."""
    SENSITIVITY_STEP = "step of the rate sensitivity"
    """One step of the chain to `arm`: the sensitivity before it minus that after it."""
    SENSITIVITY_PART = "part of the rate sensitivity"
    """The steps of one `Part` together."""
    WHERE = "static - LN at some tokens"
    """`STATIC` at the tokens of `group`: of one quartile, at BOS, at all others."""
    CONTRAST = "contrast of static - LN between tokens"
    """`STATIC` at some tokens minus that at other tokens; `group` names both."""
    GAP = "gap during training"
    """Loss of `arm` minus loss of `against` after `x` tokens of training."""
    SINCE = "change of the gap"
    """`GAP` at the end of the stretch of training in `group`, minus that at its beginning."""
    PROBE = "probe"
    """A probe's number in the trained runs of `arm` minus its number in their own initialisations."""


class Part(StrEnum):
    """Part of the difference in rate sensitivity between the plain arm and an arm with a per-token norm.

    The other parts add up to `ALL`. A chain without a static arm has no `ONE_GAIN`: `SCALE` then contains it.
    """

    ALL = "all"
    ONE_GAIN = "one gain for all tokens"
    """From the plain arm to the last static arm of the chain."""
    SCALE = "a scale for each token"
    """From there to the first arm with a per-token norm; `adds` names what that arm adds."""
    GRADIENT = "the gradient through that scale"
    """From there to the arm itself."""


class Where(StrEnum):
    """The tokens at which a trained static arm loses more than an arm with a per-token norm."""

    DIFFUSE = "at high gain and diffuse codes"
    """At tokens of high gain, and of these at the diffuse codes rather than at others: as H-smear predicts."""
    HIGH_GAIN = "at high gain, whatever the code"
    """At tokens of high gain, and no more at their diffuse codes than at others: as H-dyn alone predicts."""
    ALL_DIFFUSE = "at high gain, where all codes are equally diffuse"
    """At tokens of high gain, which have no other codes, so that H-smear and H-dyn predict the same."""
    CODE_OPEN = "at high gain; not settled at which codes"
    NOT_HIGH_GAIN = "not at high gain"
    """The arms differ at tokens of high gain no more than at others."""
    OPEN = "not settled"


class Removed(StrEnum):
    """Step of the removal of a trained model's per-token gain, or the removal of all its per-token scales.

    Its number is the loss after the step minus the loss of the trained model.
    """

    FROZEN = "Phi_inf"
    """All tokens have the one gain that is best for the loss; nothing else changes."""
    REFIT = "Phi_ro"
    """The same, and the readout after the gain is fitted again."""
    FINE_TUNED = "Phi_ft"
    """One gain for all tokens, and all weights are trained further."""
    ALL = "no per-token scale"
    """All norms divide by constants, and all weights are trained further. No later step of the others."""


class Order(StrEnum):
    """Relation of two steps of a removal.

    The later step can change more weights, so its number is at most the earlier one's.
    """

    HOLDS = "holds"
    VIOLATED = "violated"
    """The interval of the earlier number minus the later one is wholly below 0: a fit missed its optimum."""
    OPEN = "not settled"


class Rating(StrEnum):
    """Quantity that people's ratings of neurons estimate."""

    SHARE = "share interpretable"
    """Share of an arm's neurons that people call interpretable; `untrained` is the share before training."""
    DIFFERENCE = "difference of shares"
    """Share of `arm` minus share of `against`."""
    STAGES = "after minus before the norm"
    """Share of `arm` with the activations after the mid norm minus that with the activations before it."""
    BETWEEN = "kappa between raters"
    WITHIN = "kappa with oneself"
    KNOWN = "right on planted neurons"
    """Share of right answers to neurons that are made to have an answer."""
    DETECTABLE = "difference found in 85% of cases"
    SECONDS = "median seconds per neuron"


class Ladder(StrEnum):
    """Setting in which the arms of a ladder differ."""

    GAIN = "gain"
    """One gain for all tokens."""
    ENTROPY = "entropy penalty"
    """Weight of the penalty on a peaked SoLU."""
    WIDTH = "d_mlp"
    """Number of neurons, at one d_model."""


class Curve(StrEnum):
    """Curve of the baseline's loss against its number of weights."""

    POWER_LAW = "power law"
    LOCAL = "between sizes"
    """Straight lines between the sizes, against the logarithm of the weights."""


class Bound(StrEnum):
    """Relation of a stored multiplier to the number that it estimates."""

    NONE = "exact"
    AT_LEAST = "at least"
    AT_MOST = "at most"


class ProxyTerm(StrEnum):
    """Number of an automatic proxy, which is not a rating."""

    MEAN = "mean over neurons"
    DIFFERENCE = "difference of means"
    """Mean of `arm` minus mean of `against`."""
    STAGES = "after minus before the norm"
    """Mean of `arm` at the activations after the mid norm minus that before it, over the same neurons."""
    TWIN = "AUC, trained against untrained"
    """Probability that a neuron of `arm` has a higher number than a neuron of the arm before training."""
    PLANTED = "AUC, one class against four"
    """Probability that a planted neuron of one class of tokens has a higher number than one of four classes."""
    RATINGS = "AUC, called interpretable or not"
    """Probability that a neuron which people call interpretable has a higher number than one which they do not."""


class Grid(StrEnum):
    """Position of the chosen setting on its grid."""

    INSIDE = "inside the grid"
    LOWER_EDGE = "at the lower edge of the grid"
    UPPER_EDGE = "at the upper edge of the grid"
    TOO_FEW = "too few for a grid"
    """With two points, the best one is always at an edge."""


# --- a probe's description ------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantity:
    """A per-token column of a probe, or an estimate that the probe makes."""

    unit: str
    meaning: str
    """One line that a reader needs to understand the number."""
    statistics: tuple[str, ...] = ("mean",)
    """Statistics that reduce tokens to one number: `mean`, `median`, `q05`, `q95`, `sd`, `share above 0.5`."""
    curve: bool = False
    """True if each position is summarised separately (x = tokens after BOS), pooled over strings."""
    split_by: tuple[str, ...] = ()
    """Other columns of the probe. The tokens are also summarised within the quartiles of each."""
    more_smeared_when: Direction = "neither"
    on_ladders: Literal["", "number", "proxy"] = ""
    """With `number` or `proxy`, the median (or the estimate) is drawn against a gain, a penalty or a width. A
    `proxy` stands in for how readable neurons are. Empty: it is not drawn."""


@dataclass(frozen=True)
class Gate:
    """Requirement on a probe's result for a model whose answer is known.

    Results of a probe that fails a gate are not used. A positive control has `above` or `below`: the
    95% interval must lie wholly beyond that threshold, and the estimate within 5% of `truth` if `truth`
    is given. A negative control has `within`: two one-sided tests must place the estimate closer than
    that to `around`.

    Source: protocol.md section 6, "Gate rule".
    """

    control: str
    """Name of a file in controls/."""
    quantity: str
    above: float | None = None
    below: float | None = None
    within: float | None = None
    around: float = 0.0
    truth: float | None = None
    """The analytic value, derived in the control's docstring."""
    statistic: str = "mean"
    positions: str = "not BOS"
    group: str = ""
    x: float | None = None
    stream: str = "natural"
    """Name of one of the control's streams."""


@dataclass(frozen=True)
class Claim:
    """A published claim about models without LayerNorm, as a statement about a probe's estimate."""

    quantity: str
    text: str
    """One sentence."""
    within: float | None = None
    """Largest size of the number in a model without LayerNorm. None: the claim is that the number is not lower than
    in the trained model."""


@dataclass(frozen=True)
class Answer:
    """An answer to a probe's question, for main numbers between two bounds."""

    text: str
    """One sentence."""
    low: float | None = None
    high: float | None = None
    """None: no bound on this side."""

    @property
    def label(self) -> str:
        """Return the range of numbers that the answer is for, in words."""
        if self.low is None:
            return "any number" if self.high is None else f"below {self.high:g}"
        return (
            f"above {self.low:g}"
            if self.high is None
            else f"between {self.low:g} and {self.high:g}"
        )

    def overlaps(self, low: float, high: float) -> bool:
        """Return whether an interval contains numbers that the answer is for."""
        above = self.low is None or high > self.low
        return above and (self.high is None or low < self.high)

    def holds(self, low: float, high: float) -> bool:
        """Return whether the answer is for every number of an interval."""
        inside = self.low is None or low > self.low
        return inside and (self.high is None or high < self.high)


@dataclass(frozen=True)
class Figure:
    """Specification of a figure of a probe's rows; the report draws it.

    `kind="dots"`: one dot and interval for each arm and seed, quantities or groups as panels.
    `kind="curve"`: value against row.x, one thin line per seed, one panel per stream.
    """

    title: str
    quantities: tuple[str, ...]
    kind: Literal["dots", "curve"] = "dots"
    statistic: str = "mean"
    streams: tuple[str, ...] = ()
    """Streams to draw, one panel for each; empty: all streams of the rows."""
    positions: str = "not BOS"
    group: str = ""
    """The split to draw (`gain` draws the groups `gain Q1` … `gain Q4`); empty: rows without a split."""
    log_y: bool = False
    log_x: bool = False
    relative: bool = False
    """True if each run's curve is divided by its own last value, to compare shapes where sizes differ."""
    x_title: str = "tokens after BOS"


# --- records --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Record:
    """Fields of every record."""

    kind: ClassVar[str]

    study: str
    arm: str = ""
    """Name of a run without its seed. An arm is one configuration, trained once per seed."""
    variant: str = ""
    note: str = ""
    """Remark that a reader needs to understand the record; the report shows it beside the number."""
    commit: str = ""
    """Commit of the code that measured."""
    config: str = ""
    """Hash of the run's configuration."""


@dataclass(frozen=True, kw_only=True)
class Number(Record):
    """A number with its interval."""

    value: float | None
    """The estimate. None: undefined, and `note` says why."""
    unit: str
    low: float | None = None
    high: float | None = None
    """Bounds of the 95% interval. None: no interval can be given."""
    n: Whole = 0
    """Number of values used: tokens or strings; seeds for comparisons."""
    n_clusters: Whole = 0
    """Number of independent units that the values fall into; they are resampled for the interval."""
    cluster: str = ""
    """Unit that is resampled: `document`, `string`, `seed`."""
    n_effective: float | None = None
    """Number of units of equal size that would determine a mean as well; None where it was not computed."""


@dataclass(frozen=True, kw_only=True)
class OfRun:
    """Fields of records about one model."""

    run: str
    """Run folder's name, such as `solu_ln-s0`."""
    seed: Whole | None = None
    pretrained: bool = False
    """True for a published model that others have trained; it is not compared with any other model."""


@dataclass(frozen=True, kw_only=True)
class OfProbe:
    """Fields that name a number of a probe."""

    probe: str
    """Name of a file in probes/, or `loss`, `training`, `pretrained`."""
    quantity: str
    """Measured quantity: `r`, `gain`, `loss`, …"""
    statistic: str = "mean"
    """Statistic that reduced tokens to one number: `mean`, `median`, `q05`, …; empty: an estimate."""
    stream: str = ""
    """Text used for the measurement: `natural`, `prose`, `code`, `repeated`, `random`; or `select`."""
    positions: str = "not BOS"
    """`all`, `BOS`, `not BOS`, `1`, `2-15`, `>=16`."""
    group: str = ""
    """Line of a figure, or split of the tokens, where `quantity` alone does not identify the number."""


@dataclass(frozen=True, kw_only=True)
class Measurement(OfProbe, OfRun, Number):
    """A summary of a probe's measurements on one model: a mean, a quantile, a point of a curve."""

    kind: ClassVar[str] = "measurement"

    x: float | None = None
    """Position on the figure's horizontal axis, for a point of a curve."""
    constant: bool = False
    """True if the value is the same at every token, so that its interval has width 0."""


@dataclass(frozen=True, kw_only=True)
class Untrained(OfProbe, OfRun, Number):
    """A probe's number in the run's own initialisation (`value`), and its difference from the trained model.

    The bounds are those of the difference.
    """

    kind: ClassVar[str] = "untrained"

    difference: float | None = None
    """The trained model's number minus `value`, on the same tokens."""


@dataclass(frozen=True, kw_only=True)
class LeftOut(OfRun, Record):
    """A probe that has no numbers for a run, or on one stream; `note` gives the reason."""

    kind: ClassVar[str] = "left out"

    probe: str
    stream: str = ""
    """The stream without numbers; empty: every stream."""


@dataclass(frozen=True, kw_only=True)
class TokenValue(OfRun, Record):
    """One value at one token of the text that the report shows."""

    kind: ClassVar[str] = "token"

    quantity: str
    value: float | None
    unit: str
    place: Whole
    """Position in the text; 0 is BOS."""
    text: str
    """The token's text."""
    stream: str


@dataclass(frozen=True, kw_only=True)
class OfRemoval(Number):
    """A number of the removal of a trained model's per-token gain, in nats per token on the report split."""

    step: Removed
    before: Removed | None = None
    """Earlier step. With it, the value is the number of that step minus that of `step`."""
    against: str = "as trained"
    """The model whose loss is subtracted. `as trained`: the trained model. `same adaptation`: the model with its
    per-token gain after the same adaptation (a refit, or further training). Otherwise an arm with one gain from the
    start of its training."""
    n_tuned: Whole = 0
    """Number of tokens of the further training, for `FINE_TUNED`."""
    final_norm: Literal["live", "frozen"] = "live"
    """Treatment of ln_final: `frozen` holds its scale at the value in the trained model."""
    untrained: bool = False
    """True: the same number of the run's own initialisation."""
    order: Order | None = None
    """With `before`: relation of the two steps."""


@dataclass(frozen=True, kw_only=True)
class Removal(OfRun, OfRemoval):
    """A number of the removal in one run, with the interval for other documents."""

    kind: ClassVar[str] = "removal"


@dataclass(frozen=True, kw_only=True)
class RemovalOfArm(OfRemoval):
    """The mean of the same number over the seeds of an arm, with the interval for new seeds and documents."""

    kind: ClassVar[str] = "removal of an arm"


@dataclass(frozen=True)
class Bounded:
    """A number with the bounds of its 95% interval for other documents; None: undefined, or no interval."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class ClaimTested(OfRun, Record):
    """A published claim about models without LayerNorm, tested on one run; `note` says why it was not.

    All models are measured in fp64, on the same documents of the report split.
    """

    kind: ClassVar[str] = "claim"

    probe: str
    quantity: str
    unit: str
    claim: str
    within: float | None = None
    """Largest size of `after` at which the claim holds. None: it holds if `after` is not lower than `before`."""
    n_tuned: Whole = 0
    """Number of tokens of the further training."""
    before: Bounded | None = None
    """The number of the trained model."""
    kept: Bounded | None = None
    """The number after the same further training with all norms kept."""
    after: Bounded | None = None
    """The number of the model without per-token scales."""
    change: Bounded | None = None
    """`after` minus `before`, on the same documents."""
    holds: bool | None = None
    """None: not settled, because there is no interval."""


@dataclass(frozen=True, kw_only=True)
class NeuronFound(OfRun, Record):
    """A neuron that the report shows: found on one half of the documents; numbers and text are of the other."""

    kind: ClassVar[str] = "neuron"

    quantity: str
    """List of the neuron: the most readable neurons, or the neurons that the norm changes most."""
    place: Whole
    """Place in the list, from 0."""
    neuron: Whole
    rule: str
    """The neuron's best rule before the norm."""
    f1_mid: float | None
    f1_post: float | None
    drop: float | None
    """Share of the neuron's active tokens that fit the rule, before minus after the norm."""
    before: str
    """Text before the token of the example."""
    text: str
    """The token at which the neuron is most active."""
    after: str


@dataclass(frozen=True, kw_only=True)
class Comparison(Number):
    """A difference between arms, with the interval for new seeds or for new documents (`cluster`)."""

    kind: ClassVar[str] = "comparison"

    term: Term
    against: str = ""
    """The arm that `arm` is compared with; empty for a `LOSS`. For a `STEP`: the arm where the step starts."""
    verdict: Verdict | None = None
    choice: str = ""
    """Text on how the plain or static arm was chosen; `note` does not repeat it. For a `STEP`: how the
    arm was chosen where the step ends."""
    n_candidates: Whole = 0
    """For a `STATIC`: the number of static arms of which the best was chosen."""
    optimism: float | None = 0.0
    """For a `STATIC`: by how much the choice alone would favour the chosen one of equally good arms, in nats per
    token. 0: it was chosen at seeds that are not reported. None: unknown, because there is one seed."""
    p: float | None = None
    """Two-sided p of "no difference", where it was tested."""
    p_adj: float | None = None
    """`p` after Holm's correction within its family."""
    size: str = ""
    """The arms' size in words; `note` does not repeat it. Empty if the study has one size."""
    design: str = ""
    """Rule for the scale of the MLP's output that the compared arms follow: `alpha 1` or `alpha matched`. Empty:
    each arm is at its best scale, or the study has one scale."""
    lr: float | None = None
    """Learning rate common to all arms of this comparison; None: each arm is at its own best rate."""
    tuned_arm: str = ""
    """With `lr`: the same arm at its best rate; it names the curve that this comparison is a point of."""
    step: tuple[str, ...] = ()
    """For a `STEP`: the variant where the step starts and the variant where it ends."""
    adds: str = ""
    """For a `STEP`: the parts that the step adds, in words."""
    part: Part | None = None
    """For a `SENSITIVITY_PART`: the part."""
    probe: str = ""
    quantity: str = ""
    """For a `PROBE`: the probe's tested quantity."""
    group: str = ""
    """For a `WHERE` or a `CONTRAST`: the tokens, such as `log gain Q4`. For a `SINCE`: the stretch of training."""
    x: float | None = None
    """For a `GAP`: the number of training tokens."""


@dataclass(frozen=True, kw_only=True)
class Located(Record):
    """The verdict on the tokens at which the best static arm `against` loses more than `arm`."""

    kind: ClassVar[str] = "located"

    against: str
    where: Where
    n: Whole
    """Number of seeds."""
    agreement: float | None = None
    """Correlation over tokens of a seed's log gain with the mean over the other seeds; None with one seed."""
    size: str = ""
    design: str = ""
    """Rule for the scale of the MLP's output that both arms follow, as in a `Comparison`."""


@dataclass(frozen=True, kw_only=True)
class ChoicePoint(Number):
    """Loss on the select split at one point of a curve from which a setting was chosen."""

    kind: ClassVar[str] = "choice"

    setting: Literal["lr", "gain", "mlp_out_scale"]
    x: float
    """The setting at this point."""
    chosen_arm: str
    """The arm with the least loss on the curve; each curve has exactly one such arm."""
    eligible: bool = True
    """False if the arm lacks seeds that other arms of the curve have; it could then not be chosen."""
    grid: Grid | None = None
    """Position on the grid; set at the chosen point only."""
    out_scale: float = 1.0
    """Scale alpha of the MLP's output at this point."""
    design: str = ""
    size: str = ""


@dataclass(frozen=True, kw_only=True)
class NoChoice(Record):
    """Arms between which no choice was made, or a chosen arm without a reported seed; `note` gives the reason."""

    kind: ClassVar[str] = "no choice"

    arms: tuple[str, ...]
    size: str = ""


@dataclass(frozen=True)
class Step:
    """A variant, and the parts that it adds to the previous variant of its chain."""

    variant: str
    adds: str = ""


@dataclass(frozen=True, kw_only=True)
class Setting(Record):
    """An arm's settings and its role in the comparison, so that no code needs to parse arm names."""

    kind: ClassVar[str] = "setting"

    values: dict[str, float]
    """The arm's settings by name: `lr`, `kappa`, `gain`, `d_mlp`, …"""
    role: str
    """`baseline`, `plain`, `static`, `per_token` or `other`."""
    chain: tuple[Step, ...] = ()
    """From the root of the variant's chain to the variant itself."""
    twin: str = ""
    """The variant that differs only in having one gain for all tokens; empty if there is none."""
    size: str = ""
    n: Whole = 0
    """Number of reported seeds."""
    only_tried: bool = False
    """True if the arm was only tried out at select seeds."""
    label: str = ""
    """The variant's name for people: `SoLU + LN`. Empty: it has none."""
    rate: str = ""
    """Why the learning rate cannot be taken for tuned, as in "was set by hand"; empty if it can."""
    matched: bool = False
    """True if the arm's alpha is matched to the baseline, so that it is compared in that design alone."""
    family: str = ""
    """Identifier shared by arms that differ only in their learning rate and in the scale of the MLP's output."""
    after: str = ""
    """The arm with whose trained weights this one began. It has seen more tokens, so no choice considers it."""


@dataclass(frozen=True, kw_only=True)
class AtDose(Number):
    """A number of an arm of a ladder: arms that differ in one setting. The mean over seeds, with its interval."""

    kind: ClassVar[str] = "dose"

    setting: Ladder
    x: float
    """The arm's value of the setting."""
    since: float | None = None
    """The ladder's reference dose. With it, `value` is the number at `x` minus that at `since`, paired by seed."""
    quantity: str
    statistic: str = ""
    fixed: str = ""
    """Settings that distinguish this ladder from others of the variant: `kappa 41.9`."""
    proxy: bool = False
    """True if the number stands in for how readable neurons are, which only people can judge."""
    untrained: bool = False
    """True: the same number of the runs' own initialisations."""


@dataclass(frozen=True, kw_only=True)
class ScalingCurve(Record):
    """A power law of the baseline's loss, floor + scale (weights / centre)^-exponent; or `note` says why not."""

    kind: ClassVar[str] = "scaling curve"

    arms: tuple[str, ...]
    """The baseline at each size, smallest first."""
    n_weights: tuple[Whole, ...]
    """Weights of the blocks' matrices at each size, without embeddings, biases and norms."""
    n: Whole
    """Number of seeds that all sizes share."""
    losses: tuple[float, ...] = ()
    """Mean loss at each size over these seeds, nats per token."""
    floor: float | None = None
    """Loss of an endless model, nats per token."""
    scale: float | None = None
    """Nats per token."""
    exponent: float | None = None
    centre: float | None = None
    """Geometric mean of the sizes' weights."""
    misfit: float | None = None
    """Largest distance of a size's loss from the curve, nats per token."""


@dataclass(frozen=True, kw_only=True)
class Multiplier(Number):
    """By how many times larger a baseline has the loss of `arm`; the interval is for new seeds and documents."""

    kind: ClassVar[str] = "multiplier"

    curve: Curve
    against: str
    """The baseline of the arm's size."""
    n_weights: Whole
    """Weights of the blocks' matrices of the arm's size."""
    bound: Bound = Bound.NONE
    """Other than `NONE`: `value` is only a bound, because the loss lies outside the baseline's curve."""
    low_is_bound: bool = False
    """True if the interval continues below `low`, the end of the curve."""
    high_is_bound: bool = False
    """True if the interval continues above `high`, the end of the curve."""
    size: str = ""


@dataclass(frozen=True, kw_only=True)
class GateResult(Number):
    """A probe's result on a model whose answer is known."""

    kind: ClassVar[str] = "gate"

    probe: str
    control: str
    section: str
    """The control's number in protocol.md: `C3`."""
    passed: bool
    sign: Literal["positive", "negative"]
    """`positive` if the probe must find an effect on this control, `negative` if it must find none."""
    measured: str
    """The measured number of the probe, in words: `r (median), 0.9`."""
    asked: str
    """The requirement, in words. If there is no interval, `note` gives the reason."""
    stream: str = ""
    positions: str = "not BOS"


@dataclass(frozen=True, kw_only=True)
class FalsePositives(Number):
    """Rate at which a probe's test reports a difference where there is none."""

    kind: ClassVar[str] = "false positives"

    probe: str
    tested: str
    source: str
    """`untrained models` or `shuffled labels`."""
    passed: bool | None
    """True if the nominal rate lies inside the interval. None: the test is not defined there."""


@dataclass(frozen=True, kw_only=True)
class ProbeWords(Record):
    """A probe's description, stored with its numbers, so that the report of a study does not change later."""

    kind: ClassVar[str] = "probe"

    probe: str
    """Name of the probe's file."""
    name: str
    section: str
    """`P4`."""
    question: str
    formula: str
    reading: str
    pitfalls: str
    source: str
    tested: str
    quantities: dict[str, Quantity]
    """The probe's columns and estimates, by name."""
    figures: tuple[Figure, ...] = ()
    gates: tuple[Gate, ...] = ()
    answers: tuple[Answer, ...] = ()
    """Answers to the question by ranges of the tested quantity, lowest range first. Empty in a study of an
    earlier version."""


@dataclass(frozen=True, kw_only=True)
class Provenance(Record):
    """The text and the software behind the trained runs of a study. An unknown fact is empty or None."""

    kind: ClassVar[str] = "provenance"

    source: str = ""
    """Name of a text source, such as `stdlib`."""
    documents: dict[str, Whole]
    """Number of documents in each split: `train`, `select`, `report`."""
    tokens: dict[str, Whole]
    """Number of tokens in each split."""
    d_vocab: Whole | None = None
    """Entries of the tokenizer."""
    n_copies: Whole | None = None
    """Number of documents that were left out because another document has the same text."""
    n_overlapping: dict[str, Whole]
    """Number of documents left out of each split because a held-out document shares a passage with them."""
    versions: dict[str, str]
    """Versions of the packages that trained the runs; several versions are separated by commas."""
    commits: tuple[str, ...] = ()
    """Commits of the code that trained the runs."""
    training: dict[str, float | str] = field(default_factory=dict)
    """Settings of the optimizer, named as below `train.` in a configuration, that all runs share."""
    apart: tuple[str, ...] = ()
    """Settings that the arms are for, or that are tuned for each arm, in which arms of one size differ."""
    unclaimed: tuple[str, ...] = ()
    """Other settings in which arms of one size differ, so that their effect is not that of the variants alone."""


@dataclass(frozen=True, kw_only=True)
class Registered(Record):
    """The registration of a study, whose plan was written before any run at a reported seed."""

    kind: ClassVar[str] = "registration"

    sha256: str
    """Checksum of the plan."""
    at: str
    """Time of the registration, UTC."""
    departures: tuple[str, ...] = ()
    """Differences between the plan and the study."""


@dataclass(frozen=True, kw_only=True)
class Rated(Number):
    """A number from people's blind ratings of neurons."""

    kind: ClassVar[str] = "rating"

    term: Rating
    mode: str = ""
    """Examples that people saw: `top`, the largest activations, or `full`, the whole range."""
    stage: str = ""
    """Activations that people saw: `mid` or `post`."""
    against: str = ""
    """The arm that `arm` is compared with, or the second of two raters."""
    rater: str = ""
    untrained: bool = False
    """True for neurons of the models before training."""


@dataclass(frozen=True, kw_only=True)
class Proxied(Number):
    """A number of an automatic proxy for people's ratings of neurons. A proxy is not a rating."""

    kind: ClassVar[str] = "proxy"

    proxy: str
    """Name of a file in proxies/."""
    label: str
    """The proxy in words."""
    term: ProxyTerm
    stage: str = ""
    """Activations: `mid` or `post`."""
    against: str = ""
    """The arm that `arm` is compared with."""
    untrained: bool = False
    """True for neurons of the models before training."""


KINDS: dict[str, type[Record]] = {
    each.kind: each
    for each in (
        Measurement, Untrained, LeftOut, TokenValue, NeuronFound, Comparison, Located, ChoicePoint, NoChoice,
        Setting, AtDose, ScalingCurve, Multiplier, GateResult, FalsePositives, ProbeWords,
        Provenance, Registered, Removal, RemovalOfArm, ClaimTested, Rated, Proxied,
    )
}  # fmt: skip


class Records(list[Record]):
    """Records that do not change, with results of computations on them; large studies have half a million."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        super().__init__(records)
        self._known: dict[object, Any] = {}

    def once(self, key: object, make: Callable[[], T]) -> T:
        """Return the result of `make`, which is called the first time that the key is asked for."""
        if key not in self._known:
            self._known[key] = make()
        return cast(T, self._known[key])


def of_kind(records: Iterable[Record], kind: type[R]) -> list[R]:
    """Return the records of one type, in their order."""
    if not isinstance(records, Records):
        return [record for record in records if isinstance(record, kind)]
    by_class = records.once(of_kind, lambda: _by_class(records))
    classes = [each for each in by_class if issubclass(each, kind)]
    if len(classes) > 1:  # only all records have the order of several classes
        return list(records.once(kind, lambda: of_kind([*records], kind)))
    return cast(list[R], [record for each in classes for record in by_class[each]])


def _by_class(records: Iterable[Record]) -> dict[type[Record], list[Record]]:
    result: dict[type[Record], list[Record]] = {}
    for record in records:
        result.setdefault(type(record), []).append(record)
    return result


# --- files ----------------------------------------------------------------------------------------


def line(record: Record) -> str:
    """Return a record as one line of JSON; equal records have equal lines."""
    content = {"kind": record.kind} | _finite(vars(record))
    return json.dumps(content, default=lambda part: _finite(asdict(part)))


def write(path: Path, records: Iterable[Record]) -> None:
    """Write `records` to `path`; if writing fails, leave an existing file unchanged."""
    write_text(path, "".join(f"{line(each)}\n" for each in records))


def read(path: Path, remedy: str = "", whole: bool = False) -> Records:
    """Read the records of `path`. A line that cannot be read is skipped with a warning on stderr.

    Args:
        path: a file of records.
        remedy: the end of an error's line, which says how to make the file again; by default, a probe of the
            study in whose folder the file is.
        whole: True to refuse a file with a line that cannot be read.

    Raises:
        UserError: if there is no such file, none of its lines can be read, or another version wrote it.
    """
    remedy = remedy or f"create it with 'soluscope probe {path.parent}'"
    if not path.is_file():
        raise UserError(f"no results at {path}: {remedy}")
    records = []
    for number, content in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            kind = from_json(content, _Tag).kind
            if kind in KINDS:
                records.append(from_json(content, KINDS[kind]))
        except ValueError as error:
            problem = f"{path} line {number} is not a record"
            if whole:
                raise UserError(f"{problem} ({reason(error)}): {remedy}") from error
            say(f"warning: {problem} and is skipped ({reason(error)})")
            continue
        if kind not in KINDS:
            raise UserError(
                f"{path} was written by another version (line {number} has kind {kind!r}; the kinds of this "
                f"version are {', '.join(KINDS)}): {remedy}"
            )
    if not records:
        raise UserError(f"{path} contains no records: {remedy}")
    return Records(records)


@dataclass(frozen=True)
class _Tag:
    """The part of a line that names its kind."""

    kind: str | None = None


def _finite(value: Any) -> Any:
    """Replace nan and inf, which JSON does not allow, by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return value
