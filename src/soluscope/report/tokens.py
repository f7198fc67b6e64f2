"""A text coloured token by token by the mid norm's effect; one block per arm.

The reader chooses the quantity with radio buttons. The style sheet shows the chosen colours, so no script
is needed. The page contains all three colours and numbers of each token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from soluscope.report.blocks import Block, Paragraph, Scale, Token, Tokens, TokenText
from soluscope.report.findings import IDLE, NO_COST, VARIES, number, per_token
from soluscope.results import Record, TokenValue, of_kind
from soluscope.text import readable

QUANTITIES = {"gain": "gain", "r": "r", "effect": "ablation effect"}
"""Quantities by the name of their style; the first is shown until the reader chooses another."""
AROUND_ZERO = "effect"
LOW, HIGH, WHITE = (230, 159, 0), (86, 180, 233), (255, 255, 255)
"""Okabe and Ito's orange and sky blue. Colour-blind readers can distinguish them; dark text is legible on both."""

Values = Mapping[str, TokenValue]
"""A token's values by quantity."""


def blocks(records: Sequence[Record]) -> list[Block]:
    """Return a text for each arm's first seed; the first arm with a per-token norm is unfolded."""
    texts = _texts(records)
    if not texts:
        return []
    normed = per_token(records)
    shown = next((key for key in texts if key[0] in normed), next(iter(texts)))
    lead = (
        "The same text for each arm's first seed. Colours are scaled to the range of the tokens after BOS, and "
        "left out where that range is too narrow to matter; a token outside this range has the colour of the "
        "nearer bound. Point at a token, or move to it with the tab key, to see its numbers. Ablation effect: "
        "the token's loss without the MLP minus its loss."
    )
    return [
        Paragraph(lead),
        Tokens(
            QUANTITIES,
            [_text(_named(tokens), key == shown, tokens) for key, tokens in texts.items()],
        ),
    ]


def _named(tokens: Sequence[Values]) -> str:
    """Return the arm's name with the shown seed; a pretrained model has no seed."""
    any_value = next(iter(tokens[0].values()))
    if any_value.pretrained:
        return any_value.arm
    return f"{any_value.arm}, seed {any_value.seed or 0}"


def _texts(records: Iterable[Record]) -> dict[tuple[str, int], list[Values]]:
    """Return the tokens of each arm's first seed, in their order in the text."""
    by_run: dict[tuple[str, int], dict[int, dict[str, TokenValue]]] = {}
    for value in of_kind(records, TokenValue):
        run = by_run.setdefault((value.arm, value.seed or 0), {})
        run.setdefault(value.place, {})[value.quantity] = value
    first: dict[str, int] = {}
    for arm, seed in sorted(by_run, key=lambda run: run[1]):
        first.setdefault(arm, seed)
    return {
        (arm, seed): [by_run[arm, seed][position] for position in sorted(by_run[arm, seed])]
        for arm, seed in first.items()
    }


def _text(summary: str, opened: bool, tokens: Sequence[Values]) -> TokenText:
    colours: dict[str, list[str]] = {}
    scales = []
    for name, quantity in QUANTITIES.items():
        around_zero = name == AROUND_ZERO
        low, high = _range(tokens, quantity, around_zero)
        column = [token.get(quantity) for token in tokens]
        flat = _hardly_varies(quantity, low, high)
        colours[name] = [
            _colour(None if each is None or flat else each.value, low, high, around_zero)
            for each in column
        ]
        unit = next((each.unit for each in column if each is not None), "")
        scales.append(_scale(name, quantity, unit, low, high))
    return TokenText(
        summary,
        opened,
        scales,
        [
            _token(token, {name: colours[name][i] for name in QUANTITIES if colours[name][i]})
            for i, token in enumerate(tokens)
        ],
    )


def _token(token: Values, colours: dict[str, str]) -> Token:
    any_value = next(iter(token.values()))
    text = visible(any_value.text)
    numbers = ", ".join(
        f"{quantity} {number(each.value) if each.value is not None else 'none'}"
        + (f" {each.unit}" if each.value is not None else "")
        for quantity in QUANTITIES.values()
        if (each := token.get(quantity)) is not None
    )
    hover = f"{any_value.place} \u201c{text}\u201d: {numbers}".replace("\n", "")
    return Token(text, hover, colours)


def visible(text: str) -> str:
    """Return a token's text with visible line ends, and escapes for characters that would hide other text."""
    return readable(text.replace("\r\n", "\n")).replace("\n", "\u21b5\n")


def _range(tokens: Sequence[Values], quantity: str, around_zero: bool) -> tuple[float, float]:
    """Return the least and the greatest value after BOS; with `around_zero`, equal distances from 0."""
    values = [token[quantity] for token in tokens if quantity in token]
    known = [each.value for each in values if each.place and each.value is not None]
    if around_zero:
        largest = max(map(abs, known), default=0.0)
        return -largest, largest
    return min(known, default=0.0), max(known, default=0.0)


def _hardly_varies(quantity: str, low: float, high: float) -> bool:
    """Return whether a range is too narrow to matter; such a quantity has no colours."""
    if math.isclose(low, high, rel_tol=1e-6):  # rounding is not a difference
        return True
    if quantity == "gain":
        return low > 0 and math.log(high / low) < VARIES
    return high - low < (NO_COST if quantity == QUANTITIES[AROUND_ZERO] else IDLE)


def _colour(value: float | None, low: float, high: float, around_zero: bool) -> str:
    if value is None:
        return ""
    fraction = min(1.0, max(0.0, (value - low) / (high - low)))
    if not around_zero:
        return _mix(HIGH, fraction)
    return _mix(HIGH, 2 * fraction - 1) if fraction >= 0.5 else _mix(LOW, 1 - 2 * fraction)


def _mix(end: tuple[int, int, int], share: float) -> str:
    """Mix a colour with white: white at share 0, the colour `end` at share 1."""
    parts = (round(w + (e - w) * share) for w, e in zip(WHITE, end, strict=True))
    return "#" + "".join(f"{part:02x}" for part in parts)


def _scale(name: str, quantity: str, unit: str, low: float, high: float) -> Scale:
    if math.isclose(low, high, rel_tol=1e-6):
        return Scale(name, f"{quantity}: {number(low)} {unit} at every token after BOS")
    if _hardly_varies(quantity, low, high):
        text = f"{quantity}, {unit}: {number(low)} to {number(high)} after BOS, too little to matter: no colours"
        return Scale(name, text)
    return Scale(name, f"{quantity}, {unit}: {number(low)}", number(high))


def colour_class(name: str, colour: str) -> str:
    """Return the class of tokens that have this colour for this quantity."""
    return f"{name}-{colour.removeprefix('#')}"


def style(blocks: Iterable[Block]) -> str:
    """Return the style sheet's rules for the colours: the checked button selects the visible colours."""
    colours = {
        pair
        for block in blocks
        if isinstance(block, Tokens)
        for text in block.texts
        for token in text.tokens
        for pair in token.colours.items()
    }
    rules = []
    for name in QUANTITIES:
        chosen = f"#by-{name}:checked ~ details"
        middle = [_mix(LOW, 1), _mix(HIGH, 0)] if name == AROUND_ZERO else [_mix(HIGH, 0)]
        gradient = ",".join([*middle, _mix(HIGH, 1)])
        rules += [
            f"{chosen} .scale.{name} {{ display: flex; }}",
            f".scale.{name} i {{ background: linear-gradient(90deg,{gradient}); }}",
            *(
                f"{chosen} .words .{colour_class(name, colour)} {{ background: {colour}; }}"
                for of, colour in sorted(colours)
                if of == name
            ),
        ]
    return "\n".join(rules) + "\n"
