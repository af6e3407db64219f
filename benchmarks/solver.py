"""The exact solver's speed: a plain per-row reference, batched torch, and the compiled rows.

    python -m obc_deploy.benchmarks.solver
    python -m obc_deploy.benchmarks.solver --network resnet50

The first solves two layer problems with each solver in turn, several times over, and writes
`results/solver.json` and `.md`; the plain reference does some of the rows, so all times are given
per row. The second makes the whole database of a network's layers, every distinct shape once, as a
build solves them, and writes `results/solver-<network>.json` and `.md`.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from obc_deploy import native
from obc_deploy.benchmarks.record import RESULTS, take_record
from obc_deploy.database.levels import BLOCK4_LEVELS, UNSTRUCTURED_LEVELS, sparsity_grid
from obc_deploy.schemes import Quantization, as_scheme
from obc_deploy.solvers import LayerProblem, SolverSettings, solve_levels
from obc_deploy.solvers.grids import find_grid
from obc_deploy.solvers.settings import compression_settings, torch_threads

TASKS = {
    "unstructured 50/75/90 %": ("unstructured@0.5", "unstructured@0.75", "unstructured@0.9"),
    "2:4": ("2:4",),
    "4:8": ("4:8",),
    "block4 50/75/90 %": ("block4@0.5", "block4@0.75", "block4@0.9"),
    "4 bit": ("w4-asym",),
    "3 bit": ("w3-asym",),
    "2 bit": ("w2-asym",),
    "2:4 + 4 bit": ("2:4+w4-asym",),
}
"""What is solved, each as one call."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one task by one solver.

    Attributes:
        problem: "rows x cols".
        task: a key of TASKS.
        solver: "plain", "torch" or "native".
        threads: CPU threads.
        rows: rows that were solved.
        seconds: one wall-clock time a repeat.
        errors: relative squared error of each scheme; empty for the plain reference.
    """

    problem: str
    task: str
    solver: str
    threads: int
    rows: int
    seconds: list[float]
    errors: list[float]

    @property
    def per_row(self) -> float:
        """Median milliseconds a row."""
        return 1e3 * statistics.median(self.seconds) / self.rows


def layer_problem(rows: int, cols: int, seed: int = 0) -> LayerProblem:
    """A layer with correlated, mostly positive inputs and rows of unequal size.

    Inputs are relu(A z + m) with a spectrum that falls as i^-0.75, and a little white noise; four
    samples a column.
    """
    made = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    spectrum = torch.arange(1, cols + 1, dtype=torch.float64) ** -0.75
    mixing = torch.linalg.qr(normal(cols, cols))[0] * (spectrum * cols**0.5 / spectrum.norm())
    inputs = mixing @ normal(cols, 4 * cols) + 0.3 * normal(cols, 1)
    inputs = inputs.relu() + 0.02 * normal(cols, 4 * cols)
    hessian = 2 / inputs.shape[1] * inputs @ inputs.T
    weight = normal(rows, cols) * (0.4 * normal(rows, 1)).exp() / cols**0.5
    return LayerProblem(weight.float(), hessian, channels=cols, name=f"{rows}x{cols}")


def plain_run(problem: LayerProblem, task: str, rows: int) -> list[float]:
    """The algorithm as the paper writes it, a row at a time: one rank-one update each step.

    Returns:
        Nothing: no errors are computed.
    """
    hessian = problem.hessian
    assert hessian is not None
    damping = problem.damping * hessian.diagonal().mean()
    inverse = torch.cholesky_inverse(
        torch.linalg.cholesky(hessian + damping * torch.eye(len(hessian), dtype=torch.float64))
    ).float()
    schemes = [as_scheme(text) for text in TASKS[task]]
    pattern, quantization = schemes[0].pattern, schemes[0].quantization
    for row in problem.weight[:rows]:
        weight, start = row.clone(), inverse.clone()
        if pattern is None and quantization is not None:
            _plain_quantize(weight, start, quantization)
            continue
        group, zeros, width = len(row), len(row), 1
        if ":" in task:
            zeros, group = (int(part) for part in task.split(" ")[0].split(":"))
        elif task.startswith("block4"):
            width = 4
        kept = _plain_prune(weight, start, group, zeros, width)
        if quantization is not None:
            left = start[kept][:, kept]
            _plain_quantize(weight[kept], left, quantization)
    return []


def _plain_prune(
    weight: torch.Tensor, inverse: torch.Tensor, group: int, zeros: int, width: int
) -> torch.Tensor:
    """Prune in place; returns which columns stay."""
    cols = len(weight)
    gone = torch.zeros(cols, dtype=torch.bool)
    closed = torch.zeros(cols // width)
    given = [0] * (cols // group)
    for _ in range(cols // group * zeros // width):
        if width == 1:
            p = int((weight.square() / inverse.diagonal()).add_(closed).argmin())
            column = inverse[p].clone()
            pivot = float(column[p])
            weight.add_(column, alpha=-float(weight[p]) / pivot)
            inverse.addr_(column, column, alpha=-1.0 / pivot)
            inverse[p, p] = 1.0
            gone[p], closed[p] = True, torch.inf
            given[p // group] += 1
            if given[p // group] == zeros:
                closed[p // group * group : (p // group + 1) * group] = torch.inf
        else:
            blocks = inverse.reshape(cols // width, width, cols // width, width)
            own = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            parts = weight.reshape(-1, width, 1)
            score = (parts * torch.linalg.solve(own, parts)).sum((1, 2)).add_(closed)
            at = int(score.argmin())
            place = slice(width * at, width * at + width)
            columns = inverse[place].clone()
            update = torch.linalg.solve(columns[:, place], columns)
            weight -= weight[place] @ update
            inverse.addmm_(columns.T, update, alpha=-1.0)
            inverse[place, place] = torch.eye(width)
            gone[place], closed[at] = True, torch.inf
    weight[gone] = 0.0
    return ~gone


def _plain_quantize(
    weight: torch.Tensor, inverse: torch.Tensor, quantization: Quantization
) -> None:
    """Quantize in place."""
    grid = find_grid(weight[None], quantization)
    scale, zero = float(grid.scale), float(grid.zero_point)
    closed = torch.zeros(len(weight))
    for _ in range(len(weight)):
        code = (torch.round(weight / scale) + zero).clamp_(grid.code_min, grid.code_max)
        miss = (code - zero).mul_(scale).sub_(weight)
        worst, at = (miss.abs() - closed).max(0)
        if float(worst) > scale / 2:
            p = int(at)
        else:
            p = int((miss.square() / inverse.diagonal()).add_(closed).argmin())
        column = inverse[p].clone()
        pivot = float(column[p])
        weight.add_(column, alpha=float(miss[p]) / pivot)
        inverse.addr_(column, column, alpha=-1.0 / pivot)
        inverse[p, p] = 1.0
        closed[p] = torch.inf


def compare(
    shapes: list[tuple[int, int]], *, repeats: int, plain_rows: int, most_threads: int,
    say: Callable[[str], None],
) -> list[Timing]:  # fmt: skip
    """Every task by every solver, in turn within each repeat."""
    timings = []
    for rows, cols in shapes:
        problem = layer_problem(rows, cols)
        for task, schemes in TASKS.items():
            say(f"{rows}x{cols} {task}")

            def solve(native_rows: bool, schemes: tuple[str, ...] = schemes,
                      problem: LayerProblem = problem) -> list[float]:  # fmt: skip
                settings = SolverSettings(native=native_rows)
                return [s.error for s in solve_levels(problem, schemes, settings=settings)]

            runs: dict[tuple[str, int], tuple[int, Callable[[], list[float]]]] = {
                ("plain", 1): (
                    min(rows, plain_rows),
                    lambda task=task, problem=problem: plain_run(  # type: ignore[misc]
                        problem, task, plain_rows
                    ),
                ),
                ("torch", 1): (rows, lambda solve=solve: solve(False)),  # type: ignore[misc]
            }
            for threads in range(1, most_threads + 1):
                runs[("native", threads)] = (rows, lambda solve=solve: solve(True))  # type: ignore[misc]
            seconds: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
            errors: dict[tuple[str, int], list[float]] = {}
            for _ in range(repeats):
                for key, (_, run) in runs.items():
                    with torch_threads(key[1]):
                        begin = time.perf_counter()
                        errors[key] = run()
                        seconds[key].append(time.perf_counter() - begin)
            timings += [
                Timing(problem.name, task, solver, threads, runs[solver, threads][0],
                       seconds[solver, threads], errors[solver, threads])
                for solver, threads in runs
            ]  # fmt: skip
    return timings


def roofline(sizes: list[int], repeats: int) -> list[dict[str, float]]:
    """The rank update's rate beside a matrix product's, in turn; GFLOP/s on one thread."""
    rows = []
    with torch_threads(1):
        for size in sizes:
            depth = 32 if size < 1024 else 64
            count = max(2, int(2e9 / size / size / depth))
            square = torch.randn(1024, 1024)
            update, product = [], []
            for _ in range(repeats):
                update.append(native.library().obc_update_rate(32, size, depth, count))
                begin = time.perf_counter()
                for _ in range(4):
                    square @ square
                product.append(4 * 2 * 1024**3 / (time.perf_counter() - begin))
            rows.append(
                {
                    "size": size,
                    "depth": depth,
                    "update_gflops": statistics.median(update) / 1e9,
                    "product_gflops": statistics.median(product) / 1e9,
                    "share": statistics.median(u / p for u, p in zip(update, product, strict=True)),
                }
            )
    return rows


def comparison_table(timings: list[Timing]) -> str:
    """Milliseconds a row, and how many times faster than the plain reference."""
    lines = [
        "| problem | task | plain, ms a row | torch | native | faster than plain | 2 threads |",
        "|---|---|---|---|---|---|---|",
    ]
    cases = dict.fromkeys((t.problem, t.task) for t in timings)
    for problem, task in cases:
        of = {(t.solver, t.threads): t for t in timings if (t.problem, t.task) == (problem, task)}
        plain, one = of["plain", 1], of["native", 1]
        two = of.get(("native", 2))
        scaling = f"{one.per_row / two.per_row:.2f}x" if two else "-"
        lines.append(
            f"| {problem} | {task} | {plain.per_row:.1f} | {of['torch', 1].per_row:.2f} | "
            f"{one.per_row:.3f} | {plain.per_row / one.per_row:.0f}x | {scaling} |"
        )
    return "\n".join(lines)


def database_schemes(cols: int, channels: int) -> list[str]:
    """All levels of one layer's database that divide it."""
    blocks = channels % 4 == 0
    texts = [f"unstructured@{level}" for level in sparsity_grid(UNSTRUCTURED_LEVELS)]
    texts += [f"block4@{level}" for level in sparsity_grid(BLOCK4_LEVELS)] if blocks else []
    texts += ["2:4"] if blocks else []
    texts += ["w8", "w4", "w3", "w2"]
    texts += ["2:4+w8", "2:4+w4", "block4@0.5+w8", "block4@0.9+w8"] if blocks else []
    return texts


@dataclass(frozen=True)
class LayerTime:
    """What the database of one layer shape took.

    Attributes:
        rows: output channels.
        cols: columns of the matrix problem.
        count: layers of this shape in the network.
        levels: schemes solved.
        seconds: wall-clock time for one such layer.
    """

    rows: int
    cols: int
    count: int
    levels: int
    seconds: float


def network_shapes(name: str) -> dict[tuple[int, int, int], int]:
    """(rows, cols, channels) of a torchvision network's convolutions and linears, with counts."""
    import torchvision

    shapes: Counter[tuple[int, int, int]] = Counter()
    for module in torchvision.models.get_model(name, weights=None).modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            weight = module.weight.flatten(1)
            shapes[(*weight.shape, module.weight.shape[1])] += 1
    return dict(shapes)


def vgg16_cifar_shapes() -> dict[tuple[int, int, int], int]:
    """VGG-16-BN for 32x32 images: torchvision's convolutions, one linear of 512 to 10."""
    shapes = {
        shape: count for shape, count in network_shapes("vgg16_bn").items() if shape[1] <= 4608
    }
    return {k: v for k, v in shapes.items() if k[0] < 1000} | {(10, 512, 512): 1}


def database(
    shapes: dict[tuple[int, int, int], int], say: Callable[[str], None]
) -> list[LayerTime]:
    """Solve every level of each distinct shape once, by the settings of a build."""
    settings = compression_settings("float32")
    times = []
    for (rows, cols, channels), count in sorted(shapes.items(), key=lambda item: item[0][1]):
        problem = replace(layer_problem(rows, cols), channels=channels)
        schemes = database_schemes(cols, channels)
        begin = time.perf_counter()
        solve_levels(problem, schemes, settings=settings)
        seconds = time.perf_counter() - begin
        say(f"{rows}x{cols}: {len(schemes)} levels in {seconds:.1f} s, {count} such layers")
        times.append(LayerTime(rows, cols, count, len(schemes), seconds))
    return times


def main(arguments: list[str] | None = None) -> int:
    """Run one of the two comparisons and write its results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", help="torchvision name, or vgg16_cifar: the whole database")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plain-rows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if not native.is_available():
        print(f"error: the compiled solvers are missing: {native.why_missing()}", file=sys.stderr)
        return 2
    record = take_record("solver")
    results: dict[str, Any] = {"instruction_set": native.instruction_set()}
    head = f"{record.head}, {native.instruction_set()}"
    if options.network:
        wanted = options.network
        shapes = vgg16_cifar_shapes() if wanted == "vgg16_cifar" else network_shapes(wanted)
        with torch_threads(options.threads):
            times = database(shapes, say)
        total = sum(each.count * each.seconds for each in times)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        results |= {
            "threads": options.threads,
            "layers": [asdict(each) for each in times],
            "seconds_all_layers": total,
            "peak_memory_bytes": memory,
        }
        rows = "\n".join(
            f"| {t.rows}x{t.cols} | {t.count} | {t.levels} | {t.seconds:.1f} |" for t in times
        )
        text = (
            f"# Database of {wanted}\n\n{head}, {options.threads} threads.\n\n"
            "Each distinct shape was solved once, on a made-up problem of that shape; the sum "
            f"counts it as often as the network has it: **{total / 60:.1f} minutes**, peak memory "
            f"{memory / 2**30:.1f} GiB. As in a build, 8 bits of dense layers have one order for "
            "all rows, and of pruned ones are rounded where that loses next to nothing; all else "
            "is ExactOBS and OBQ.\n\n| layer | layers | levels | seconds each |\n"
            f"|---|---|---|---|\n{rows}\n"
        )
        name = f"solver-{wanted.replace('_', '-')}"
    else:
        timings = compare(
            [(64, 576), (512, 512)], repeats=options.repeats, plain_rows=options.plain_rows,
            most_threads=options.threads, say=say,
        )  # fmt: skip
        rates = roofline([256, 512, 1152, 2304, 4608], repeats=5)
        results |= {"timings": [asdict(each) for each in timings], "roofline": rates}
        lines = "\n".join(
            f"| {r['size']} | {r['depth']} | {r['update_gflops']:.0f} | "
            f"{r['product_gflops']:.0f} | {100 * r['share']:.0f} % |"
            for r in rates
        )
        text = (
            f"# The exact solver\n\n{head}. The plain reference solves {options.plain_rows} rows, "
            "the others all of them; medians of "
            f"{options.repeats} repeats in turn, one thread but for the last column.\n\n"
            f"{comparison_table(timings)}\n\n## The rank update beside a matrix product\n\n"
            "| columns left | vectors | update, GFLOP/s | 1024³ product, GFLOP/s | share |\n"
            f"|---|---|---|---|---|\n{lines}\n"
        )
        name = "solver"
    record.write(options.output, name, results, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
