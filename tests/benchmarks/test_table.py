"""The tables, as they come out at several widths."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from timings import measured, one_run

from obc_deploy.benchmarks import table
from obc_deploy.benchmarks.measurement import Measurement, with_speedups


def _rendered(rows, width):
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(table.rich_table(rows, width=width))
    return out.getvalue().rstrip("\n").split("\n")


def _rows():
    failed = Measurement(
        variant="w4", scheme="w4", runtime="deepsparse", threads=1, error="worker died"
    )
    return with_speedups([*one_run("onnxruntime", 2.0), *one_run("deepsparse", 1.0), failed])


ANSWERS = ("97.0±", "10.0x", "40.0x", "8.00x", "4.00x", "1.00")
REST = ("99.0", "100K", "800K", "1.50", "0.100 kB")


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_every_answer_fits_the_width(width):
    lines = _rendered(_rows(), width)
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    section = lines[next(i for i, line in enumerate(lines) if "deepsparse" in line) :]
    row = next(line for line in section if line.startswith("block4@0.9+w8a8"))
    # 8.00x and 4.00x up to the noise of the timings.
    cells = row.split()
    assert cells[1].startswith("97.0±")
    assert {"10.0x", "40.0x"} <= set(cells)
    measured_cells = [float(cell[:-1]) for cell in cells if cell.endswith("x")][-2:]
    assert measured_cells == pytest.approx([8.0, 4.0], rel=0.02)


def test_wider_shows_more():
    headers = {width: " ".join(_rendered(_rows(), width)[:2]).split() for width in (80, 120, 160)}
    assert len(headers[80]) < len(headers[120]) <= len(headers[160])
    assert {"accuracy", "predicted", "measured", "p50"} <= set(headers[80])
    assert {"agree", "MACs", "BOPs", "size", "end"} <= set(headers[120])
    assert "layers" in headers[160]


def test_runtimes_stand_apart_and_trouble_is_named():
    text = "\n".join(_rendered(list(reversed(_rows())), 120))
    assert text.index("deepsparse") < text.index("onnxruntime")
    assert text.count("deepsparse") == text.count("onnxruntime") == 1
    assert text.count("slower than dense") == 2
    assert "failed" in text


def test_long_names_wrap_and_nothing_is_lost():
    name = "a-network-with-a-name-longer-than-any-column/block4@0.95+w8a8"
    rows = [*one_run(), measured(name, "w8a8", "compressed", 3.0)]
    lines = _rendered(with_speedups(rows), 80)
    assert max(map(len, lines)) <= 80
    pieces = "".join(line.split(" ")[0] for line in lines)
    assert name in pieces


def test_markup_in_names_is_text():
    lines = _rendered([measured("[red]name[/red]", "w8a8", "compressed", 3.0)], 120)
    assert any("[red]name[/red]" in line for line in lines)


def test_columns_without_a_value_are_left_out():
    row = Measurement(variant="v", scheme="w4", runtime="r", macs=1000)
    header = " ".join(_rendered([row], 160)[:2])
    assert "MACs" in header
    assert "accuracy" not in header
    assert _rendered([], 80)


def test_markdown():
    rows = [*_rows(), Measurement(variant="a|b\nc", scheme="w4", runtime="onnxruntime")]
    lines = table.markdown_table(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    columns = {line.replace("\\|", "").count("|") for line in lines}
    assert len(columns) == 1
    assert any("a\\|b c" in line for line in lines)
    best = next(line for line in lines if "block4@0.9+w8a8 | deepsparse" in line)
    assert "10.0x" in best
    assert best.count("(") == 2, "both speedups have their interval"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (table.percent(0.9999), "99.9"),
        (table.percent(1.0), "100.0"),
        (table.percent(0.978), "97.8"),
        (table.percent(None), "-"),
        (table.count(999), "999"),
        (table.count(999_700), "1.00M"),
        (table.count(1_814_073_344), "1.81G"),
        (table.size(5_963_776), "5.96 MB"),
        (table.size(120_000), "120 kB"),
        (table.milliseconds(0.01234), "0.0123"),
        (table.milliseconds(1234.5), "1234"),
        (table.times(0.8), "0.80x"),
        (table.times(9.996), "10.0x"),
        (table.span((1.5, 12.0)), "1.50-12.0"),
    ],
)
def test_figures(written, expected):
    assert written == expected


@given(st.floats(1e-3, 1e6))
def test_three_digits_are_true(number):
    assert float(table.three_digits(number)) == pytest.approx(number, rel=6e-3, abs=5e-5)


@given(st.integers(0, 10**14))
def test_counts_are_true(number):
    text = table.count(number)
    scale = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(text[-1], 1)
    assert float(text.rstrip("KMGT")) * scale == pytest.approx(number, rel=6e-3)
