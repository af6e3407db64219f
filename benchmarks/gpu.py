"""What a GPU is worth: the solver, 2:4 and 8-bit products at real shapes, whole networks.

    python -m obc_deploy.benchmarks.gpu
    python -m obc_deploy.benchmarks.gpu --seconds 240 --name workstation
    python -m obc_deploy.benchmarks.gpu --cpu-rehearsal

Every result is checked before it is timed. What this machine or this PyTorch lacks, what was wrong
and what there was no time for is named instead of timed. Networks have random weights: speed does
not depend on them. The first two write `results/gpu-<name>.json` and `.md`; the rehearsal runs
the same script on small shapes on the CPU, to see that it works, and writes nothing there.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from obc_deploy import native
from obc_deploy.benchmarks.gpu_engines import ENGINE_VARIANTS, engine_table, time_engines
from obc_deploy.benchmarks.gpu_findings import Findings, repeated_inputs, timed_row
from obc_deploy.benchmarks.record import RESULTS, Record, take_record
from obc_deploy.benchmarks.solver import TASKS, layer_problem, plain_run
from obc_deploy.benchmarks.table import times
from obc_deploy.runtimes.cuda_layers import Arithmetic, GpuAbilities
from obc_deploy.runtimes.cuda_products import FP8, FP8_LARGEST, CompressedWeight, padded
from obc_deploy.runtimes.torch_cuda import (
    CudaOptions,
    TorchCudaSession,
    milliseconds,
    open_torch_cuda,
    relative_rms,
)
from obc_deploy.solvers import LayerProblem, SolverSettings, solve_levels

if TYPE_CHECKING:
    from obc_deploy.compression import CompressedModel

SECONDS = 400.0
SOLVER_ENDS, PRODUCTS_END = 0.25, 0.45
"""Shares of the time after which a part starts nothing new; networks have the rest."""
ERRORS_AGREE = 1e-3
"""Relative difference of a layer's error between solvers from which one of them is wrong."""
PRODUCT_TOLERANCE = 0.01
NETWORK_TOLERANCE = {"fp16": 0.03, "int8": 0.15}
"""Root-mean-square error of a network's outputs beside its float32 simulation on the same grids.

The simulation also rounds what int8 runtimes pass between layers; sessions here pass floats.
"""
ROUNDS = 5


@dataclass(frozen=True)
class Scale:
    """What is run: real shapes, or small ones.

    Attributes:
        problems: (rows, cols) of the solver's layers.
        tasks: keys of the solver benchmark's TASKS.
        plain_rows: rows of 768 columns that the plain reference solves on the CPU and on the GPU;
            fewer of wider ones.
        shapes: (layer, vectors, cols, rows) of products.
        networks: name, batch and how to make one with an example of one sample.
        rounds: turns that the variants of a network take.
        samples: inferences in a turn.
    """

    problems: tuple[tuple[int, int], ...]
    tasks: tuple[str, ...]
    plain_rows: tuple[int, int]
    shapes: tuple[tuple[str, int, int, int], ...]
    networks: tuple[tuple[str, int, Callable[[], tuple[nn.Module, Tensor]]], ...]
    rounds: int = ROUNDS
    samples: int = 20


class Encoder(nn.Module):
    """A BERT-shaped encoder: token and position embeddings, post-norm blocks, a classifier."""

    def __init__(
        self, width: int = 768, heads: int = 12, depth: int = 12, length: int = 128,
        words: int = 30522,
    ) -> None:  # fmt: skip
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads) for _ in range(depth))
        self.classifier = nn.Linear(width, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, length) int64 -> (n, 16)."""
        x: Tensor = self.norm(self.words(tokens) + self.positions)
        for block in self.blocks:
            x = block(x)
        classes: Tensor = self.classifier(x[:, 0])
        return classes


class EncoderBlock(nn.Module):
    """Self-attention and two linears, each with a residual and a norm after it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.wide = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(n, length, width) -> the same."""
        n, length, width = x.shape
        parts = self.attention(x).reshape(n, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        seen = functional.scaled_dot_product_attention(query, key, value)
        x = self.norms[0](x + self.output(seen.transpose(1, 2).reshape(n, length, width)))
        found: Tensor = self.norms[1](x + self.narrow(functional.gelu(self.wide(x))))
        return found


def _vit(**shape: int) -> tuple[nn.Module, Tensor]:
    from torchvision.models import VisionTransformer

    made = VisionTransformer(**shape)
    # torchvision starts the head at zero, which would make all outputs equal.
    nn.init.normal_(made.heads.head.weight, std=0.02)
    return made, torch.randn(1, 3, shape["image_size"], shape["image_size"])


def _resnet50() -> tuple[nn.Module, Tensor]:
    from torchvision.models import resnet50

    return resnet50(weights=None), torch.randn(1, 3, 224, 224)


def _small_resnet() -> tuple[nn.Module, Tensor]:
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 1, 1, 1], width_per_group=16), torch.randn(1, 3, 32, 32)


def _encoder(**shape: int) -> tuple[nn.Module, Tensor]:
    made = Encoder(**shape)
    return made, torch.randint(0, made.words.num_embeddings, (1, len(made.positions)))


REAL = Scale(
    problems=((768, 768), (256, 2304)),
    tasks=("unstructured 50/75/90 %", "2:4", "block4 50/75/90 %", "4 bit"),
    plain_rows=(4, 2),
    shapes=(
        ("ViT-B qkv, batch 32", 32 * 197, 768, 2304),
        ("ViT-B out, batch 32", 32 * 197, 768, 768),
        ("ViT-B fc1, batch 32", 32 * 197, 768, 3072),
        ("ViT-B fc2, batch 32", 32 * 197, 3072, 768),
        ("BERT-base fc1, batch 1", 128, 768, 3072),
        ("BERT-base fc1, batch 32", 32 * 128, 768, 3072),
        ("ResNet-50 stage 1, batch 64", 64 * 56 * 56, 64, 256),
        ("ResNet-50 stage 3, batch 64", 64 * 14 * 14, 256, 1024),
        ("ResNet-50 stage 4, batch 64", 64 * 7 * 7, 2048, 512),
        ("4096 cubed", 4096, 4096, 4096),
        ("4096 squared, one token", 1, 4096, 4096),
    ),
    networks=(
        (
            "ViT-B/16",
            32,
            lambda: _vit(
                image_size=224, patch_size=16, num_layers=12, num_heads=12, hidden_dim=768,
                mlp_dim=3072,
            ),
        ),
        ("BERT-base-shaped encoder", 32, _encoder),
        ("ResNet-50", 64, _resnet50),
    ),
)  # fmt: skip

SMALL = Scale(
    problems=((8, 64),),
    tasks=("2:4", "4 bit"),
    plain_rows=(2, 1),
    shapes=(("small", 24, 64, 32),),
    networks=(
        (
            "small ViT",
            2,
            lambda: _vit(
                image_size=16, patch_size=8, num_layers=1, num_heads=2, hidden_dim=32, mlp_dim=64
            ),
        ),
        ("small encoder", 2, lambda: _encoder(width=32, heads=2, depth=1, length=8, words=50)),
        ("small ResNet", 2, _small_resnet),
    ),
    rounds=2,
    samples=2,
)  # fmt: skip


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - begin


def solver_speed(scale: Scale, device: torch.device, found: Findings) -> None:
    """The plain per-row algorithm, the torch solver on the device and the compiled rows."""
    for rows, cols in scale.problems:
        problem = layer_problem(rows, cols)
        assert problem.hessian is not None
        on_device = replace(
            problem, weight=problem.weight.to(device), hessian=problem.hessian.to(device)
        )
        for task in scale.tasks:
            what = f"solver {rows}x{cols} {task}"
            if not found.has_time(what, SOLVER_ENDS):
                continue
            with found.naming(what):
                found.solver += _solver_times(problem, on_device, task, scale, device, found)


def _solver_times(
    problem: LayerProblem, on_device: LayerProblem, task: str, scale: Scale,
    device: torch.device, found: Findings,
) -> list[dict[str, Any]]:  # fmt: skip
    rows = problem.weight.shape[0]
    torch_rows = SolverSettings(native=False)

    def solve(given: LayerProblem, place: str, settings: SolverSettings) -> list[float]:
        levels = solve_levels(given, TASKS[task], device=place, settings=settings)
        return [level.error for level in levels]

    few, fewer = (_plain_rows(count, problem) for count in scale.plain_rows)

    def plain() -> None:
        with device:
            plain_run(on_device, task, fewer)

    # The first solve is the check; it also loads the libraries.
    errors = solve(on_device, str(device), torch_rows)
    seconds: dict[str, list[float]] = {}
    if native.is_available():
        wanted: list[float] = []
        seconds["compiled, CPU"] = [
            _seconds(lambda: wanted.extend(solve(problem, "cpu", SolverSettings())), device)
        ]
        worst = max(abs(a - b) / max(b, 1e-12) for a, b in zip(errors, wanted, strict=True))
        if worst > ERRORS_AGREE:
            found.miss(
                f"solver {problem.name} {task}",
                f"errors on {device} differ from the compiled solver's by {100 * worst:.2g} %",
            )
            return []
    else:
        found.miss(f"solver {problem.name} {task}: compiled rows", native.why_missing())
    on_gpu = f"torch, {device.type}"
    seconds[on_gpu] = [
        _seconds(lambda: solve(on_device, str(device), torch_rows), device) for _ in range(3)
    ]
    seconds["plain, CPU"] = [_seconds(lambda: plain_run(problem, task, few), device)]
    if device.type != "cpu":
        seconds[f"plain, {device.type}"] = [_seconds(plain, device)]
    counts = {"plain, CPU": few, f"plain, {device.type}": fewer}
    return [
        {
            "problem": problem.name,
            "task": task,
            "solver": name,
            "threads": torch.get_num_threads(),
            "rows": counts.get(name, rows),
            "seconds": taken,
            "errors": [] if name in counts else errors,
        }
        for name, taken in seconds.items()
    ]


def _plain_rows(count: int, problem: LayerProblem) -> int:
    """Rows that take the plain reference about as long as `count` rows of 768 columns."""
    rows, cols = problem.weight.shape
    return max(1, min(rows, round(count * (768 / max(768, cols)) ** 2)))


@dataclass(frozen=True)
class _Multiplication:
    """One kind of product, ready to run.

    Attributes:
        call: computes it.
        wanted: what it should give, float32.
        macs: dense multiply-accumulates over those left.
        bops: the same times the wider operand's bits, beside 16-bit floats.
    """

    call: Callable[[], Tensor]
    wanted: Tensor
    macs: float
    bops: float


def two_four(weight: Tensor) -> Tensor:
    """The weight with all but the two largest of each four consecutive columns zero."""
    groups = weight.reshape(weight.shape[0], -1, 4)
    kept = groups.abs().topk(2, dim=2).indices
    mask = torch.zeros_like(groups).scatter_(2, kept, 1.0)
    return (groups * mask).reshape(weight.shape)


def _multiplication(kind: str, x: Tensor, weight: Tensor) -> _Multiplication:
    """A product of float32 values in one kind of arithmetic, without what surrounds it."""
    sparse, bits = kind.startswith("2:4"), kind.removeprefix("2:4").removeprefix("+").strip()
    matrix = two_four(weight) if sparse else weight
    macs = 2.0 if sparse else 1.0
    if bits == "fp16":
        dtype = torch.float16 if x.is_cuda else torch.float32
        a, b = x.to(dtype), matrix.to(dtype)
        wanted = a.float() @ b.float().t()
        if not sparse:
            return _Multiplication(lambda: a @ b.t(), wanted, macs, 1.0)
        held, packed = padded(a, 8), CompressedWeight(b)
        packed.search(held)
        return _Multiplication(lambda: packed(held)[: len(a)], wanted, macs, 2.0)
    if bits == "int8":
        a = (x * 30).round().clamp(-127, 127).to(torch.int8)
        b = (matrix * (127 / matrix.abs().max())).round().to(torch.int8)
        wanted = a.float() @ b.float().t()
        if not sparse:
            held = padded(a, 8, 32)
            return _Multiplication(lambda: torch._int_mm(held, b.t())[: len(a)], wanted, macs, 2.0)
        held, packed = padded(a, 16), CompressedWeight(b)
        packed.search(held, out_dtype=torch.int32)
        return _Multiplication(
            lambda: packed(held, out_dtype=torch.int32)[: len(a)], wanted, macs, 4.0
        )
    scale = torch.ones((), device=x.device)
    a8 = padded(x, 16).to(FP8)
    b8 = (matrix * (FP8_LARGEST / matrix.abs().max())).to(FP8)
    wanted = (a8.float() @ b8.float().t())[: len(x)]
    if not sparse:
        return _Multiplication(
            lambda: torch._scaled_mm(a8, b8.t(), scale, scale, out_dtype=torch.bfloat16)[: len(x)],
            wanted, macs, 2.0,
        )  # fmt: skip
    packed = CompressedWeight(b8)
    packed.search(a8, out_dtype=torch.bfloat16)
    return _Multiplication(
        lambda: packed(a8, out_dtype=torch.bfloat16)[: len(x)], wanted, macs, 4.0
    )


KINDS = ("fp16", "2:4 fp16", "int8", "2:4+int8", "fp8", "2:4+fp8")


def product_speed(scale: Scale, device: torch.device, found: Findings) -> None:
    """Dense, 2:4 and 8-bit products at the shapes of layers, without quantizing the input."""
    gpu = GpuAbilities.of(device)
    made = torch.Generator().manual_seed(0)
    for name, vectors, cols, rows in scale.shapes:
        x = torch.randn(vectors, cols, generator=made).to(device)
        weight = (0.05 * torch.randn(rows, cols, generator=made)).to(device)
        for kind in KINDS:
            what = f"product {name}, {kind}"
            arithmetic = Arithmetic(kind.removeprefix("2:4").strip(" +"))
            lacking = gpu.lacks(arithmetic)
            if lacking is None and kind.startswith("2:4"):
                lacking = gpu.lacks_sparsity
            if lacking is not None:
                found.miss(what, lacking)
                continue
            if not found.has_time(what, PRODUCTS_END):
                continue
            with found.naming(what):
                one = _multiplication(kind, x, weight)
                error = relative_rms(one.call(), one.wanted)
                if error > PRODUCT_TOLERANCE:
                    found.miss(what, f"its outputs are off by {100 * error:.2g} %")
                    continue
                found.products.append(
                    {
                        "layer": name,
                        "shape": [vectors, cols, rows],
                        "kind": kind,
                        "ms": milliseconds(one.call, device),
                        "error": error,
                        "predicted_macs": one.macs,
                        "predicted_bops": one.bops,
                    }
                )
    found.products[:] = [row | {"speedup": _speedup(row, found.products)} for row in found.products]


def _speedup(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> float | None:
    dense = [r["ms"] for r in rows if r["layer"] == row["layer"] and r["kind"] == "fp16"]
    return dense[0] / row["ms"] if dense else None


VARIANTS = (
    ("dense fp16", "dense", Arithmetic.FLOAT16, False),
    ("2:4 fp16", "2:4+w8a8", Arithmetic.FLOAT16, True),
    ("int8", "w8a8", Arithmetic.INT8, False),
    ("2:4+int8", "2:4+w8a8", Arithmetic.INT8, True),
)
"""Name, scheme, arithmetic and whether 2:4 products are used."""


def network_speed(scale: Scale, device: torch.device, found: Findings) -> None:
    """Whole networks: variants under a CUDA graph, as engines, and through torch.compile too."""
    made: dict[str, dict[str, CompressedModel]] = {}
    for name, batch, make in scale.networks:
        if found.has_time(f"network {name}"):
            with found.naming(f"network {name}"):
                made[name] = _compressed(name, batch, make, device)
                _time_network(name, batch, made[name], False, scale, device, found)
    for name, batch, _ in scale.networks:
        if name in made:
            with tempfile.TemporaryDirectory(prefix="obc-engines-") as folder:
                time_engines(
                    name, batch, made[name], Path(folder), found, rounds=scale.rounds,
                    samples=scale.samples,
                )  # fmt: skip
    for name, batch, _ in scale.networks:
        what = f"network {name} through torch.compile"
        if name not in made:
            continue
        if device.type != "cuda":
            found.miss(what, "no CUDA device")
        elif found.has_time(what):
            with found.naming(what):
                _time_network(name, batch, made[name], True, scale, device, found)


def _compressed(
    name: str, batch: int, make: Callable[[], tuple[nn.Module, Tensor]], device: torch.device
) -> dict[str, CompressedModel]:
    from obc_deploy.calibrated import calibrate
    from obc_deploy.compression import compress

    torch.manual_seed(0)
    model, example = make()
    shape = (min(batch, 8), *example.shape[1:])
    if example.is_floating_point():
        samples = torch.randn(shape).numpy()
    else:
        samples = torch.randint(0, int(example.max()) + 1, shape).numpy()
    calibrated = calibrate(model.eval(), samples, device=str(device), source=name)
    edges = [calibrated.layers[0].name, calibrated.layers[-1].name]
    schemes = [variant[1] for variant in (*VARIANTS, *ENGINE_VARIANTS)]
    return {
        scheme: compress(
            calibrated, scheme=scheme, method="magnitude",
            fallback="w8a8" if "w8a8" in scheme else "dense", skip=edges, ranges="min-max",
            bn_reestimate=False, baselines=False,
        )
        for scheme in dict.fromkeys(schemes)
    }  # fmt: skip


def _time_network(
    name: str, batch: int, models: dict[str, CompressedModel], compiled: bool, scale: Scale,
    device: torch.device, found: Findings,
) -> None:  # fmt: skip
    opened: dict[str, tuple[TorchCudaSession, CompressedModel, float]] = {}
    inputs = repeated_inputs(models["dense"], batch)
    suffix = ", compiled" if compiled else ""
    try:
        for variant, scheme, arithmetic, sparse in VARIANTS:
            what = f"network {name}, {variant}{suffix}"
            if not found.has_time(what):
                continue
            with found.naming(what):
                session = open_torch_cuda(
                    models[scheme],
                    # What a product costs by itself is not what it costs fused with its input's
                    # rounding, so a compiled network keeps all of them.
                    CudaOptions(
                        arithmetic, sparse=sparse, compiled=compiled, faster_only=not compiled
                    ),
                    batch_size=batch, device=str(device),
                )  # fmt: skip
                error = _network_error(session, models[scheme], arithmetic, inputs, device)
                if error > NETWORK_TOLERANCE[arithmetic.value]:
                    found.miss(what, f"its outputs are off by {100 * error:.2g} %")
                    session.close()
                    continue
                for note in session.notes:
                    found.miss(what, note)
                opened[variant] = session, models[scheme], error
        times: dict[str, list[float]] = {variant: [] for variant in opened}
        copies: dict[str, list[float]] = {variant: [] for variant in opened}
        for _ in range(scale.rounds):
            for variant, (session, _, _) in opened.items():
                for taken, with_copies in ((times, False), (copies, True)):
                    timed = session.time(
                        inputs, warmup=3, samples=scale.samples, copies=with_copies
                    )
                    taken[variant].append(float(np.median(timed.samples_ms)))
        dense = times.get("dense fp16")
        for variant, (session, model, error) in opened.items():
            found.networks.append(
                {
                    "network": name,
                    "batch": batch,
                    "compiled": compiled,
                    "error": error,
                    **timed_row(model, variant, times[variant], copies[variant], dense),
                    "facts": session.facts,
                }
            )
    finally:
        for session, _, _ in opened.values():
            session.close()


def _network_error(
    session: TorchCudaSession, model: CompressedModel, arithmetic: Arithmetic,
    inputs: dict[str, np.ndarray[Any, Any]], device: torch.device,
) -> float:  # fmt: skip
    """How far a session is from float32: on the same grids for int8, plain for floats."""
    module = model.module() if arithmetic is Arithmetic.INT8 else model.network.copy().module
    module = module.to(device)
    with torch.no_grad():
        wanted = module(*(torch.from_numpy(a).to(device) for a in inputs.values()))
    wanted = wanted[0] if isinstance(wanted, list | tuple) else wanted
    given = next(iter(session.run(inputs).values()))
    return relative_rms(torch.from_numpy(given), wanted.cpu())


def report(record: Record, device: str, found: Findings) -> str:
    """Everything as Markdown."""
    lines = [
        "# On a GPU", "", f"{record.head}; {device}; PyTorch {torch.__version__}, "
        f"CUDA {torch.version.cuda}.", "",
        "Networks have random weights: that changes their speed in nothing, and their accuracy "
        "means nothing. Each result was checked before it was timed.", "",
        "## The exact solver", "",
        "| problem | task | solver | ms a row | faster than plain on the CPU |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    plain = {
        (r["problem"], r["task"]): _per_row(r) for r in found.solver if r["solver"] == "plain, CPU"
    }
    lines += [
        f"| {r['problem']} | {r['task']} | {r['solver']} | {_per_row(r):.4g} | "
        f"{plain[r['problem'], r['task']] / _per_row(r):.1f}x |"
        for r in found.solver
    ]
    lines += [
        "", "## Products", "", "Without quantizing inputs; speedups over dense fp16.", "",
        "| layer | vectors x cols x rows | kind | ms | speedup | MACs promise | BOPs promise |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {r['layer']} | {' x '.join(map(str, r['shape']))} | {r['kind']} | {r['ms']:.4f} | "
        f"{times(r['speedup'])} | {r['predicted_macs']:.1f}x | {r['predicted_bops']:.1f}x |"
        for r in found.products
    ]
    lines += [
        "", "## Networks", "",
        "Milliseconds a batch, without and with copies from and to the host; speedups over dense "
        "fp16 run the same way. Layers: on the kernel that the variant is named for, of all.", "",
        "| network | batch | variant | ms | with copies | speedup | MACs promise | BOPs promise | "
        "layers | off by |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in found.networks:
        layers = r["facts"]["layers"]
        wanted = r["variant"].replace(" fp16", "")
        on_it = sum(layer["kernel"] == wanted for layer in layers)
        way = ", compiled" if r["compiled"] else ""
        lines.append(
            f"| {r['network']} | {r['batch']} | {r['variant']}{way} | {r['ms']:.3f} | "
            f"{r['ms_with_copies']:.3f} | {times(r['speedup'])} | {r['predicted_macs']:.2f}x | "
            f"{r['predicted_bops']:.2f}x | {on_it}/{len(layers)} | {100 * r['error']:.2g} % |"
        )
    lines += engine_table(found.engines)
    reasons: dict[tuple[str, str, str], int] = {}
    for r in found.networks:
        for layer in r["facts"]["layers"] if not r["compiled"] else ():
            if layer["reason"]:
                general = re.sub(r"[\d.]+ ms", "... ms", layer["reason"])
                key = r["network"], r["variant"], general
                reasons[key] = reasons.get(key, 0) + 1
    lines += ["", "Why layers are not on the kernel of a variant in PyTorch:", ""]
    lines += [f"- {n}, {v}, {count} layers: {why}" for (n, v, why), count in reasons.items()]
    lines += ["", "## Missing", ""]
    lines += [f"- {each.what}: {each.reason}" for each in found.missing] or ["Nothing."]
    return "\n".join(lines) + "\n"


def _per_row(row: dict[str, Any]) -> float:
    return float(1e3 * statistics.median(row["seconds"]) / row["rows"])


def measure(
    scale: Scale, device: torch.device, seconds: float, say: Callable[[str], None]
) -> Findings:
    """Everything, within about that many seconds: what has started is finished.

    Args:
        scale: what is run.
        device: where.
        seconds: after which nothing new starts.
        say: told which part runs.
    """
    found = Findings(time.monotonic() + seconds, seconds)
    for part in (solver_speed, product_speed, network_speed):
        say(part.__name__.replace("_", " "))
        part(scale, device, found)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which nothing starts")
    parser.add_argument("--name", help="of the result files; the GPU's by default")
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument(
        "--cpu-rehearsal", action="store_true", help="small shapes on the CPU; no results"
    )
    options = parser.parse_args(arguments)
    rehearsal = options.cpu_rehearsal
    if not rehearsal and not torch.cuda.is_available():
        print(
            "error: no CUDA device works here; --cpu-rehearsal checks the script without one",
            file=sys.stderr,
        )
        return 2
    folder = options.output or (None if rehearsal else RESULTS)
    if rehearsal and folder is not None and folder.resolve() == RESULTS:
        print(
            f"error: a rehearsal measures nothing and does not go to '{RESULTS}'; choose another "
            "--output",
            file=sys.stderr,
        )
        return 2
    device = torch.device("cpu" if rehearsal else "cuda")
    record = take_record("gpu")
    found = measure(
        SMALL if rehearsal else REAL, device, options.seconds,
        lambda text: print(text, file=sys.stderr, flush=True),
    )  # fmt: skip
    title = GpuAbilities.of(device).name
    text = report(record, title, found)
    if rehearsal:
        text = text.replace("# On a GPU", "# Rehearsal on the CPU: no measurement", 1)
    if folder is None:
        print(text)
        return 0
    slug = re.sub(r"[^a-z0-9]+", "-", (options.name or title).lower()).strip("-")
    results = {
        "device": title,
        "rehearsal": rehearsal,
        "seconds": options.seconds,
        "cuda": torch.version.cuda,
        "cusparselt": torch.backends.cusparselt.version() if device.type == "cuda" else None,
        "solver": found.solver,
        "products": found.products,
        "networks": found.networks,
        "engines": found.engines,
        "missing": [asdict(each) for each in found.missing],
    }
    record.write(folder, f"gpu-{slug}", results, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
