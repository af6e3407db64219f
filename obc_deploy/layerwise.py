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
from obc_deploy.errors import ObcDeployError
from obc_deploy.folding import find_batch_norms, fold_batch_norms
from obc_deploy.layers import Layer, matrix_to_weight, weight_to_matrix
from obc_deploy.paired_networks import PairedNetworks
from obc_deploy.schemes import Block4, Scheme, Unstructured
from obc_deploy.sequential import corrected_weight, sequential_statistics
from obc_deploy.solvers import needs_hessian, solve_levels
from obc_deploy.solvers.contract import CompressedLayer, LayerProblem
from obc_deploy.solvers.estimate import LayerShape, estimate_seconds, operations
from obc_deploy.solvers.exact_obs import pattern_kind
from obc_deploy.solvers.settings import FINE_BITS, SolverSettings, precision
from obc_deploy.solvers.staged import quantize_pruned
from obc_deploy.statistics_correction import correct_outputs
from obc_deploy.targets import Target

_WORTH_ANNOUNCING = 1e11
"""Operations of the solver, a few seconds of work, from which its time is estimated beforehand."""
ROWS_ELEMENTS = 1 << 20
"""Weights that a baseline works on at a time; it looks at each row of a layer alone."""
SHARED_STEP_FACTOR = 6.0
SHARED_STEP_ERROR = 2e-3
"""One grid step for a whole layer is kept where the error is at most this factor times the error
that pruning left, plus this much; else each row gets a step of its own. A step of its own costs a
target that wants one step a layer its fastest kernels: 1.2 to 1.4 times the latency of a CIFAR-10
ResNet-20 with 2 to 5 such layers. Their errors with one step were 1.3 to 5 times as large, and the
network lost 0.0 to 0.16 points by it, at 72 to 90 % zeros."""


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
    sequential: bool = False

    def run(self) -> tuple[Network, dict[str, CompressedLayer[Tensor]], int]:
        """The folded network with compressed weights, the folded forms, and batch norms redone."""
        calibrated = self.calibrated
        active = [layer for layer in calibrated.layers if not self.schemes[layer.name].is_dense]
        statistics: Mapping[str, LayerStatistics] = {}
        dense = calibrated.network.branch()
        network = calibrated.network.branch()
        shared = self.target is not None and self.target.one_weight_step
        if active and needs_hessian(self.method):
            self._announce(active, shared_step=shared)
        if self.sequential:
            forms, statistics = self._in_order(network, dense, active, quantize=not shared)
        else:
            if active and needs_hessian(self.method):
                statistics = calibrated.hessians(active, torch.float64, self.say)
            forms = self._prune(network, active, statistics)
        pruned_any = any(self.schemes[layer.name].pattern for layer in active)
        low_bits = any(self.schemes[layer.name].weight_bits < 8 for layer in active)
        reestimated = self._reestimate(network) if pruned_any else 0
        if shared:
            if pruned_any:
                # Now: once rows share a grid step, none can be scaled alone.
                corrected = self._correct_outputs(network, forms)
                _scale_rows(dense, active, forms, corrected)
                forms = corrected
            folded, _, folded_forms = fold_batch_norms(network, list(calibrated.layers), forms)
            # Dense rows scaled as the pruned ones are: through the same, re-estimated batch norms.
            for layer in active:
                set_tensor(
                    network.module, layer.weight_name, get_tensor(dense.module, layer.weight_name)
                )
            dense, _, _ = fold_batch_norms(network, list(calibrated.layers))
            forms = self._quantize(folded, dense, active, folded_forms, statistics, shared=True)
        else:
            if not self.sequential:
                forms = self._quantize(network, dense, active, forms, statistics, shared=False)
            if low_bits:
                reestimated = self._reestimate(network) or reestimated
            if pruned_any or low_bits:
                forms = self._correct_outputs(network, forms)
            folded, _, forms = fold_batch_norms(network, list(calibrated.layers), forms)
        return (
            in_folded_graph(calibrated.folded, folded, calibrated.folded_layers, forms),
            forms,
            reestimated,
        )

    def _announce(self, active: Sequence[Layer], *, shared_step: bool) -> None:
        """Say how long the solver will take, where that is worth saying."""
        shapes = []
        for layer in active:
            scheme = self.schemes[layer.name]
            pattern = Scheme(scheme.pattern, None)
            pruned = self._key(layer, pattern) in self.calibrated.pruned
            if scheme.weight_bits >= FINE_BITS and (pattern.is_dense or not shared_step):
                # Takes next to no time (`ordered_obq`), or rounding will do (`rounding_suffices`),
                # which in one step for all rows it rarely does.
                if pruned or pattern.is_dense:
                    continue
                scheme = pattern
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
        batches = self.calibrated.batches()
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

    def _correct_outputs(
        self, network: Network, forms: Mapping[str, CompressedLayer[Tensor]]
    ) -> dict[str, CompressedLayer[Tensor]]:
        """What re-estimated batch norms do for their layers, for those that have none."""
        if not self.bn_reestimate:
            return dict(forms)
        calibrated = self.calibrated
        return correct_outputs(
            calibrated.network, network, calibrated.layers, forms, calibrated.batches(),
            progress=lambda share: self.say("correcting output statistics", share),
        )  # fmt: skip

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
                and pattern.pattern is not None
                and pattern_kind(level.pattern) == pattern_kind(pattern.pattern)
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

    def _in_order(
        self, network: Network, dense: Network, active: Sequence[Layer], *, quantize: bool
    ) -> tuple[dict[str, CompressedLayer[Tensor]], dict[str, LayerStatistics]]:
        """Layer after layer on what the compressed network gives it, corrected toward the dense.

        `network` gets the compressed weights, `dense` the corrected ones that they stand for.
        """
        calibrated = self.calibrated
        if active and not needs_hessian(self.method):
            raise ObcDeployError(
                f"sequential mode corrects layers by their Hessians, which method '{self.method}' "
                "does not read; use method 'exact_obs', or leave sequential mode out"
            )
        pair = PairedNetworks(calibrated.network, network, calibrated.batches())
        forms: dict[str, CompressedLayer[Tensor]] = {}
        statistics: dict[str, LayerStatistics] = {}
        work = [layer.rows * float(layer.cols) ** 2 for layer in active]
        done = 0.0
        for layer, share in zip(active, work, strict=True):

            def report(part: float, done: float = done, share: float = share) -> None:
                self.say("compressing layer after layer", (done + part * share) / sum(work))

            report(0.0)
            if self.bn_reestimate:
                pair.reestimate(layer)
            found = sequential_statistics(pair, layer)
            matrix = weight_to_matrix(layer, get_tensor(dense.module, layer.weight_name))
            matrix = corrected_weight(matrix, found, damping=self.damping, name=layer.name)
            set_matrix(dense, layer, matrix)
            statistics[layer.name] = found.inputs.on_cpu()
            forms[layer.name] = self._whole(layer, matrix, found.inputs, report, quantize=quantize)
            set_matrix(network, layer, forms[layer.name].weight)
            done += share
        return forms, statistics

    def _whole(
        self,
        layer: Layer,
        matrix: Tensor,
        statistics: LayerStatistics,
        report: Callable[[float], None],
        *,
        quantize: bool,
    ) -> CompressedLayer[Tensor]:
        """One layer's pattern, and its grid where that is wanted now."""
        scheme = self.schemes[layer.name]
        problem = self._problem(layer, matrix, {layer.name: statistics})
        pattern = Scheme(scheme.pattern, None)
        if pattern.is_dense:
            form = _unpruned(scheme, matrix, self.method)
        else:
            solved = solve_levels(
                problem, [pattern], method=self.method, dtype=self.dtype,
                device=self.calibrated.device, progress=report,
            )  # fmt: skip
            form = replace(solved[0], scheme=scheme)
        if quantize and scheme.quantization is not None:
            form = self._codes(problem, form, scheme, report, shared_step=False)
        return form

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
                forms[layer.name] = _unpruned(scheme, matrix, self.method)
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


def _scale_rows(
    network: Network,
    layers: Sequence[Layer],
    before: Mapping[str, CompressedLayer[Tensor]],
    after: Mapping[str, CompressedLayer[Tensor]],
) -> None:
    """Scale a network's rows as those of compressed layers were, in place."""
    for layer in layers:
        if after[layer.name] is before[layer.name]:
            continue
        old, new = (forms[layer.name].weight.norm(dim=1) for forms in (before, after))
        ratio = torch.where(old > 0, new / old.clamp(min=torch.finfo(old.dtype).tiny), 1.0)
        matrix = weight_to_matrix(layer, get_tensor(network.module, layer.weight_name))
        set_matrix(network, layer, matrix * ratio[:, None])


def _unpruned(scheme: Scheme, matrix: Tensor, method: str | None) -> CompressedLayer[Tensor]:
    mask = torch.ones_like(matrix, dtype=torch.bool)
    return CompressedLayer(scheme, matrix, mask, None, None, None, 0.0, method or "exact_obs")


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
