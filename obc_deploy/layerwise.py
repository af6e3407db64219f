"""Compressing layer by layer: patterns, batch-norm statistics, grids, in the order a target wants.

Where the target wants one grid step a layer, batch norms are folded before the grids; else after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from obc_deploy.calibrated import CalibratedModel, Stage
from obc_deploy.calibration import LayerStatistics
from obc_deploy.capture import Network, get_tensor, set_tensor
from obc_deploy.corrections import batch_norm_moments, reestimate_batch_norms
from obc_deploy.folding import find_batch_norms, fold_batch_norms
from obc_deploy.layers import Layer, matrix_to_weight, weight_to_matrix
from obc_deploy.schemes import Block4, Scheme, Unstructured
from obc_deploy.solvers import needs_hessian, solve_levels
from obc_deploy.solvers.contract import CompressedLayer, LayerProblem
from obc_deploy.solvers.estimate import LayerShape, estimate_seconds, operations
from obc_deploy.solvers.settings import SolverSettings, precision
from obc_deploy.solvers.staged import quantize_pruned
from obc_deploy.targets import Target

_WORTH_ANNOUNCING = 1e11
"""Operations of the solver, a few seconds of work, from which its time is estimated beforehand."""
ROWS_ELEMENTS = 1 << 20
"""Weights that a baseline works on at a time; it looks at each row of a layer alone."""
SHARED_STEP_FACTOR = 1.25
SHARED_STEP_ERROR = 2e-3
"""One grid step for a whole layer is kept where the error is at most this factor times the error
that pruning left, plus this much; else each row gets a step of its own."""


@dataclass(frozen=True)
class Layerwise:
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
                set_matrix(network, layer, self._dense(layer))
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
        return (
            in_folded_graph(calibrated.folded, folded, calibrated.folded_layers, forms),
            forms,
            reestimated,
        )

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
                set_matrix(network, layer, solved.weight)
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
                set_matrix(network, layer, quantized.weight)
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


def set_matrix(network: Network, layer: Layer, matrix: Tensor) -> None:
    """Give a layer of the network its weights from a (rows, cols) matrix, in place."""
    old = get_tensor(network.module, layer.weight_name)
    set_tensor(network.module, layer.weight_name, matrix_to_weight(layer, matrix).to(old))


def in_folded_graph(
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
            set_matrix(result, layer, forms[layer.name].weight.cpu())
    return result
