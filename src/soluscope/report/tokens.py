"""A text, token by token, coloured by what the mid norm does to each; one block an arm.

Which quantity is shown is a radio button's state and style sheets', so the page needs no script for
it. All three colours and numbers of a token are in the page.
"""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from soluscope.report.findings import NORMED, number
from soluscope.report.markup import fold, paragraph
from soluscope.results import PRETRAINED, Row

PROBE = "tokens"
QUANTITIES = {"gain": "gain", "r": "r", "effect": "ablation effect"}
"""By the name of their style; the first is shown until another is asked for."""
AROUND_ZERO = "effect"
LOW, HIGH, WHITE = (230, 159, 0), (86, 180, 233), (255, 255, 255)
"""Okabe and Ito's orange and sky blue: told apart by colour-blind eyes, and dark text is read on both."""

Token = Mapping[str, Row]
"""A token's rows by quantity."""


def style() -> str:
    """Rules that let the chosen button decide which of a token's colours is seen."""
    return "\n".join(
        f"#by-{name}:checked ~ details .words span {{ background: var(--{name}); }}\n"
        f"#by-{name}:checked ~ details .scale.{name} {{ display: flex; }}"
        for name in QUANTITIES
    )


def view(rows: Iterable[Row]) -> str:
    """The section: buttons, then a block for each arm's first seed, the first solu_ln in view."""
    texts = _texts(rows)
    if not texts:
        return ""
    buttons = "".join(
        f'<input type="radio" name="by" id="by-{name}"{" checked" if i == 0 else ""}>'
        f'<label for="by-{name}">{html.escape(quantity)}</label>'
        for i, (name, quantity) in enumerate(QUANTITIES.items())
    )
    shown = next((key for key in texts if key[1] == NORMED), next(iter(texts)))
    blocks = "".join(
        fold(_named(key), _block(tokens), opened=key == shown) for key, tokens in texts.items()
    )
    said = (
        "One text, read by each arm's first seed. Colours are scaled to the tokens after BOS; a token "
        "outside has the colour of the nearer end. Point at a token, or move to it with the tab key, "
        "for its numbers. Ablation effect: the token's loss without the MLP less its loss."
    )
    return paragraph(said) + f'<div class="tokens">{buttons}\n{blocks}</div>\n'


def _named(key: tuple[str, str, int]) -> str:
    """An arm and the seed that is shown; a pretrained model has none."""
    arm, variant, seed = key
    return arm if variant.startswith(PRETRAINED) else f"{arm}, seed {seed}"


def _texts(rows: Iterable[Row]) -> dict[tuple[str, str, int], list[Token]]:
    """Tokens in order, for each arm's first seed."""
    found: dict[tuple[str, str, int], dict[float, dict[str, Row]]] = {}
    for row in rows:
        if row.probe == PROBE and row.x is not None:
            run = found.setdefault((row.arm, row.variant, row.seed or 0), {})
            run.setdefault(row.x, {})[row.quantity] = row
    first: dict[str, int] = {}
    for arm, _, seed in sorted(found):
        first.setdefault(arm, seed)
    return {
        key: [found[key][x] for x in sorted(found[key])]
        for key in sorted(found)
        if key[2] == first[key[0]]
    }


def _block(tokens: Sequence[Token]) -> str:
    colours: dict[str, list[str]] = {}
    legends = ""
    for name, quantity in QUANTITIES.items():
        around_zero = name == AROUND_ZERO
        low, high = _range(tokens, quantity, around_zero)
        column = [token.get(quantity) for token in tokens]
        colours[name] = [
            _colour(None if row is None else row.value, low, high, around_zero) for row in column
        ]
        unit = next((row.unit for row in column if row is not None), "")
        legends += _legend(name, quantity, unit, low, high)
    spans = "".join(
        _span(token, {name: colours[name][i] for name in QUANTITIES})
        for i, token in enumerate(tokens)
    )
    return f'{legends}<div class="words">{spans}</div>\n'


def _span(token: Token, colours: Mapping[str, str]) -> str:
    any_row = next(iter(token.values()))
    shades = ";".join(f"--{name}:{colour}" for name, colour in colours.items() if colour)
    said = visible(any_row.note)
    numbers = ", ".join(
        f"{quantity} {number(row.value) if row.value is not None else 'none'}"
        + (f" {row.unit}" if row.value is not None else "")
        for quantity in QUANTITIES.values()
        if (row := token.get(quantity)) is not None
    )
    hover = html.escape(f"{any_row.x:g} \u201c{said}\u201d: {numbers}".replace("\n", ""))
    text = html.escape(said)
    return f'<span tabindex="0" style="{shades}" title="{hover}">{text}</span>'


def visible(text: str) -> str:
    """A token's text with each line's end shown, and no character that would move or hide others."""
    ends = text.replace("\r\n", "\n")
    whole = ends.encode("utf8", "replace").decode(
        "utf8"
    )  # half of a surrogate pair cannot be written
    return "".join("\u21b5\n" if c == "\n" else _picture(c) for c in whole)


def _picture(character: str) -> str:
    code = ord(character)
    if character == "\t" or unicodedata.category(character) not in ("Cc", "Cf"):
        return character
    return chr(0x2400 + code) if code < 0x20 else "\ufffd"


def _range(tokens: Sequence[Token], quantity: str, around_zero: bool) -> tuple[float, float]:
    """Least and greatest value after BOS; equal distances from 0 where 0 is the middle."""
    rows = [token[quantity] for token in tokens if quantity in token]
    known = [row.value for row in rows if row.x and row.value is not None]
    if around_zero:
        end = max(map(abs, known), default=0.0)
        return -end, end
    return min(known, default=0.0), max(known, default=0.0)


def _colour(value: float | None, low: float, high: float, around_zero: bool) -> str:
    if value is None or math.isclose(low, high, rel_tol=1e-6):  # rounding is not a difference
        return ""
    place = min(1.0, max(0.0, (value - low) / (high - low)))
    if not around_zero:
        return _mix(HIGH, place)
    return _mix(HIGH, 2 * place - 1) if place >= 0.5 else _mix(LOW, 1 - 2 * place)


def _mix(end: tuple[int, int, int], share: float) -> str:
    """White at 0, `end` at 1."""
    parts = (round(w + (e - w) * share) for w, e in zip(WHITE, end, strict=True))
    return "#" + "".join(f"{part:02x}" for part in parts)


def _legend(name: str, quantity: str, unit: str, low: float, high: float) -> str:
    start = _mix(LOW, 1) if name == AROUND_ZERO else "#fff"
    middle = ",#fff" if name == AROUND_ZERO else ""
    bar = f'<i style="background:linear-gradient(90deg,{start}{middle},{_mix(HIGH, 1)})"></i>'
    if math.isclose(low, high, rel_tol=1e-6):
        said = f"{quantity}: {number(low)} {unit} at every token after BOS"
        return f'<div class="scale {name}">{html.escape(said)}</div>'
    left, right = html.escape(f"{quantity}, {unit}: {number(low)}"), number(high)
    return f'<div class="scale {name}">{left} {bar} {right}</div>'
