"""Compression: a model and calibration samples become a compressed model, layer by layer.

    capture -> Hessians -> patterns (ExactOBS) -> batch-norm statistics -> grids (OBQ) -> folding
            -> activation ranges -> CompressedModel

Where the target wants one grid step a layer, folding comes before the grids; else after them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, fx, nn

from obc_deploy import manifest as manifests
from obc_deploy.accuracy import evaluation_samples, measure_accuracy
from obc_deploy.activations import ActivationRange, RangeMethod, collect_ranges
from obc_deploy.assignment import fixed_schemes, resolve_schemes
from obc_deploy.calibrated import DEFAULT_BATCH, CalibratedModel, Stage, calibrate, silent
from obc_deploy.capture import Network
from obc_deploy.costs import Costs, LayerCost, total
from obc_deploy.data import Preprocessing, Samples
from obc_deploy.errors import CalibrationError
from obc_deploy.layers import Layer
from obc_deploy.layerwise import Layerwise
from obc_deploy.manifest import Manifest
from obc_deploy.planning import FoundPlan, PlanSettings, planner_for
from obc_deploy.quantized_network import QuantizedNetwork, quantization_points, quantized_network
from obc_deploy.schemes import DENSE, Quantization, Scheme, as_scheme
from obc_deploy.search import Budgets, as_budgets
from obc_deploy.solvers import needs_hessian
from obc_deploy.solvers.contract import DEFAULT_DAMPING, CompressedLayer
from obc_deploy.targets import Placement, Target, as_target, preflight

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from obc_deploy.artifacts import Artifact

KEPT_SAMPLES = 32
"""Calibration samples that stay with a compressed model, to check exports on."""

Role = Literal["dense-fp32", "dense-int8", "compressed"]

W8A8 = Scheme(None, Quantization(8, activation_bits=8))


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


def compress(
    model: nn.Module | ExportedProgram | CalibratedModel,
    calibration: object = None,
    *,
    scheme: Scheme | str = "w8a8",
    target: Target | str | None = None,
    budget: Budgets | None = None,
    plan: FoundPlan | None = None,
    plan_settings: PlanSettings | None = None,
    device: str = "auto",
    device_memory: int | str | None = None,
    skip: Iterable[str] = (),
    layer_schemes: Mapping[str, Scheme | str] | None = None,
    fallback: Scheme | str | None = None,
    method: str | None = None,
    damping: float = DEFAULT_DAMPING,
    dtype: str = "float32",
    ranges: RangeMethod | str = RangeMethod.MSE,
    bn_reestimate: bool = True,
    sequential: bool = False,
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
        budget: what the network may cost, such as "latency:4x" or "macs:3x,size:6x": each layer's
            scheme is then searched for, in place of `scheme`.
        plan: schemes that a planner found for `calibrate`'s result, in place of `scheme`.
        plan_settings: how a budget's plan is searched for.
        device: "cpu", "cuda", or "auto" for CUDA where there is one.
        device_memory: most memory to take on a CUDA device, such as "8GiB"; only with a model that
            is not calibrated yet (see `calibrate`).
        skip: names or shell patterns of layers that stay dense.
        layer_schemes: schemes of single layers, by name or shell pattern.
        fallback: scheme of layers whose shape `scheme` does not divide; an error where None.
        method: "exact_obs" (the default), or the baselines "magnitude" and "rtn".
        damping: relative damping of the Hessians.
        dtype: "float32" or "float64", of the solver.
        ranges: how activation ranges are found.
        bn_reestimate: measure batch-norm statistics anew after compression, and give layers without
            batch norm their dense output means and variances.
        sequential: calibrate each layer on what the already compressed ones before it give, and
            correct it toward the dense outputs.
        evaluation: labelled samples; top-1 accuracy before and after goes to the manifest.
        preprocessing: for uint8 samples.
        baselines: make the dense float and dense int8 networks too, for benchmarks.
        batch_size: samples that run through the network at a time.
        seed: of every random choice.
        source: the model's name for the manifest.
        progress: called with what is being done and the share of it.

    Raises:
        BudgetError: no plan keeps the budget; the message says what could be reached.
        CalibrationError: the samples are unusable.
        DeviceMemoryError: work that does not fit the device, or a limit that cannot be kept.
        LayerError: a layer name matches nothing.
        ModelError: the model cannot be captured or is not finite.
        SchemeError: a scheme cannot be read or does not divide a layer.
    """
    start = time.monotonic()
    say = progress or silent
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
            model, calibration, device=device, device_memory=device_memory,
            preprocessing=preprocessing, source=source, batch_size=batch_size, seed=seed,
        )  # fmt: skip
    evaluated = evaluation_samples(calibrated, evaluation, preprocessing)
    if budget is not None:
        wanted = replace(
            plan_settings or PlanSettings(seed=seed), method=method, damping=damping, dtype=dtype,
            fixed=fixed_schemes(calibrated.layers, skip=skip, layer_schemes=layer_schemes),
        )  # fmt: skip
        planner = planner_for(
            calibrated, [one.metric for one in as_budgets(budget)], wanted, target=goal,
            progress=say,
        )  # fmt: skip
        plan = planner.find(budget, progress=say)
        planner.hand_over(plan.plan.schemes)
    if plan is not None:
        skip, layer_schemes = (), plan.plan.schemes
    schemes = resolve_schemes(
        calibrated.layers, chosen, skip=skip, layer_schemes=layer_schemes,
        fallback=None if fallback is None else as_scheme(fallback),
    )  # fmt: skip
    work = Layerwise(
        calibrated, schemes, goal, method, damping, dtype, bn_reestimate, say, sequential
    )
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
        sequential=sequential,
    )
    made = CompressedModel(
        network=network,
        layers=calibrated.folded_layers,
        forms=forms,
        ranges=found,
        samples=calibrated.samples.take(KEPT_SAMPLES),
        manifest=_manifest(
            calibrated,
            str(chosen) if plan is None else plan.text,
            schemes,
            forms,
            found,
            settings,
            role,
            reestimated,
            goal,
        ),
        baselines=dense_baselines(calibrated, target=goal, progress=say) if baselines else (),
    )
    accuracy = None if evaluated is None else measure_accuracy(calibrated, made, evaluated, say)
    predicted = made.costs.predicted_speedup
    return replace(
        made,
        manifest=made.manifest.model_copy(
            update={
                "accuracy": accuracy,
                "plan": None if plan is None else plan.record(),
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
    say = progress or silent
    common: dict[str, Any] = {"baselines": False, "progress": say, "method": "rtn"}
    dense = compress(calibrated, scheme=DENSE, **common)
    int8 = compress(calibrated, scheme=W8A8, target=target, **common)
    manifest = int8.manifest.model_copy(update={"role": "dense-int8"})
    return dense, replace(int8, manifest=manifest)


def _ranges(
    calibrated: CalibratedModel,
    network: Network,
    points: Sequence[str],
    method: RangeMethod,
    say: Stage,
) -> dict[str, ActivationRange]:
    network.module.to(calibrated.device)
    found = collect_ranges(
        network, points, calibrated.batches(), method=method,
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
    scheme: str,
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
        notes += preflight(target, calibrated.layers, schemes, cpu_features=machine.cpu_features)
    return Manifest(
        role=role,
        scheme=scheme,
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
            passes=calibrated.passes,
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
