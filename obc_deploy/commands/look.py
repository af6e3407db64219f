"""`obc-deploy doctor`, `inspect` and `schemes`: what is there, before any work."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from obc_deploy.commands import options as o
from obc_deploy.commands.compress import load_named_model
from obc_deploy.commands.output import Output
from obc_deploy.errors import CalibrationError, ModelError, SchemeError
from obc_deploy.schemes import NM, Block4, Scheme, Unstructured
from obc_deploy.targets import TARGETS

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

    from obc_deploy.layers import Layer

REQUIRED_RUNTIME = "onnxruntime"
PATTERNS = ("unstructured@0.5", "block4@0.5", "2:4")
"""What `inspect` tries on each layer; the share of zeros does not matter for fitting."""
IMAGENET_SHAPE = "3,224,224"

EXAMPLES = (
    ("dense", "nothing"),
    ("w8a8", "8-bit weights and activations"),
    ("w4", "4-bit weights, float activations"),
    ("w4g128", "the same, with a scale for every 128 columns"),
    ("w3-asym", "3-bit weights with a zero point"),
    ("unstructured@0.9", "90 % of a layer's weights are zero, wherever that costs least"),
    ("block4@0.9", "the same in blocks of four consecutive input channels"),
    (
        "block4x2@0.9",
        "blocks that two output channels share: ort-sparse runs as many faster",
    ),
    ("2:4", "at most two weights in every four consecutive input channels"),
    ("block4@0.9+w8a8", "prune first, then quantize what is left"),
)
GRAMMAR_LINES = (
    'scheme  := pattern | quant | pattern "+" quant | "dense"',
    'pattern := "unstructured@" S | "block4@" S | "block4x2@" S | N ":" M'
    "      S = fraction of zeros, 0 < S < 1",
    'quant   := "w" BITS ["g" GROUP] ["a" BITS] ["-asym"]      BITS = 2 to 8',
)


def doctor(json: o.JsonFile = None) -> None:
    """Say which runtimes and solvers work here, why others do not, and what this CPU can do."""
    from obc_deploy.runtimes.doctor import diagnose, render

    out = Output(json)
    with out.working() as say:
        say("trying the runtimes and the solvers", 0.0)
        diagnosis = diagnose()
    out.show(render(diagnosis))
    out.results(diagnosis.as_dict())
    works = {info.name for info in diagnosis.runtimes if info.works}
    if REQUIRED_RUNTIME not in works:
        raise typer.Exit(1)


def _example(
    model: nn.Module | ExportedProgram, name: str, shapes: list[str] | None
) -> tuple[Tensor, ...]:
    """Random inputs of the shapes that were given, or that the model is known to take."""
    import torch

    if not shapes and not isinstance(model, torch.nn.Module):
        return _program_example(model, name)
    if not shapes and name.startswith("torchvision:"):
        shapes = [IMAGENET_SHAPE]
    if not shapes:
        raise CalibrationError(
            f"what '{name}' takes is not known: give the shape of one sample, as in "
            f"--input-shape {IMAGENET_SHAPE}, or --calibration DATA"
        )
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn((2, *_shape(text)), generator=generator) for text in shapes)


def _program_example(program: ExportedProgram, name: str) -> tuple[Tensor, ...]:
    import torch

    names = program.graph_signature.user_inputs
    nodes = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in names]
    found = []
    for node in nodes:
        sizes = [size if isinstance(size, int) else 2 for size in node.meta["val"].shape]
        found.append(torch.zeros(sizes, dtype=node.meta["val"].dtype))
    if not found:
        raise ModelError(f"the exported program '{name}' takes no tensor")
    return tuple(found)


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise CalibrationError(
            f"--input-shape '{text}' is no shape; give the sizes of one sample without its batch, "
            f"as in {IMAGENET_SHAPE}"
        )
    return shape


def fitting_patterns(layer: Layer) -> list[str]:
    """Names of the patterns that divide a layer."""
    from obc_deploy.solvers import check_scheme

    found = []
    for text in PATTERNS:
        try:
            check_scheme(
                Scheme.parse(text), rows=layer.rows, cols=layer.cols, channels=layer.channels,
                name=layer.name,
            )  # fmt: skip
        except SchemeError:
            continue
        found.append(text.partition("@")[0])
    return found


def inspect(
    model: o.ModelName,
    input_shape: Annotated[
        list[str] | None,
        typer.Option(
            "--input-shape",
            "-i",
            metavar="C,H,W",
            help="Sizes of one sample, without its batch; repeat it for a model of several inputs.",
            show_default=f"{IMAGENET_SHAPE} for torchvision models, a .pt2 file's own",
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            "-c",
            metavar="DATA",
            show_default="none",
            help="Samples to take the shape from, instead of --input-shape.",
        ),
    ] = None,
    weights: o.WeightsName = None,
    resize: o.Resize = 256,
    crop: o.Crop = 224,
    json: o.JsonFile = None,
) -> None:
    """List a model's layers as matrix problems: shapes, costs, and patterns that divide them."""
    from rich.table import Table

    out = Output(json)
    for text in input_shape or ():
        _shape(text)
    with out.working() as say:
        say("loading the model", 0.0)
        import torch

        from obc_deploy.benchmarks.table import count
        from obc_deploy.capture import capture
        from obc_deploy.layers import find_layers

        loaded = load_named_model(model, weights)
        if calibration is not None:
            samples = o.DataOptions(resize=resize, crop=crop).load(calibration, limit=2)
            example = tuple(torch.from_numpy(array) for array in samples.arrays(0, 2))
        else:
            example = _example(loaded, model, input_shape)
        say("capturing the model", 0.3)
        network = capture(loaded, example)
        say("counting operations", 0.7)
        layers, unsupported = find_layers(network)
    table = Table("layer", "kind", "weight", title=model, title_justify="left")
    for title in ("rows x cols", "MACs"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("patterns that fit")
    for layer in layers:
        groups = f", {layer.groups} groups" if layer.groups > 1 else ""
        table.add_row(
            layer.name, layer.kind.value + groups, "x".join(map(str, layer.weight_shape)),
            f"{layer.rows} x {layer.cols}", count(layer.macs), ", ".join(fitting_patterns(layer)),
        )  # fmt: skip
    out.show(table)
    macs, weights_in_all = sum(x.macs for x in layers), sum(x.weights for x in layers)
    out.line(f"{len(layers)} layers, {count(weights_in_all)} weights, {count(macs)} MACs a sample")
    for other in unsupported:
        out.warn(f"{other.name}: {other.reason}")
    out.results(
        {
            "model": model,
            "inputs": {
                name: list(tensor.shape[1:])
                for name, tensor in zip(network.input_names, network.example, strict=True)
            },
            "macs": macs,
            "weights": weights_in_all,
            "layers": [_description(layer) for layer in layers],
            "unsupported": [
                {"name": x.name, "operator": x.operator, "reason": x.reason} for x in unsupported
            ],
        }
    )


def _description(layer: Layer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "kind": layer.kind.value,
        "shape": list(layer.weight_shape),
        "rows": layer.rows,
        "cols": layer.cols,
        "channels": layer.channels,
        "groups": layer.groups,
        "macs": layer.macs,
        "weights": math.prod(layer.weight_shape),
        "patterns": fitting_patterns(layer),
    }


def _accelerated(pattern: type, target_name: str) -> str:
    least = TARGETS[target_name].sparse_from.get(pattern)
    return "no" if least is None else f"from {least:.0%} zeros"


def schemes(json: o.JsonFile = None) -> None:
    """Explain what may be done to a layer, and which target makes it faster."""
    from rich.table import Table

    out = Output(json)
    for line in GRAMMAR_LINES:
        out.line(line)
    examples = Table("example", "what it does", title="\nExamples", title_justify="left")
    for text, meaning in EXAMPLES:
        examples.add_row(text, meaning)
    targets = Table(
        "target", "w8a8", "unstructured@S", "block4@S", "N:M", title="\nWhat is faster where",
        title_justify="left",
    )  # fmt: skip
    for target in TARGETS.values():
        targets.add_row(
            target.name, "yes", _accelerated(Unstructured, target.name),
            _accelerated(Block4, target.name), "2:4" if NM in target.sparse_from else "no",
        )  # fmt: skip
    out.show(examples, targets)
    for target in TARGETS.values():
        out.line(f"{target.name}: {target.summary}")
    out.results(
        {
            "grammar": list(GRAMMAR_LINES),
            "examples": dict(EXAMPLES),
            "targets": {
                target.name: {
                    "runtime": target.runtime,
                    "summary": target.summary,
                    "sparse_from": {
                        kind.__name__.lower(): least for kind, least in target.sparse_from.items()
                    },
                }
                for target in TARGETS.values()
            },
        }
    )
