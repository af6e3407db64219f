"""Measurements as a table: in the terminal, and in Markdown for a README.

One row a variant and runtime. The columns that answer the user's question (accuracy, predicted and
measured speedup, latency) stay at 80 columns; the rest joins as the terminal gets wider.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.measure import Measurement as RichMeasurement
from rich.table import Table
from rich.text import Text

from obc_deploy.benchmarks.measurement import Interval, Measurement

NONE = "-"
"""What a cell without a value shows."""


def percent(fraction: float | None) -> str:
    """A fraction as a percentage; never rounded up to 100 %."""
    if fraction is None:
        return NONE
    # Down to a tenth: 99.97 % right is not all right.
    return f"{int(fraction * 1000 + 1e-9) / 10:.1f}"


def count(number: int | None) -> str:
    """A large count with three digits and K, M, G or T."""
    if number is None:
        return NONE
    for step, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if number >= 0.9995 * step:
            return f"{three_digits(number / step)}{letter}"
    return str(number)


def size(number: int | None) -> str:
    """Bytes, in kB or MB of 1000."""
    if number is None:
        return NONE
    if number >= 999_500:
        return f"{three_digits(number / 1e6)} MB"
    return f"{three_digits(number / 1e3)} kB"


def milliseconds(time: float | None) -> str:
    """A time with three digits, without its unit."""
    return NONE if time is None else three_digits(time)


def times(ratio: float | None) -> str:
    """A speedup: 3.42x."""
    if ratio is None:
        return NONE
    return f"{ratio:.1f}x" if ratio >= 9.995 else f"{ratio:.2f}x"


def thread_count(threads: int | None) -> str:
    """Threads in words: 1 thread, 2 threads."""
    return f"{'?' if threads is None else threads} thread{'s' * (threads != 1)}"


def three_digits(number: float) -> str:
    """Three digits that count, without an exponent: 0.0123, 1.23, 12.3, 1234."""
    for limit, digits in ((0.09995, 4), (0.9995, 3), (9.995, 2), (99.95, 1)):
        if abs(number) < limit:
            return f"{number:.{digits}f}"
    return f"{number:.0f}"


def half_width(interval: Interval | None) -> str:
    """An interval of an accuracy as plus or minus, in percentage points."""
    if interval is None:
        return ""
    return f"±{50.0 * (interval[1] - interval[0]):.1f}"


def span(interval: Interval | None) -> str:
    """An interval of a speedup as its two ends."""
    if interval is None:
        return ""
    return f"{times(interval[0])[:-1]}-{times(interval[1])[:-1]}"


def _latency(row: Measurement) -> str:
    return milliseconds(row.latency_ms.p50 if row.latency_ms else None)


def _accuracy(row: Measurement) -> str:
    return f"{percent(row.accuracy)}{half_width(row.accuracy_interval)}"


def _layers(row: Measurement) -> str:
    if row.layers_accelerated is None or row.layers_total is None:
        return NONE
    return f"{row.layers_accelerated}/{row.layers_total}"


def _predicted_macs(row: Measurement) -> str:
    return times(row.predicted_speedup.macs if row.predicted_speedup else None)


def _predicted_bops(row: Measurement) -> str:
    return times(row.predicted_speedup.bops if row.predicted_speedup else None)


@dataclass(frozen=True)
class Column:
    """A column: its header's two lines, its cell, and its rank when not all fit (0 stays)."""

    title: tuple[str, str]
    cell: Callable[[Measurement], str]
    rank: int = 0
    style: str | None = None


_COLUMNS = (
    Column(("accuracy", "%"), _accuracy),
    Column(("agree", "%"), lambda row: percent(row.agreement), 3),
    Column(("MACs", "left"), lambda row: count(row.macs), 4),
    Column(("BOPs", "left"), lambda row: count(row.bops), 4),
    Column(("predicted", "by MACs"), _predicted_macs, style="dim"),
    Column(("predicted", "by BOPs"), _predicted_bops, style="dim"),
    Column(("measured", "vs fp32"), lambda row: times(row.speedup_vs_dense_fp32), style="bold"),
    Column(("measured", "vs int8"), lambda row: times(row.speedup_vs_dense_int8), style="bold"),
    Column(("p50", "ms"), _latency),
    Column(("end to", "end ms"), lambda row: milliseconds(row.end_to_end_ms), 1),
    Column(("size", ""), lambda row: size(row.size_bytes), 2),
    Column(("fast", "layers"), _layers, 5),
)
_NAME_WIDTH = 16
"""A variant's name wraps at this width rather than pushing a column out."""

_MARKDOWN = (
    *_COLUMNS[:6],
    Column(
        ("vs dense", "fp32"),
        lambda row: _with_span(row.speedup_vs_dense_fp32, row.speedup_vs_dense_fp32_interval),
    ),
    Column(
        ("vs dense", "int8"),
        lambda row: _with_span(row.speedup_vs_dense_int8, row.speedup_vs_dense_int8_interval),
    ),
    Column(("latency p50", "ms"), _latency),
    Column(("end to end", "ms"), lambda row: milliseconds(row.end_to_end_ms)),
    Column(("size", ""), lambda row: size(row.size_bytes)),
    Column(("layers accelerated", ""), _layers),
)


def _with_span(ratio: float | None, interval: Interval | None) -> str:
    ends = span(interval)
    # A baseline against itself has no interval worth showing.
    return times(ratio) if not ends or ratio == 1.0 else f"{times(ratio)} ({ends})"


def rich_table(
    measurements: Iterable[Measurement], *, width: int = 120, title: str | None = None
) -> Table:
    """The measurements as a table for a terminal of `width` columns.

    Rows of one runtime stand together under its name, in the order given. Columns that are empty in
    every row, or that do not fit, are left out; the variant's name wraps rather than being cut.
    """
    rows = by_runtime(measurements)
    columns = [column for column in _COLUMNS if any(column.cell(row) != NONE for row in rows)]
    while True:
        table = _draw(rows, columns, title)
        spare = max(0, max((len(row.variant) for row in rows), default=0) - _NAME_WIDTH)
        if _natural_width(table) - spare <= width:
            return table
        droppable = [column for column in columns if column.rank]
        if not droppable:
            return table
        columns.remove(max(reversed(droppable), key=lambda column: column.rank))


def _natural_width(table: Table) -> int:
    console = Console(width=10_000, color_system=None)
    return RichMeasurement.get(console, console.options, table).maximum


def _draw(rows: Sequence[Measurement], columns: Sequence[Column], title: str | None) -> Table:
    table = Table(
        title=title,
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title_justify="left",
        title_style="bold",
    )
    table.add_column(Text("variant"), overflow="fold")
    for column in columns:
        header = Text("\n".join(part for part in column.title if part), justify="right")
        table.add_column(header, justify="right", no_wrap=True, style=column.style)
    for index, row in enumerate(rows):
        if index == 0 or conditions_of(row) != conditions_of(rows[index - 1]):
            table.add_row(Text(conditions_of(row), style="italic"))
        last = index + 1 < len(rows) and conditions_of(rows[index + 1]) != conditions_of(row)
        name = Text(row.variant)
        if row.error is not None:
            name.append("\nfailed" if row.latency_ms is None else "\nincomplete", style="red")
        elif row.slower_than_dense:
            name.append("\nslower than dense", style="yellow")
        table.add_row(name, *(Text(column.cell(row)) for column in columns), end_section=last)
    return table


def conditions_of(row: Measurement) -> str:
    """Runtime, and below it threads and batch, so that the column of names stays narrow."""
    threads = "" if row.threads is None else f"\n{thread_count(row.threads)}"
    batch = f"batch {row.batch_size}"
    return f"{row.runtime}{threads}, {batch}" if threads else f"{row.runtime}\n{batch}"


def markdown_table(measurements: Iterable[Measurement]) -> str:
    """The measurements as a Markdown table, with the speedups' 95 % intervals."""
    rows = by_runtime(measurements)
    columns = [column for column in _MARKDOWN if any(column.cell(row) != NONE for row in rows)]
    titles = ["variant", "runtime", *(" ".join(column.title).strip() for column in columns)]
    lines = [
        _markdown_row(titles),
        _markdown_row(["---", "---", *("---:" for _ in columns)]),
    ]
    lines.extend(
        _markdown_row([row.variant, row.runtime, *(column.cell(row) for column in columns)])
        for row in rows
    )
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    escaped = (" ".join(cell.replace("|", "\\|").split()) for cell in cells)
    return f"| {' | '.join(escaped)} |"


def by_runtime(measurements: Iterable[Measurement]) -> list[Measurement]:
    """Measurements of one runtime, and there of the same conditions, side by side."""
    rows = list(measurements)
    runtimes = list(dict.fromkeys(row.runtime for row in rows))
    conditions = list(dict.fromkeys(conditions_of(row) for row in rows))
    return sorted(
        rows,
        key=lambda row: (runtimes.index(row.runtime), conditions.index(conditions_of(row))),
    )
