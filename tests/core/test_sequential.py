"""Sequential mode against naive sums and float64 least squares, and through `compress`."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from tiny_networks import Depthwise, Plain, Residual, SharedConvolution, Upsampling, build, samples
from torch import nn
from torch.nn import functional

from obc_deploy.calibrated import calibrate
from obc_deploy.calibration import collect_hessians
from obc_deploy.capture import capture, get_tensor, set_tensor
from obc_deploy.compression import compress
from obc_deploy.corrections import batch_norm_moments, reestimate_batch_norms
from obc_deploy.data import Samples
from obc_deploy.errors import CalibrationError, ObcDeployError
from obc_deploy.folding import find_batch_norms
from obc_deploy.layers import find_layers, input_vectors, weight_to_matrix
from obc_deploy.paired_networks import PairedNetworks
from obc_deploy.sequential import corrected_weight, sequential_statistics
from obc_deploy.solvers import solve_problem
from obc_deploy.solvers.contract import LayerProblem

NETWORKS = [Plain, Residual, Depthwise, SharedConvolution, Upsampling]


@cache
def captured(kind):
    return capture(build(kind), (torch.from_numpy(samples(kind, 2)),))


@cache
def calibrated_model(kind):
    return calibrate(build(kind), samples(kind, 64), batch_size=32)


def pair_of(kind, count=24, size=10, *, noise=0.3, memory=1 << 30):
    """A network, a branch of it with other weights from its first layer on, and both paired."""
    x = samples(kind, count)
    dense = captured(kind)
    layers, _ = find_layers(dense)
    other = dense.branch()
    torch.manual_seed(0)  # here: the network may have been captured for an earlier test
    for layer in layers[:-1]:
        weight = get_tensor(dense.module, layer.weight_name)
        new = weight + noise * weight.std() * torch.randn_like(weight)
        set_tensor(other.module, layer.weight_name, new)
    data = Samples({"x": x})
    pair = PairedNetworks(dense, other, data.batches(size), memory=memory)
    return dense, other, layers, data, pair


def seen_inputs(network, layer, data):
    """All inputs of a layer's calls as float64 vectors, (groups, cols, n), one sample at a time."""
    nodes = {node.name: node for node in network.module.graph.nodes}
    vectors = []
    for site in layer.call_sites:
        interpreter = torch.fx.Interpreter(network.module, garbage_collect_values=False)
        with torch.no_grad():
            interpreter.run(torch.from_numpy(data.inputs["x"]))
        vectors += input_vectors(layer, interpreter.env[nodes[site].args[0]])
    return torch.cat(vectors, 2).double()


def lost(weight, changed, x, found):
    """2/n · ‖W X - Ŵ X̂‖² in float64, each group of rows on its own inputs."""
    groups = x.shape[0]
    wanted = weight.double().reshape(groups, -1, x.shape[1]) @ x
    given = changed.double().reshape(groups, -1, x.shape[1]) @ found
    return float(2 / x.shape[2] * (wanted - given).square().sum())


@pytest.mark.parametrize("kind", NETWORKS)
def test_statistics_are_the_mean_products_of_both_networks_inputs(kind):
    dense, other, layers, data, pair = pair_of(kind)
    for layer in layers:
        found = sequential_statistics(pair, layer)
        x, seen = (seen_inputs(network, layer, data) for network in (dense, other))
        hessian = 2 / x.shape[2] * seen @ seen.mT
        drift = 2 / x.shape[2] * (x - seen) @ seen.mT
        scale = float(hessian.abs().max())
        assert found.inputs.vectors == x.shape[2]
        for mine, naive in ((found.inputs.hessian, hessian), (found.drift, drift)):
            torch.testing.assert_close(
                mine.reshape(naive.shape), naive, rtol=1e-5, atol=1e-5 * scale
            )


@pytest.mark.parametrize("kind", [Plain, Residual, Depthwise])
def test_the_corrected_weight_is_the_least_squares_fit(kind):
    dense, other, layers, data, pair = pair_of(kind, count=64)
    for layer in layers[1:]:
        found = sequential_statistics(pair, layer)
        weight = weight_to_matrix(layer, get_tensor(dense.module, layer.weight_name))
        x, seen = (seen_inputs(network, layer, data) for network in (dense, other))
        best = torch.cat(
            [
                torch.linalg.lstsq(seen[group].T, (rows @ x[group]).T).solution.T
                for group, rows in enumerate(weight.double().reshape(x.shape[0], -1, x.shape[1]))
            ]
        )
        least = lost(weight, best, x, seen)
        plain = lost(weight, weight, x, seen)
        assert plain > 1.05 * least
        fit = corrected_weight(weight, found, damping=1e-5, strength=1.0)
        assert lost(weight, fit, x, seen) <= least + 1e-2 * (plain - least)
        # Damped and half-way steps lie between.
        for damping, strength in ((0.01, 1.0), (0.01, 0.5), (1.0, 1.0)):
            some = corrected_weight(weight, found, damping=damping, strength=strength)
            assert least <= lost(weight, some, x, seen) * (1 + 1e-9) < plain
        assert corrected_weight(weight, found, strength=0.0) is weight


def test_pruning_the_corrected_weight_loses_less():
    """The solver on (W*, H) against the solver on (W, H of the dense inputs)."""
    dense, other, layers, data, pair = pair_of(Residual, count=64)
    layer = layers[2]
    found = sequential_statistics(pair, layer)
    weight = weight_to_matrix(layer, get_tensor(dense.module, layer.weight_name))
    x, seen = (seen_inputs(network, layer, data) for network in (dense, other))
    own = (2 / x.shape[2] * x @ x.mT)[0]
    channels = layer.channels
    independent = solve_problem(LayerProblem(weight, own, 0.01, channels), "2:4", dtype="float64")
    target = corrected_weight(weight, found, strength=1.0)
    sequential = solve_problem(
        LayerProblem(target, found.inputs.hessian, 0.01, channels), "2:4", dtype="float64"
    )
    assert lost(weight, sequential.weight, x, seen) < lost(weight, independent.weight, x, seen)


@pytest.mark.parametrize("kind", NETWORKS)
def test_equal_inputs_give_the_independent_problem_to_the_bit(kind):
    x = samples(kind, 24)
    network = captured(kind)
    layers, _ = find_layers(network)
    batches = Samples({"x": x}).batches(10)
    usual = {}
    collect_hessians(
        network, layers, batches, visit=lambda layer, seen: usual.__setitem__(layer.name, seen)
    )
    pair = PairedNetworks(network, network.branch(), batches)
    for layer in layers:
        pair.reestimate(layer)
        found = sequential_statistics(pair, layer)
        assert torch.equal(found.inputs.hessian, usual[layer.name].hessian)
        assert not found.drift.any()
        weight = weight_to_matrix(layer, get_tensor(network.module, layer.weight_name))
        assert torch.equal(corrected_weight(weight, found), weight)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("memory", [0, 40_000])
def test_little_memory_changes_nothing(kind, memory):
    _, _, layers, _, roomy = pair_of(kind)
    found = [sequential_statistics(roomy, layer) for layer in layers]
    *_, tight = pair_of(kind, memory=memory)
    for layer, wanted in zip(layers, found, strict=True):
        again = sequential_statistics(tight, layer)
        assert torch.equal(again.inputs.hessian, wanted.inputs.hessian)
        assert torch.equal(again.drift, wanted.drift)


def test_weights_may_change_while_the_networks_wait():
    x = samples(Residual, 20)
    dense = captured(Residual)
    layers, _ = find_layers(dense)
    other = dense.branch()
    data = Samples({"x": x})
    pair = PairedNetworks(dense, other, data.batches(7))
    for layer in layers:
        found = sequential_statistics(pair, layer)
        seen = seen_inputs(other, layer, data)
        torch.testing.assert_close(
            found.inputs.hessian, (2 / seen.shape[2] * seen @ seen.mT)[0], rtol=1e-5, atol=1e-5
        )
        weight = get_tensor(other.module, layer.weight_name)
        set_tensor(other.module, layer.weight_name, 0.5 * weight)


@pytest.mark.parametrize("kind", [Plain, Depthwise])
def test_batch_norms_on_the_way_get_the_dense_ones_statistics(kind):
    dense, other, _, data, pair = pair_of(kind, count=32, size=32)
    batches = data.batches(32)
    reference = batch_norm_moments(dense, batches)
    assert pair.reestimate() == 2
    # In one batch, the pass that normalises batch by batch sees the same.
    usual = other.branch()
    for norm in find_batch_norms(dense.module):
        for name in (norm.mean_name, norm.variance_name):
            set_tensor(usual.module, name, get_tensor(dense.module, name))
    reestimate_batch_norms(usual, batches, reference=reference)
    for norm in find_batch_norms(dense.module):
        for name in (norm.mean_name, norm.variance_name):
            torch.testing.assert_close(
                get_tensor(other.module, name), get_tensor(usual.module, name),
                rtol=1e-3, atol=1e-4,
            )  # fmt: skip
            assert not torch.equal(get_tensor(other.module, name), get_tensor(dense.module, name))


def test_networks_do_not_go_back():
    _, _, layers, _, pair = pair_of(Residual)
    sequential_statistics(pair, layers[2])
    with pytest.raises(CalibrationError, match="layer 'first' lies behind"):
        sequential_statistics(pair, layers[0])


class Bare(nn.Module):
    """Three linear layers without batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(12, 16)
        self.two = nn.Linear(16, 16)
        self.three = nn.Linear(16, 4)

    def forward(self, x):
        return self.three(functional.relu(self.two(functional.relu(self.one(x)))))


def same_layers(one, other):
    """The same masks and codes; rows may be scaled by batch norms measured at another time."""
    assert one.forms.keys() == other.forms.keys()
    for name, form in one.forms.items():
        for part in ("mask", "codes", "zero_point"):
            first, second = getattr(form, part), getattr(other.forms[name], part)
            assert (first is None) == (second is None)
            assert first is None or torch.equal(first, second), (name, part)
        torch.testing.assert_close(other.forms[name].weight, form.weight, rtol=1e-2, atol=1e-6)
        assert other.forms[name].error == form.error


@pytest.mark.parametrize("target", [None, "deepsparse"])
@pytest.mark.parametrize("scheme", ["block4@0.5", "2:4+w8a8", "w3", "unstructured@0.6+w4"])
def test_one_compressed_layer_is_as_in_independent_mode(scheme, target):
    """The only compressed layer sees the dense inputs: batch norms before it are untouched."""
    calibrated = calibrated_model(Plain)
    options = {
        "scheme": "dense", "layer_schemes": {"conv2": scheme}, "target": target, "baselines": False
    }  # fmt: skip
    independent = compress(calibrated, **options)
    sequential = compress(calibrated, **options, sequential=True)
    same_layers(independent, sequential)
    assert sequential.manifest.settings.sequential
    assert not independent.manifest.settings.sequential
    state = sequential.network.module.state_dict()
    for name, tensor in independent.network.module.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", [Plain, Depthwise, Residual])
@pytest.mark.parametrize("target", [None, "deepsparse"])
def test_patterns_and_grids_hold_and_what_was_pruned_before_stays(kind, target, tmp_path):
    from obc_deploy.run_directory import load_run

    calibrated = calibrated_model(kind)
    options = {"fallback": "w8a8", "target": target, "baselines": False}
    independent = compress(calibrated, scheme="2:4+w8a8", **options)
    kept = dict(calibrated.pruned)
    made = compress(calibrated, scheme="2:4+w8a8", **options, sequential=True)
    assert calibrated.pruned == kept
    differing = 0
    for name, form in made.forms.items():
        if form.scheme.pattern is not None:
            # Input channels run fastest in a row.
            assert ((form.weight == 0).reshape(-1, 4).sum(1) >= 2).all()
        offset = form.codes.float() - form.zero_point.float()
        assert torch.equal(form.weight, offset * form.scale)
        differing += not torch.equal(form.weight, independent.forms[name].weight)
    assert differing
    made.save(tmp_path / "run")
    again = load_run(tmp_path / "run")
    assert again.manifest.settings.sequential
    x = torch.from_numpy(samples(kind, 8, seed=1))
    with torch.no_grad():
        assert torch.equal(again.network.module(x), made.network.module(x))


def test_outputs_come_nearer_to_the_dense_ones_on_the_samples():
    torch.manual_seed(0)
    model = Bare().eval()
    # Correlated inputs: otherwise there is nothing that one weight could do for another.
    x = np.random.default_rng(0).standard_normal((512, 4)) @ np.random.default_rng(1).normal(
        size=(4, 12)
    )
    x = (x + 0.3 * np.random.default_rng(2).standard_normal(x.shape)).astype(np.float32)
    calibrated = calibrate(model, x, batch_size=128)
    with torch.no_grad():
        wanted = model(torch.from_numpy(x))
        apart = []
        for sequential in (False, True):
            made = compress(
                calibrated, scheme="unstructured@0.6", bn_reestimate=False, baselines=False,
                dtype="float64", sequential=sequential,
            )  # fmt: skip
            apart.append(float((made.network.module(torch.from_numpy(x)) - wanted).square().sum()))
    assert apart[1] < 0.95 * apart[0]


def test_dense_networks_stay_dense():
    calibrated = calibrated_model(Plain)
    made = compress(calibrated, scheme="dense", sequential=True, baselines=False)
    assert not made.forms
    plain = compress(calibrated, scheme="dense", baselines=False)
    state = made.network.module.state_dict()
    for name, tensor in plain.network.module.state_dict().items():
        assert torch.equal(state[name], tensor)


@pytest.mark.parametrize("method", ["magnitude", "rtn"])
def test_methods_without_hessians_have_no_sequential_mode(method):
    calibrated = calibrated_model(Plain)
    with pytest.raises(ObcDeployError, match=f"method '{method}'") as error:
        compress(calibrated, scheme="w4", method=method, sequential=True, baselines=False)
    assert "\n" not in str(error.value)
