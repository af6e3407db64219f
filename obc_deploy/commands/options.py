"""The options that commands share: names, units, defaults, help texts, and how they parse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer
from typer.core import TyperCommand

from obc_deploy.errors import CalibrationError, LayerError
from obc_deploy.schemes import Scheme
from obc_deploy.targets import TARGETS

if TYPE_CHECKING:
    from obc_deploy.data import Samples

DEFAULT_SAMPLES = 1024
"""Calibration samples that are taken where there are more."""


class Method(StrEnum):
    """How weights are chosen."""

    EXACT_OBS = "exact_obs"
    MAGNITUDE = "magnitude"
    RTN = "rtn"


class Ranges(StrEnum):
    """How activation ranges are found."""

    MIN_MAX = "min-max"
    PERCENTILE = "percentile"
    MSE = "mse"


class Precision(StrEnum):
    """Floating-point type of the solver."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"


class MetricName(StrEnum):
    """What a network costs."""

    LATENCY = "latency"
    MACS = "macs"
    BOPS = "bops"
    BIT_OPERATIONS = "bit_operations"
    SIZE = "size"


class Command(TyperCommand):
    """A command whose `--json` needs no file: alone, or before another option, it means stdout."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the `-` in that `--json` leaves out, then parse."""
        given: list[str] = []
        for index, argument in enumerate(args):
            given.append(argument)
            following = args[index + 1] if index + 1 < len(args) else None
            if argument == "--json" and (
                following is None or (following.startswith("-") and following != "-")
            ):
                given.append("-")
        return super().parse_args(ctx, given)


_MODEL = "The model"
_DATA = "Data"
_SCHEME = "What to do"
_BUDGET = "Budgets"
_MEASURE = "Measuring"
_RESULT = "Results"

ModelName: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="torchvision:NAME, package.module:factory, or a .pt2 file (torch.export.save).",
        show_default=False,
    ),
]
WeightsName: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="FILE|NAME|none",
        help="A checkpoint (.safetensors, .pt, .pth), a torchvision weights name, or none.",
        rich_help_panel=_MODEL,
        show_default="none",
    ),
]
Calibration: TypeAlias = Annotated[
    str,
    typer.Option(
        "--calibration",
        "-c",
        metavar="DATA",
        help="Samples of what the model sees in use: an image folder, an .npz or .npy file, or "
        "package.module:factory.",
        rich_help_panel=_DATA,
        show_default=False,
    ),
]
SampleCount: TypeAlias = Annotated[
    int,
    typer.Option(
        "--samples", min=1, metavar="N", help="Most calibration samples to take.",
        rich_help_panel=_DATA,
    ),
]  # fmt: skip
Passes: TypeAlias = Annotated[
    int,
    typer.Option(
        "--passes", min=1, metavar="N",
        help="Passes over the calibration images, from the second on mirrored at random and "
        "shifted by up to an eighth: for networks trained so, and few images.",
        rich_help_panel=_DATA,
    ),
]  # fmt: skip
Evaluation: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--eval",
        metavar="DATA",
        help="Labelled samples to measure accuracy on, before and after.",
        rich_help_panel=_DATA,
        show_default="none",
    ),
]
PixelScale: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--scale",
        metavar="FACTOR",
        help="Factor of uint8 pixels, such as 1/255.",
        rich_help_panel=_DATA,
        show_default="1/255",
    ),
]
PixelMean: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--mean",
        metavar="A,B,C",
        help="Mean of the scaled pixels, one a channel.",
        rich_help_panel=_DATA,
        show_default="ImageNet's for image folders, else none",
    ),
]
PixelDeviation: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--std",
        metavar="A,B,C",
        help="Standard deviation of the scaled pixels, one a channel.",
        rich_help_panel=_DATA,
        show_default="ImageNet's for image folders, else none",
    ),
]
Resize: TypeAlias = Annotated[
    int,
    typer.Option(
        "--resize", min=0, metavar="PIXELS",
        help="Image folders: scale the shorter side to this; 0 leaves it.", rich_help_panel=_DATA,
    ),
]  # fmt: skip
Crop: TypeAlias = Annotated[
    int,
    typer.Option(
        "--crop", min=0, metavar="PIXELS",
        help="Image folders: side of the centre crop; 0 leaves the picture.", rich_help_panel=_DATA,
    ),
]  # fmt: skip
SchemeText: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--scheme",
        "-s",
        metavar="SCHEME",
        help="What is done to each layer, such as block4@0.9+w8a8 (see 'obc-deploy schemes').",
        rich_help_panel=_SCHEME,
        show_default="w8a8",
    ),
]
TargetName: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--target",
        "-t",
        metavar="TARGET",
        help=f"Where it will run ({', '.join(TARGETS)}): shapes the weight grids and the warnings.",
        rich_help_panel=_SCHEME,
        show_default="ort-sparse where its kernels are built, else onnxruntime",
    ),
]
Skip: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--skip",
        metavar="PATTERN",
        help="Leave layers of this name or shell pattern dense; may be repeated.",
        rich_help_panel=_SCHEME,
        show_default="none",
    ),
]
LayerSchemes: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--layer",
        metavar="NAME=SCHEME",
        help="Another scheme for layers of this name or shell pattern; may be repeated, the last "
        "one wins.",
        rich_help_panel=_SCHEME,
        show_default="none",
    ),
]
Fallback: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--fallback",
        metavar="SCHEME",
        help="Scheme of layers whose shape --scheme does not divide.",
        rich_help_panel=_SCHEME,
        show_default="none: an error",
    ),
]
MethodName: TypeAlias = Annotated[
    Method,
    typer.Option(
        "--method",
        help="exact_obs is Optimal Brain Compression; magnitude and rtn (round to nearest) are "
        "quick baselines that need no Hessian.",
        rich_help_panel=_SCHEME,
    ),
]
RangesName: TypeAlias = Annotated[
    Ranges,
    typer.Option(
        "--ranges", help="How activation ranges are found.", rich_help_panel=_SCHEME
    ),
]  # fmt: skip
Damping: TypeAlias = Annotated[
    float,
    typer.Option(
        "--damping",
        min=0.0,
        metavar="SHARE",
        help="Added to the Hessian's diagonal, as a share of its mean.",
        rich_help_panel=_SCHEME,
    ),
]
PrecisionName: TypeAlias = Annotated[
    Precision, typer.Option("--dtype", help="Precision of the solver.", rich_help_panel=_SCHEME)
]
Reestimate: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--bn-reestimate/--no-bn-reestimate",
        help="Measure batch-norm statistics anew after compression; where there is no batch norm, "
        "give layers their dense output means and variances.",
        rich_help_panel=_SCHEME,
    ),
]
Sequential: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--sequential/--independent",
        help="Calibrate each layer on what the compressed layers before it give, and correct it "
        "toward the dense outputs; slower, and better where much is taken away.",
        rich_help_panel=_SCHEME,
    ),
]
BudgetText: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--budget",
        "-b",
        metavar="BUDGET",
        help="In place of --scheme, how many times less than dense it may cost: latency:4x "
        "(measured on --target), macs:3x, bops:12x, bit_operations:20x, size:6x; several joined by "
        "commas. Each layer's scheme is searched for.",
        rich_help_panel=_BUDGET,
        show_default="none",
    ),
]
MaxDrop: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--max-drop",
        metavar="POINTS",
        help="In place of --scheme, the cheapest plan that loses at most so many points of "
        "accuracy on --eval.",
        rich_help_panel=_BUDGET,
        show_default="none",
    ),
]
DropMetric: TypeAlias = Annotated[
    MetricName,
    typer.Option("--by", help="What --max-drop saves.", rich_help_panel=_BUDGET),
]
SearchTime: TypeAlias = Annotated[
    float,
    typer.Option(
        "--search-time",
        min=0.0,
        metavar="SECONDS",
        help="For the search past the exact solution of the layers' losses, on the whole network; "
        "0 does without.",
        rich_help_panel=_BUDGET,
    ),
]
DatabaseFolder: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--database",
        metavar="FOLDER",
        help="Where every layer at every level is kept, to be used again.",
        rich_help_panel=_BUDGET,
        show_default="one in the cache",
    ),
]
Families: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--levels",
        metavar="FAMILIES",
        help="What the search may choose from, such as 'block4+w8a8,w8a8': unstructured, block4 or "
        "N:M, alone or with a quantization, or a quantization alone, or dense.",
        rich_help_panel=_BUDGET,
        show_default="all that the target gains from",
    ),
]
FreeEdges: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--free-edges",
        help="Let the search prune the first and the last layer too.",
        rich_help_panel=_BUDGET,
    ),
]
LatencyFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--latency-table",
        metavar="FILE",
        help="A latency table to take instead of measuring.",
        rich_help_panel=_BUDGET,
        show_default="the cache's, else measured",
    ),
]
ForeignLatency: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--allow-foreign-latency",
        help="Take --latency-table from another machine, or another version, too.",
        rich_help_panel=_BUDGET,
    ),
]
TimedThreads: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        metavar="N",
        help="Threads that latencies are measured with.",
        rich_help_panel=_BUDGET,
        show_default="the physical cores",
    ),
]
TimedBatch: TypeAlias = Annotated[
    int,
    typer.Option(
        "--measured-batch",
        min=1,
        metavar="N",
        help="Samples in a timed inference.",
        rich_help_panel=_BUDGET,
    ),
]
BatchSize: TypeAlias = Annotated[
    int,
    typer.Option(
        "--batch-size", min=1, metavar="N",
        help="Calibration samples that run through the model at a time.", rich_help_panel=_DATA,
    ),
]  # fmt: skip
Device: TypeAlias = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="cpu, cuda, cuda:1, or auto for CUDA where there is one.",
        rich_help_panel=_SCHEME,
    ),
]
DeviceMemory: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--device-memory",
        metavar="SIZE",
        help="Most memory to take on a CUDA device, such as 8GiB; batches shrink to fit it.",
        rich_help_panel=_SCHEME,
        show_default="all of it",
    ),
]
Seed: TypeAlias = Annotated[
    int, typer.Option("--seed", min=0, metavar="N", help="Seed of every random choice.")
]
NoBaselines: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--no-baselines",
        help="Leave out the dense fp32 and dense int8 networks that 'bench' compares with.",
        rich_help_panel=_RESULT,
    ),
]
Overwrite: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace a run directory that is in use, as a whole.",
        rich_help_panel=_RESULT,
    ),
]
RunOutput: TypeAlias = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="RUN",
        help="The run directory to make.",
        rich_help_panel=_RESULT,
        show_default=False,
    ),
]
JsonFile: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="[FILE]",
        help="Write the results as JSON to a file, or to stdout (FILE is '-' or left out), then "
        "with nothing else there.",
        rich_help_panel=_RESULT,
        show_default="none",
    ),
]
RunDirectory: TypeAlias = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="A run directory, from 'compress'.", show_default=False),
]
RuntimeNames: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--runtime",
        "-r",
        metavar="NAME",
        help=f"Where to measure ({', '.join(TARGETS)}); may be repeated.",
        rich_help_panel=_MEASURE,
        show_default="every one that works here",
    ),
]
Threads: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        metavar="N",
        help="Threads of the runtime, each pinned to a core.",
        rich_help_panel=_MEASURE,
        show_default="the physical cores",
    ),
]
Rounds: TypeAlias = Annotated[
    int,
    typer.Option(
        "--rounds", min=1, metavar="N",
        help="Rounds in which all variants take their turns.", rich_help_panel=_MEASURE,
    ),
]  # fmt: skip
Processes: TypeAlias = Annotated[
    int,
    typer.Option(
        "--processes", min=1, metavar="N",
        help="Fresh worker processes a variant, one after another.", rich_help_panel=_MEASURE,
    ),
]  # fmt: skip
TimeBudget: TypeAlias = Annotated[
    float,
    typer.Option(
        "--time-budget", min=0.1, metavar="SECONDS",
        help="Seconds of measuring after which a slow network takes fewer samples.",
        rich_help_panel=_MEASURE,
    ),
]  # fmt: skip
ReportFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE",
        help="Where the report goes.",
        rich_help_panel=_RESULT,
        show_default="RUN/report.html",
    ),
]
AllowSlower: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--allow-slower",
        help="Exit with 0 even where a compressed network is slower than a dense one everywhere "
        "(else 3).",
        rich_help_panel=_RESULT,
    ),
]


def layer_schemes(texts: Sequence[str] | None) -> dict[str, Scheme]:
    """`--layer NAME=SCHEME` options as schemes by layer pattern.

    Raises:
        LayerError: one is not of that form.
        SchemeError: a scheme cannot be read.
    """
    found: dict[str, Scheme] = {}
    for text in texts or ():
        name, equals, scheme = text.rpartition("=")
        if not equals or not name:
            raise LayerError(f"--layer '{text}' names no scheme: give NAME=SCHEME, as in fc=dense")
        found[name] = Scheme.parse(scheme)
    return found


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise CalibrationError(
            f"{option} '{text}' is no list of numbers; give one a channel, as in 0.49,0.46,0.41"
        ) from None


def _factor(text: str) -> float:
    above, slash, below = text.partition("/")
    try:
        return float(above) / (float(below) if slash else 1.0)
    except (ValueError, ZeroDivisionError):
        raise CalibrationError(f"--scale '{text}' is no factor; give a number or 1/255") from None


@dataclass(frozen=True)
class DataOptions:
    """How named samples are read.

    Attributes:
        scale: factor of uint8 pixels, as typed.
        mean: one value a channel, as typed.
        std: one value a channel, as typed.
        resize: pixels of the shorter side; 0 leaves it.
        crop: pixels of the centre crop; 0 leaves it.
    """

    scale: str | None = None
    mean: str | None = None
    std: str | None = None
    resize: int = 256
    crop: int = 224

    def __post_init__(self) -> None:
        self.preprocessing()

    def preprocessing(self) -> Any:
        """The pre-processing that was asked for, or None where none was.

        Raises:
            CalibrationError: a value cannot be read.
        """
        from obc_deploy.data import Preprocessing

        if self.scale is None and self.mean is None and self.std is None:
            return None
        return Preprocessing(
            _factor(self.scale or "1/255"),
            _numbers(self.mean, "--mean") if self.mean else (),
            _numbers(self.std, "--std") if self.std else (),
        )

    def load(self, name: str, *, limit: int | None = None, seed: int | None = None) -> Samples:
        """The samples of that name.

        Raises:
            CalibrationError: there are none, or they are unusable.
        """
        from obc_deploy.data import ImageOptions, load_samples

        return load_samples(
            name,
            preprocessing=self.preprocessing(),
            images=ImageOptions(self.resize or None, self.crop or None),
            limit=limit,
            seed=seed,
        )
