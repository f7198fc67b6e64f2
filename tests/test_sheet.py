"""Figures of panels, compared with those of plotly's own make_subplots."""

import pytest
from plotly.subplots import make_subplots

from soluscope.report.sheet import LEGEND, N_COLUMNS, TOP, Sheet

ROW, GAP = 200, 84


@pytest.mark.parametrize("curves", [False, True])
@pytest.mark.parametrize("shared_x", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_panels_lie_where_plotly_puts_them(n, shared_x, curves):
    names = [f"panel {i}" for i in range(n)]
    sheet = Sheet([(name, "", "") for name in names], ROW, shared_x, curves, GAP)
    for index in range(n):
        sheet.add({"type": "scatter", "x": [index], "y": [1.0]}, index)
        sheet.mark(index + 0.5, index, upright=bool(index % 2))
    found = sheet.figure("all of them")
    n_columns, n_rows = min(n, N_COLUMNS), -(-n // N_COLUMNS)
    inner = n_rows * ROW + (n_rows - 1) * GAP
    wanted = make_subplots(
        n_rows,
        n_columns,
        subplot_titles=names,
        shared_xaxes="all" if shared_x else False,
        horizontal_spacing=0.09 if curves else 0.04,
        vertical_spacing=GAP / inner if n_rows > 1 else 0,
    )
    for index in range(n):
        at = {"row": index // N_COLUMNS + 1, "col": index % N_COLUMNS + 1}
        wanted.add_scatter(x=[index], y=[1.0], **at)
        if index % 2:
            wanted.add_hline(y=index + 0.5, **at)
        else:
            wanted.add_vline(x=index + 0.5, **at)
    for here, there in zip(found.data, wanted.data, strict=True):
        assert (here.xaxis or "x", here.yaxis or "y") == (there.xaxis, there.yaxis)
    for axis in (name for trace in wanted.data for name in (trace.xaxis, trace.yaxis)):
        name = f"{axis[0]}axis{axis[1:]}"
        here, there = found.layout[name], wanted.layout[name]
        assert here.anchor == there.anchor
        assert here.domain == pytest.approx(there.domain)

    linked = {found.layout[f"xaxis{i + 1}" if i else "xaxis"].matches for i in range(n)} - {None}
    assert linked == ({"x"} if shared_x and n > 1 else set())
    for here, there in zip(found.layout.annotations, wanted.layout.annotations, strict=True):
        for part in ("text", "xanchor", "yanchor", "xref", "yref", "showarrow"):
            assert here[part] == there[part]
        assert (here.x, here.y) == pytest.approx((there.x, there.y))
    for here, there in zip(found.layout.shapes, wanted.layout.shapes, strict=True):
        for part in ("type", "x0", "x1", "y0", "y1", "xref", "yref"):
            assert here[part] == there[part]
    assert found.layout.height == TOP + LEGEND * curves + inner + GAP - TOP
    assert found.layout.title.text == "all of them"
