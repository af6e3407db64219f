"""Compression: a model and calibration samples become a compressed model, layer by layer.

    capture -> Hessians -> patterns (ExactOBS) -> batch-norm statistics -> grids (OBQ) -> folding
            -> activation ranges -> CompressedModel

Where the target wants one grid step a layer, folding comes before the grids; else after them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx, nn

from obc_deploy import manifest as manifests
from obc_deploy.activations import ActivationRange, RangeMethod, collect_ranges
from obc_deploy.calibration import LayerStatistics, collect_hessians
from obc_deploy.capture import (
    Network,
    at_batch,
    capture,
    get_tensor,
    input_names,
    recapture,
    set_tensor,
)
from obc_deploy.corrections import Moments, batch_norm_moments, reestimate_batch_norms
from obc_deploy.costs import Costs, LayerCost, total
from obc_deploy.data import Preprocessing, Samples, as_samples
from obc_deploy.errors import CalibrationError, ObcDeployError, SchemeError
from obc_deploy.folding import find_batch_norms, fold_batch_norms
from obc_deploy.layers import (
    Layer,
    UnsupportedLayer,
    find_layers,
    matrix_to_weight,
    select_layers,
    weight_to_matrix,
)
from obc_deploy.manifest import Manifest
from obc_deploy.quantized_network import QuantizedNetwork, quantization_points, quantized_network
from obc_deploy.schemes import DENSE, Block4, Quantization, Scheme, Unstructured, as_scheme
from obc_deploy.solvers import check_scheme, needs_hessian, solve_levels
from obc_deploy.solvers.contract import DEFAULT_DAMPING, CompressedLayer, LayerProblem
from obc_deploy.solvers.dispatch import torch_device
from obc_deploy.solvers.estimate import LayerShape, estimate_seconds, operations
from obc_deploy.solvers.settings import SolverSettings, precision
from obc_deploy.solvers.staged import quantize_pruned
from obc_deploy.targets import Placement, Target, as_target, preflight

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from obc_deploy.artifacts import Artifact

_WORTH_ANNOUNCING = 1e11
"""Operations of the solver, a few seconds of work, from which its time is estimated beforehand."""

DEFAULT_BATCH = 64
"""Samples that run through the network at a time."""
ROWS_ELEMENTS = 1 << 20
"""Weights that a baseline works on at a time; it looks at each row of a layer alone."""
KEPT_SAMPLES = 32
"""Calibration samples that stay with a compressed model, to check exports on."""
SHARED_STEP_FACTOR = 1.25
SHARED_STEP_ERROR = 2e-3
"""One grid step for a whole layer is kept where the error is at most this factor times the error
that pruning left, plus this much; else each row gets a step of its own."""

Role = Literal["dense-fp32", "dense-int8", "compressed"]
Stage = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done."""

W8A8 = Scheme(None, Quantization(8, activation_bits=8))


def _silent(what: str, share: float) -> None:
    """No progress is shown."""


@dataclass(frozen=True)
class CompressedModel:
    """A compressed network, ready to be simulated, exported and measured.

    Attributes:
        network: the folded float network; compressed layers hold their compressed weights.
        layers: its layers.
        forms: the compressed layers by name, as folded; dense layers have none.
        ranges: calibrated activation ranges by graph value.
        samples: a few calibration samples, for checking exports.
        manifest: what was done.
        baselines: the dense float and dense int8 networks it is measured against.
    """

    network: Network
    layers: tuple[Layer, ...]
    forms: Mapping[str, CompressedLayer[Tensor]]
    ranges: Mapping[str, ActivationRange]
    samples: Samples
    manifest: Manifest
    baselines: tuple[CompressedModel, ...] = field(default=(), repr=False)

    @property
    def scheme(self) -> str:
        """The scheme's text."""
        return self.manifest.scheme

    @property
    def role(self) -> Role:
        """What it is in a benchmark."""
        return self.manifest.role

    @property
    def costs(self) -> Costs:
        """Operations and bytes left, and those of the dense network."""
        return total(
            LayerCost(
                record.name,
                record.macs,
                record.density,
                record.weight_bits,
                record.activation_bits,
                record.weights,
            )
            for record in self.manifest.layers
        )

    def quantized(self, placement: Placement | None = None) -> QuantizedNetwork:
        """The network with its quantizers where a target wants them."""
        return quantized_network(
            self.network, self.layers, self.forms, self.ranges, placement or Placement()
        )

    def module(self, target: Target | str | None = None) -> fx.GraphModule:
        """A PyTorch module that computes what the runtime will, quantizers included."""
        placement = as_target(target).placement if target is not None else None
        return self.quantized(placement).module

    def export(
        self,
        path: Path | str,
        target: Target | str | None = None,
        *,
        dynamic_batch: bool = False,
        batch_size: int = 1,
        check: bool = True,
    ) -> Artifact:
        """Write an artifact for a target and check it against this model.

        Args:
            path: an .onnx file, or a folder that gets `model.onnx`.
            target: a target or its name; the one the model was compressed for, else onnxruntime.
            dynamic_batch: leave the batch size open.
            batch_size: the batch size of a static file.
            check: compare the file's outputs with this model's on calibration samples.

        Raises:
            ExportError: the network has no form there, or its outputs differ.
            TargetError: no such target.
        """
        from obc_deploy.exporters import export

        chosen = target or self.manifest.settings.target or "onnxruntime"
        return export(
            self, Path(path), as_target(chosen), dynamic_batch=dynamic_batch,
            batch_size=batch_size, check=check,
        )  # fmt: skip

    def save(self, folder: Path | str, *, overwrite: bool = False) -> Path:
        """Write a run directory; it is whole or not there.

        Raises:
            RunDirectoryError: it cannot be written, or holds something already.
        """
        from obc_deploy.run_directory import save_run

        return save_run(self, Path(folder), overwrite=overwrite)


@dataclass(frozen=True)
class CalibratedModel:
    """A captured model with everything that its schemes can share: capture and Hessians.

    Attributes:
        network: the network as captured, batch norms in place.
        layers: its layers.
        unsupported: operators with weights that are left alone.
        folded: the dense network with its batch norms folded.
        folded_layers: the layers of that.
        samples: the calibration samples.
        statistics: Hessians by layer, filled as they are needed.
        source: what the user named.
        weights: which weights the user named.
        device: where calibration and solving run.
        batch_size: samples that run through the network at a time.
        levels: schemes that will be asked for: one trace of a layer serves all of a kind.
        moments: statistics of the dense batch norms' inputs, once they were needed.
        pruned: layers pruned so far, by layer, pattern, method, damping and precision.
    """

    network: Network
    layers: tuple[Layer, ...]
    unsupported: tuple[UnsupportedLayer, ...]
    folded: Network
    folded_layers: tuple[Layer, ...]
    samples: Samples
    statistics: dict[str, LayerStatistics]
    source: str
    weights: str | None
    device: str
    batch_size: int
    levels: tuple[Scheme, ...] = ()
    pruned: dict[tuple[str, str, str | None, float, str], CompressedLayer[Tensor]] = field(
        default_factory=dict, repr=False
    )
    moments: dict[str, Moments] = field(default_factory=dict, repr=False)

    def hessians(
        self, layers: Sequence[Layer], dtype: torch.dtype, progress: Stage
    ) -> Mapping[str, LayerStatistics]:
        """Statistics of the layers, collected now where they are not yet known."""
        missing = [layer for layer in layers if layer.name not in self.statistics]
        if missing:
            collect_hessians(
                self.network,
                missing,
                self.samples.batches(self.batch_size, exact=not self.network.dynamic_batch),
                dtype=dtype,
                visit=lambda layer, found: self.statistics.__setitem__(layer.name, found),
                progress=lambda share: progress("calibrating", share),
            )
        return self.statistics


def _placed(network: Network, device: str) -> Network:
    network.module.to(device)
    return network


def calibrate(
    model: nn.Module | ExportedProgram,
    calibration: object,
    *,
    device: str = "auto",
    limit: int | None = None,
    preprocessing: Preprocessing | None = None,
    source: str | None = None,
    weights: str | None = None,
    batch_size: int = DEFAULT_BATCH,
    levels: Iterable[Scheme | str] = (),
    seed: int = 0,
) -> CalibratedModel:
    """Capture a model and hold its calibration samples, for one or many calls of `compress`.

    Args:
        model: a module or an exported program; never changed.
        calibration: Samples, arrays, an `(inputs, labels)` pair, a loader, or what `load_samples`
            takes as text.
        device: "cpu", "cuda" or "auto".
        limit: most samples to use, chosen at random with `seed`.
        preprocessing: for uint8 inputs.
        source: the model's name for the manifest.
        weights: the weights' name for the manifest.
        batch_size: samples that run through the network at a time.
        levels: schemes that will be asked for later; layers are then pruned to all of them at once.
        seed: of the choice of samples.

    Raises:
        CalibrationError: the samples are unusable, or of another shape than the model takes.
        ModelError: the model cannot be captured.
    """
    place = str(torch_device(device))
    if limit is not None and limit < 1:
        raise CalibrationError(f"limit {limit}: give 1 or more calibration samples")
    if batch_size < 1:
        raise CalibrationError(f"batch size {batch_size}: give 1 or more")
    samples = as_samples(calibration, preprocessing=preprocessing).take(limit, seed)
    samples = _named(samples, input_names(model))
    example = tuple(torch.from_numpy(array) for array in samples.arrays(0, 2))
    network = capture(model, example)
    names = network.input_names
    if len(names) != len(samples.inputs):
        raise CalibrationError(
            f"the model takes {len(names)} inputs ({', '.join(names)}), '{samples.source}' has "
            f"{len(samples.inputs)} ({', '.join(samples.inputs)})"
        )
    samples = replace(samples, inputs=dict(zip(names, samples.inputs.values(), strict=True)))
    if network.batch_size is not None:
        batch_size = network.batch_size
        if len(samples) < batch_size:
            raise CalibrationError(
                f"the model takes batches of {batch_size} and '{samples.source}' has "
                f"{len(samples)} samples; give {batch_size} or more, or a model of any batch size"
            )
    layers, unsupported = find_layers(network)
    folded, _, _ = fold_batch_norms(network, layers)
    folded = recapture(folded)
    folded_layers, _ = find_layers(folded)
    return CalibratedModel(
        _placed(network, place),
        tuple(layers),
        tuple(unsupported),
        folded,
        tuple(folded_layers),
        samples,
        {},
        source or type(model).__name__,
        weights,
        place,
        batch_size,
        tuple(as_scheme(level) for level in levels),
    )


def _named(samples: Samples, names: Sequence[str]) -> Samples:
    """The samples' inputs in the order of these names, where they are called by them."""
    wanted = names[: len(samples.inputs)]
    if set(wanted) != set(samples.inputs):
        return samples
    return replace(samples, inputs={name: samples.inputs[name] for name in wanted})


def resolve_schemes(
    layers: Sequence[Layer],
    scheme: Scheme,
    *,
    skip: Iterable[str] = (),
    layer_schemes: Mapping[str, Scheme | str] | None = None,
    fallback: Scheme | None = None,
) -> dict[str, Scheme]:
    """Each layer's scheme: the default, less what is skipped, with what is named layer by layer.

    Args:
        layers: the network's layers.
        scheme: what every layer gets.
        skip: names or shell patterns of layers that stay dense; one may stand alone.
        layer_schemes: schemes by name or shell pattern; later ones win.
        fallback: what layers get whose shape the default scheme does not divide.

    Raises:
        LayerError: a name matches nothing.
        SchemeError: a scheme does not divide a layer and there is no fallback.
    """
    chosen = {layer.name: scheme for layer in layers}
    explicit: set[str] = set()
    for pattern in (skip,) if isinstance(skip, str) else skip:
        for layer in select_layers(layers, pattern):
            chosen[layer.name] = DENSE
            explicit.add(layer.name)
    for pattern, text in (layer_schemes or {}).items():
        for layer in select_layers(layers, pattern):
            chosen[layer.name] = as_scheme(text)
            explicit.add(layer.name)
    misfits: list[tuple[Layer, SchemeError]] = []
    for layer in layers:
        try:
            check_scheme(
                chosen[layer.name], rows=layer.rows, cols=layer.cols, channels=layer.channels,
                name=layer.name,
            )  # fmt: skip
        except SchemeError as error:
            if fallback is None or layer.name in explicit:
                misfits.append((layer, error))
            else:
                chosen[layer.name] = fallback
    if misfits:
        names = [layer.name for layer, _ in misfits]
        rest = f" ({len(names)} layers: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''})"
        fix = (
            f"leave such layers out with --skip '{names[0]}', or give them another scheme with "
            f"--fallback {scheme.quantization or 'w8a8'}"
        )
        raise SchemeError(f"{misfits[0][1]}{rest if len(names) > 1 else ''}; {fix}") from misfits[
            0
        ][1]
    return chosen


def compress(
    model: nn.Module | ExportedProgram | CalibratedModel,
    calibration: object = None,
    *,
    scheme: Scheme | str = "w8a8",
    target: Target | str | None = None,
    budget: str | None = None,
    device: str = "auto",
    skip: Iterable[str] = (),
    layer_schemes: Mapping[str, Scheme | str] | None = None,
    fallback: Scheme | str | None = None,
    method: str | None = None,
    damping: float = DEFAULT_DAMPING,
    dtype: str = "float32",
    ranges: RangeMethod | str = RangeMethod.MSE,
    bn_reestimate: bool = True,
    evaluation: object = None,
    preprocessing: Preprocessing | None = None,
    baselines: bool = True,
    batch_size: int = DEFAULT_BATCH,
    seed: int = 0,
    source: str | None = None,
    progress: Stage | None = None,
) -> CompressedModel:
    """Compress a trained model after training, layer by layer (OBC, arXiv 2208.11580).

    Args:
        model: a module, an exported program, or the result of `calibrate`; never changed.
        calibration: a few hundred samples of what the model sees in use (None with `calibrate`'s
            result): arrays, an `(inputs, labels)` pair, a loader, a path or a factory's name.
        scheme: what to do to each layer, e.g. "block4@0.9+w8a8".
        target: where it will run; shapes grids and warnings. None keeps one grid step a row.
        budget: not available yet; give a scheme.
        device: "cpu", "cuda", or "auto" for CUDA where there is one.
        skip: names or shell patterns of layers that stay dense.
        layer_schemes: schemes of single layers, by name or shell pattern.
        fallback: scheme of layers whose shape `scheme` does not divide; an error where None.
        method: "exact_obs" (the default), or the baselines "magnitude" and "rtn".
        damping: relative damping of the Hessians.
        dtype: "float32" or "float64", of the solver.
        ranges: how activation ranges are found.
        bn_reestimate: measure batch-norm statistics anew after compression.
        evaluation: labelled samples; top-1 accuracy before and after goes to the manifest.
        preprocessing: for uint8 samples.
        baselines: make the dense float and dense int8 networks too, for benchmarks.
        batch_size: samples that run through the network at a time.
        seed: of every random choice.
        source: the model's name for the manifest.
        progress: called with what is being done and the share of it.

    Raises:
        CalibrationError: the samples are unusable.
        LayerError: a layer name matches nothing.
        ModelError: the model cannot be captured or is not finite.
        SchemeError: a scheme cannot be read or does not divide a layer.
    """
    if budget is not None:
        raise ObcDeployError(
            f"budget '{budget}': budgets are not available yet; give a scheme instead"
        )
    start = time.monotonic()
    say = progress or _silent
    chosen = as_scheme(scheme)
    goal = as_target(target) if target is not None else None
    try:
        range_method = RangeMethod(ranges)
    except ValueError as error:
        known = ", ".join(m.value for m in RangeMethod)
        raise CalibrationError(f"no range method '{ranges}'; use one of {known}") from error
    if isinstance(model, CalibratedModel):
        if calibration is not None:
            raise CalibrationError(
                f"the model was calibrated on '{model.samples.source}' already; leave the "
                "calibration samples out, or give the model itself"
            )
        calibrated = model
    else:
        if calibration is None:
            raise CalibrationError(
                "compress needs calibration samples: a few hundred typical inputs"
            )
        say("capturing the model", 0.0)
        calibrated = calibrate(
            model, calibration, device=device, preprocessing=preprocessing, source=source,
            batch_size=batch_size, seed=seed,
        )  # fmt: skip
    layers = calibrated.layers
    schemes = resolve_schemes(
        layers, chosen, skip=skip, layer_schemes=layer_schemes,
        fallback=None if fallback is None else as_scheme(fallback),
    )  # fmt: skip
    evaluated = _evaluation(calibrated, evaluation, preprocessing)
    work = _Work(calibrated, schemes, goal, method, damping, dtype, bn_reestimate, say)
    network, forms, reestimated = work.run()
    points = quantization_points(network, calibrated.folded_layers)
    wants_ranges = any(s.quantization and s.quantization.activation_bits for s in schemes.values())
    found: dict[str, ActivationRange] = {}
    if wants_ranges:
        found = _ranges(calibrated, network, points, range_method, say)
    everything_dense = all(s.is_dense for s in schemes.values())
    role: Role = "dense-fp32" if everything_dense else "compressed"
    settings = manifests.Settings(
        method=method or "exact_obs",
        target=goal.name if goal else None,
        device=calibrated.device,
        damping=damping,
        range_method=range_method.value,
        bn_reestimate=bn_reestimate,
        batch_size=calibrated.batch_size,
        seed=seed,
    )
    made = CompressedModel(
        network=network,
        layers=calibrated.folded_layers,
        forms=forms,
        ranges=found,
        samples=calibrated.samples.take(KEPT_SAMPLES),
        manifest=_manifest(
            calibrated, chosen, schemes, forms, found, settings, role, reestimated, goal
        ),
        baselines=dense_baselines(calibrated, target=goal, progress=say) if baselines else (),
    )
    accuracy = None if evaluated is None else _accuracy(calibrated, made, evaluated, say)
    predicted = made.costs.predicted_speedup
    return replace(
        made,
        manifest=made.manifest.model_copy(
            update={
                "accuracy": accuracy,
                "predicted_speedup": None
                if predicted is None
                else {"macs": predicted.macs, "bops": predicted.bops},
                "seconds": round(time.monotonic() - start, 3),
            }
        ),
    )


def dense_baselines(
    calibrated: CalibratedModel, *, target: Target | None = None, progress: Stage | None = None
) -> tuple[CompressedModel, CompressedModel]:
    """The dense float network and the dense 8-bit network (round to nearest): what to beat."""
    say = progress or _silent
    common: dict[str, Any] = {"baselines": False, "progress": say, "method": "rtn"}
    dense = compress(calibrated, scheme=DENSE, **common)
    int8 = compress(calibrated, scheme=W8A8, target=target, **common)
    manifest = int8.manifest.model_copy(update={"role": "dense-int8"})
    return dense, replace(int8, manifest=manifest)


@dataclass(frozen=True)
class _Work:
    """One call of `compress` on a calibrated model: from schemes to folded, compressed layers."""

    calibrated: CalibratedModel
    schemes: Mapping[str, Scheme]
    target: Target | None
    method: str | None
    damping: float
    dtype: str
    bn_reestimate: bool
    say: Stage

    def run(self) -> tuple[Network, dict[str, CompressedLayer[Tensor]], int]:
        """The folded network with compressed weights, the folded forms, and batch norms redone."""
        calibrated = self.calibrated
        active = [layer for layer in calibrated.layers if not self.schemes[layer.name].is_dense]
        statistics: Mapping[str, LayerStatistics] = {}
        if active and needs_hessian(self.method):
            self._announce(active)
            statistics = calibrated.hessians(active, torch.float64, self.say)
        network = calibrated.network.branch()
        forms = self._prune(network, active, statistics)
        shared = self.target is not None and self.target.one_weight_step
        pruned_any = any(self.schemes[layer.name].pattern for layer in active)
        reestimated = self._reestimate(network) if pruned_any else 0
        if shared:
            folded, _, folded_forms = fold_batch_norms(network, list(calibrated.layers), forms)
            # Dense rows scaled as the pruned ones are: through the same, re-estimated batch norms.
            for layer in active:
                _set_weight(network, layer, self._dense(layer))
            dense, _, _ = fold_batch_norms(network, list(calibrated.layers))
            forms = self._quantize(folded, dense, active, folded_forms, statistics, shared=True)
        else:
            forms = self._quantize(
                network, calibrated.network, active, forms, statistics, shared=False
            )
            low_bits = any(self.schemes[layer.name].weight_bits < 8 for layer in active)
            if low_bits:
                reestimated = self._reestimate(network) or reestimated
            folded, _, forms = fold_batch_norms(network, list(calibrated.layers), forms)
        return _into(calibrated.folded, folded, calibrated.folded_layers, forms), forms, reestimated

    def _announce(self, active: Sequence[Layer]) -> None:
        """Say how long the solver will take, where that is worth saying."""
        shapes = []
        for layer in active:
            scheme = self.schemes[layer.name]
            pruned = self._key(layer, Scheme(scheme.pattern, None)) in self.calibrated.pruned
            shapes.append(LayerShape(layer.rows, layer.cols, (scheme,), pruned=pruned))
        if self.calibrated.device != "cpu" or operations(shapes) < _WORTH_ANNOUNCING:
            return
        seconds = estimate_seconds(shapes, SolverSettings(dtype=precision(self.dtype)))
        text = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"
        self.say(f"{len(active)} layers to solve, about {text}", 0.0)

    def _key(self, layer: Layer, scheme: Scheme) -> tuple[str, str, str | None, float, str]:
        return (layer.name, str(scheme), self.method, self.damping, self.dtype)

    def _reestimate(self, network: Network) -> int:
        if not self.bn_reestimate or not find_batch_norms(network.module):
            return 0
        batches = self.calibrated.samples.batches(
            self.calibrated.batch_size, exact=not network.dynamic_batch
        )
        reference = self.calibrated.moments
        if not reference:
            self.say("re-estimating batch norm", 0.0)
            reference.update(batch_norm_moments(self.calibrated.network, batches))
        # A second round starts from the dense statistics again: those are what is aimed at.
        for norm in find_batch_norms(network.module):
            for name in (norm.mean_name, norm.variance_name):
                set_tensor(network.module, name, get_tensor(self.calibrated.network.module, name))
        return reestimate_batch_norms(
            network,
            batches,
            reference=reference,
            progress=lambda share: self.say("re-estimating batch norm", share),
        )

    def _problem(
        self, layer: Layer, weight: Tensor, statistics: Mapping[str, LayerStatistics]
    ) -> LayerProblem:
        known = statistics.get(layer.name)
        return LayerProblem(
            weight=weight,
            hessian=known.hessian if known is not None else None,
            damping=self.damping,
            channels=layer.channels,
            name=layer.name,
        )

    def _pruned(
        self,
        layer: Layer,
        matrix: Tensor,
        pattern: Scheme,
        statistics: Mapping[str, LayerStatistics],
        report: Callable[[float], None],
    ) -> CompressedLayer[Tensor]:
        """The pruned layer, with all other levels of its kind that were announced."""
        known = self.calibrated.pruned
        if self._key(layer, pattern) not in known:
            announced = {Scheme(level.pattern, None) for level in self.calibrated.levels}
            levels = [pattern] + [
                level
                for level in announced
                if level != pattern
                and isinstance(level.pattern, Unstructured | Block4)
                and type(level.pattern) is type(pattern.pattern)
            ]
            solved = solve_levels(
                self._problem(layer, matrix, statistics), levels, method=self.method,
                dtype=self.dtype, device=self.calibrated.device, progress=report,
            )  # fmt: skip
            known.update(
                {self._key(layer, level): f for level, f in zip(levels, solved, strict=True)}
            )
        return known[self._key(layer, pattern)]

    def _codes(
        self,
        problem: LayerProblem,
        form: CompressedLayer[Tensor],
        scheme: Scheme,
        report: Callable[[float], None],
        *,
        shared_step: bool,
    ) -> CompressedLayer[Tensor]:
        def solve(part: LayerProblem, pruned: CompressedLayer[Tensor]) -> CompressedLayer[Tensor]:
            return quantize_pruned(
                part, pruned, scheme, shared_step=shared_step, method=self.method,
                dtype=self.dtype, device=self.calibrated.device, progress=report,
            )  # fmt: skip

        if shared_step or needs_hessian(self.method):
            return solve(problem, form)
        return _by_rows(problem, form, solve)

    def _dense(self, layer: Layer) -> Tensor:
        weight = get_tensor(self.calibrated.network.module, layer.weight_name)
        return weight_to_matrix(layer, weight)

    def _prune(
        self, network: Network, active: Sequence[Layer], statistics: Mapping[str, LayerStatistics]
    ) -> dict[str, CompressedLayer[Tensor]]:
        forms: dict[str, CompressedLayer[Tensor]] = {}
        work = [layer.rows * float(layer.cols) ** 2 for layer in active]
        done = 0.0
        for layer, share in zip(active, work, strict=True):
            scheme = self.schemes[layer.name]
            matrix = weight_to_matrix(layer, get_tensor(network.module, layer.weight_name))
            pattern = Scheme(scheme.pattern, None)

            def report(part: float, done: float = done, share: float = share) -> None:
                self.say("pruning", (done + part * share) / sum(work))

            if pattern.is_dense:
                mask = torch.ones_like(matrix, dtype=torch.bool)
                forms[layer.name] = CompressedLayer(
                    scheme, matrix, mask, None, None, None, 0.0, self.method or "exact_obs"
                )
            else:
                solved = self._pruned(layer, matrix, pattern, statistics, report)
                forms[layer.name] = replace(solved, scheme=scheme)
                _set_weight(network, layer, solved.weight)
            done += share
            report(0.0, done=done, share=0.0)
        return forms

    def _quantize(
        self,
        network: Network,
        dense: Network,
        active: Sequence[Layer],
        forms: Mapping[str, CompressedLayer[Tensor]],
        statistics: Mapping[str, LayerStatistics],
        *,
        shared: bool,
    ) -> dict[str, CompressedLayer[Tensor]]:
        """Grids and codes for every layer that wants them; errors are against `dense`."""
        results = dict(forms)
        work = [layer.rows * float(layer.cols) ** 2 for layer in active]
        done = 0.0
        for layer, share in zip(active, work, strict=True):
            scheme = self.schemes[layer.name]
            if scheme.quantization is not None:
                form = forms[layer.name]
                original = weight_to_matrix(layer, get_tensor(dense.module, layer.weight_name))
                problem = self._problem(layer, original, statistics)

                def report(part: float, done: float = done, share: float = share) -> None:
                    self.say("quantizing", (done + part * share) / sum(work))

                quantized = None
                if shared and scheme.quantization.group is None:
                    one = self._codes(problem, form, scheme, report, shared_step=True)
                    if one.error <= SHARED_STEP_FACTOR * form.error + SHARED_STEP_ERROR:
                        quantized = one
                if quantized is None:
                    quantized = self._codes(problem, form, scheme, report, shared_step=False)
                results[layer.name] = quantized
                _set_weight(network, layer, quantized.weight)
            done += share
            self.say("quantizing", done / sum(work))
        return results


def _by_rows(
    problem: LayerProblem,
    form: CompressedLayer[Tensor],
    solve: Callable[[LayerProblem, CompressedLayer[Tensor]], CompressedLayer[Tensor]],
) -> CompressedLayer[Tensor]:
    """Some rows of a layer at a time: the largest layers of networks take gigabytes in float64."""
    rows, cols = problem.weight.shape
    step = max(1, ROWS_ELEMENTS // cols)
    if step >= rows:
        return solve(problem, form)
    parts = []
    lost = whole = 0.0
    for start in range(0, rows, step):
        some = slice(start, start + step)
        given = problem.weight[some]
        pruned = replace(form, weight=form.weight[some], mask=form.mask[some])
        parts.append(solve(replace(problem, weight=given), pruned))
        lost += float((given - parts[-1].weight).double().square().sum())
        whole += float(given.double().square().sum())

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    return replace(
        parts[0],
        weight=joined("weight"),
        mask=form.mask,
        codes=joined("codes"),
        scale=joined("scale"),
        zero_point=joined("zero_point"),
        error=lost / whole if whole > 0.0 else lost,
    )


def _set_weight(network: Network, layer: Layer, matrix: Tensor) -> None:
    old = get_tensor(network.module, layer.weight_name)
    set_tensor(network.module, layer.weight_name, matrix_to_weight(layer, matrix).to(old))


def _into(
    skeleton: Network,
    folded: Network,
    layers: Sequence[Layer],
    forms: Mapping[str, CompressedLayer[Tensor]],
) -> Network:
    """The folded tensors in a copy of the canonical folded graph, on the CPU."""
    result = skeleton.branch()
    names = [
        name for name, _ in (*result.module.named_parameters(), *result.module.named_buffers())
    ]
    for name in names:
        set_tensor(result.module, name, get_tensor(folded.module, name).detach().cpu())
    for layer in layers:
        if layer.name in forms:
            _set_weight(result, layer, forms[layer.name].weight.cpu())
    return result


def _ranges(
    calibrated: CalibratedModel,
    network: Network,
    points: Sequence[str],
    method: RangeMethod,
    say: Stage,
) -> dict[str, ActivationRange]:
    network.module.to(calibrated.device)
    batches = calibrated.samples.batches(
        calibrated.batch_size, exact=not calibrated.network.dynamic_batch
    )
    found = collect_ranges(
        network, points, batches, method=method,
        progress=lambda share: say("measuring activation ranges", share),
    )  # fmt: skip
    network.module.to("cpu")
    return found


def _layer_record(
    layer: Layer, scheme: Scheme, form: CompressedLayer[Tensor] | None, measured: bool
) -> manifests.LayerRecord:
    density, error, shared = 1.0, None, False
    if form is not None:
        density = float((form.weight != 0).double().mean()) if scheme.pattern else 1.0
        error = form.error if measured else None
        shared = form.scale is not None and bool((form.scale == form.scale[0]).all())
    return manifests.LayerRecord(
        name=layer.name,
        kind=layer.kind.value,
        shape=list(layer.weight_shape),
        scheme=str(scheme),
        macs=layer.macs,
        weights=layer.weights,
        density=density,
        weight_bits=scheme.weight_bits,
        activation_bits=scheme.activation_bits,
        error=error,
        shared_step=shared,
    )


def _manifest(
    calibrated: CalibratedModel,
    scheme: Scheme,
    schemes: Mapping[str, Scheme],
    forms: Mapping[str, CompressedLayer[Tensor]],
    ranges: Mapping[str, ActivationRange],
    settings: manifests.Settings,
    role: Role,
    reestimated: int,
    target: Target | None,
) -> Manifest:
    from obc_deploy.runtimes.fingerprint import take_fingerprint

    samples = calibrated.samples
    machine = take_fingerprint()
    measured = needs_hessian(settings.method)
    notes = [f"{layer.name}: {layer.reason}" for layer in calibrated.unsupported]
    if target is not None and role == "compressed":
        vnni = bool({"avx512_vnni", "avx_vnni"} & set(machine.cpu_features))
        notes += preflight(target, calibrated.layers, schemes, vnni=vnni)
    return Manifest(
        role=role,
        scheme=str(scheme),
        model=manifests.ModelSource(
            source=calibrated.source,
            weights=calibrated.weights,
            parameters=sum(p.numel() for p in calibrated.network.module.parameters()),
            inputs={name: list(array.shape[1:]) for name, array in samples.inputs.items()},
        ),
        calibration=manifests.DataSource(
            source=samples.source,
            samples=len(samples),
            sha256=samples.sha256(),
            preprocessing=None
            if samples.preprocessing is None
            else samples.preprocessing.as_dict(),
        ),
        layers=[
            _layer_record(layer, schemes[layer.name], forms.get(layer.name), measured)
            for layer in calibrated.folded_layers
        ],
        unsupported={layer.name: layer.reason for layer in calibrated.unsupported},
        activations={name: (r.low, r.high) for name, r in ranges.items()},
        settings=settings,
        batch_norms_reestimated=reestimated,
        notes=notes,
        versions=manifests.versions(),
        machine=machine.as_dict(),
        command=manifests.command_line(),
        created=manifests.now(),
    )


def predictions(
    module: nn.Module,
    samples: Samples,
    *,
    batch_size: int = DEFAULT_BATCH,
    device: str = "cpu",
    fixed_batch: bool = False,
) -> Tensor:
    """(n,) int64 classes with the largest first output, on the CPU.

    Args:
        module: computes the outputs.
        samples: its inputs.
        batch_size: samples that run at a time.
        device: where they run.
        fixed_batch: the module takes batches of this very size; the last one is filled up.
    """
    found = []
    module = module.to(device)
    with torch.no_grad():
        for batch in samples.batches(batch_size):
            if fixed_batch:
                batch = tuple(at_batch(tensor, batch_size) for tensor in batch)
            output = module(*(tensor.to(device) for tensor in batch))
            first = output[0] if isinstance(output, tuple | list) else output
            found.append(first.flatten(1).argmax(1).cpu())
    return torch.cat(found)[: len(samples)]


def top1(
    module: nn.Module,
    samples: Samples,
    *,
    batch_size: int = DEFAULT_BATCH,
    device: str = "cpu",
    fixed_batch: bool = False,
) -> float:
    """Share of samples whose largest first output is their label; arguments as in `predictions`.

    Raises:
        CalibrationError: the samples have no labels.
    """
    if samples.labels is None:
        raise CalibrationError(f"'{samples.source}' has no labels to measure accuracy against")
    guesses = predictions(
        module, samples, batch_size=batch_size, device=device, fixed_batch=fixed_batch
    )
    return float((guesses == torch.from_numpy(samples.labels)).double().mean())


def _evaluation(
    calibrated: CalibratedModel, evaluation: object, preprocessing: Preprocessing | None
) -> Samples | None:
    """The evaluation samples, known to be usable before the work and not after."""
    if evaluation is None:
        return None
    own = isinstance(evaluation, Samples) and evaluation.preprocessing is not None
    usual = None if own else calibrated.samples.preprocessing
    samples = as_samples(evaluation, preprocessing=preprocessing or usual)
    if samples.labels is None:
        raise CalibrationError(f"'{samples.source}' has no labels to measure accuracy against")
    samples = _named(samples, calibrated.network.input_names)
    wanted, given = (
        [array.shape[1:] for array in each.arrays(0, 1)] for each in (calibrated.samples, samples)
    )
    if wanted != given:
        raise CalibrationError(
            f"the evaluation samples in '{samples.source}' have shape {_shapes(given)}, the "
            f"calibration samples {_shapes(wanted)}; give samples of one shape"
        )
    return samples


def _shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    return " and ".join("x".join(map(str, shape)) or "()" for shape in shapes)


def _accuracy(
    calibrated: CalibratedModel, made: CompressedModel, samples: Samples, say: Stage
) -> manifests.Accuracy:
    def share(module: nn.Module) -> float:
        return top1(
            module, samples, batch_size=calibrated.batch_size, device=calibrated.device,
            fixed_batch=not calibrated.network.dynamic_batch,
        )  # fmt: skip

    say("evaluating the dense model", 0.0)
    dense = share(calibrated.network.module)
    say("evaluating the compressed model", 0.5)
    compressed = share(made.module(made.manifest.settings.target))
    say("evaluating the compressed model", 1.0)
    return manifests.Accuracy(
        dense=dense, compressed=compressed, samples=len(samples), source=samples.source
    )
