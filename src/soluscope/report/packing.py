"""The figures of the page and the library that draws them, as compressed text that the page's script unpacks.

A page with the library as it is would be 5 MB without any figure. Numbers are rounded to less than a pixel, and
only as far as the numbers shown under the pointer stay the same.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Iterable
from typing import Any

import plotly.graph_objects as go

PARTS = 20_000
"""Parts into which an axis is divided; numbers are rounded to less than a part. No screen has as many pixels."""
DIGITS = 5
"""Significant digits that each number keeps, wherever it lies."""
SHOWN = ".4g"
"""Format in which figures show numbers under the pointer."""


def packed(text: str) -> str:
    """Return the text compressed, in letters that HTML does not interpret."""
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def unpacked(text: str) -> str:
    """Return the text that `packed` compressed."""
    return zlib.decompress(base64.b64decode(text)).decode()


def as_text(figure: go.Figure) -> str:
    """Return a figure as one line of JSON, with the coordinates of its points rounded."""
    content = figure.to_plotly_json()
    traces = content["data"]
    for axis in "xy":
        of_axis: dict[str, list[dict[str, Any]]] = {}
        for trace in traces:
            of_axis.setdefault(trace.get(f"{axis}axis", axis), []).append(trace)
        for name, drawn in of_axis.items():
            layout = content["layout"].get(f"{axis}axis{name[1:]}", {})
            _round(drawn, axis, is_log=layout.get("type") == "log")
    return json.dumps(content, separators=(",", ":"), allow_nan=False)


def _round(traces: Iterable[dict[str, Any]], axis: str, is_log: bool) -> None:
    """Round the coordinates of traces that share an axis, in place."""
    lists = [
        (of, key)
        for trace in traces
        for of, key in [
            (trace, axis),
            (trace.get(f"error_{axis}", {}), "array"),
            (trace.get(f"error_{axis}", {}), "arrayminus"),
        ]
        if key in of
    ]
    values = [value for of, key in lists if key == axis for value in of[key] if _is_number(value)]
    span = max(values, default=0.0) - min(values, default=0.0)
    places = 0 if is_log or not span else math.ceil(-math.log10(span / PARTS))
    for of, key in lists:
        of[key] = [_rounded(value, places) for value in of[key]]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _rounded(value: Any, places: int) -> Any:
    """Round a number to `places` decimals, or to more if it would lose digits that are shown; nan becomes None."""
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    if value.is_integer():
        return int(value) if abs(value) < 1e15 else value
    result = round(value, max(places, DIGITS - 1 - math.floor(math.log10(abs(value)))))
    return result if f"{result:{SHOWN}}" == f"{value:{SHOWN}}" else value
