"""A model and samples become compressed layers, their records and their baselines."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from tiny_networks import Depthwise, FixedBatch, Plain, Twins, build, samples
from torch import nn

from obc_deploy import layerwise
from obc_deploy.accuracy import predictions, top1
from obc_deploy.calibrated import calibrate
from obc_deploy.capture import Watcher, get_tensor
from obc_deploy.compression import compress, dense_baselines
from obc_deploy.data import Preprocessing, Samples
from obc_deploy.errors import (
    BudgetError,
    CalibrationError,
    LayerError,
    ModelError,
    ProblemError,
    SchemeError,
    TargetError,
)
from obc_deploy.layers import weight_to_matrix

X = samples(Plain, 64)
LABELS = np.arange(64) % 5


@pytest.fixture(scope="module")
def model():
    return build(Plain)


@pytest.fixture(scope="module")
def calibrated(model):
    return calibrate(model, (X, LABELS), batch_size=32)


def plainly(*what, **options):
    """Compression without what the tests do not look at."""
    return compress(*what, **{"baselines": False, "method": "rtn", **options})


def outputs(module, x=X):
    with torch.no_grad():
        return module(torch.from_numpy(x))


def same_bits(one, other):
    assert one.forms.keys() == other.forms.keys()
    for name, form in one.forms.items():
        for part in ("weight", "mask", "codes", "scale", "zero_point"):
            first, second = getattr(form, part), getattr(other.forms[name], part)
            assert (first is None) == (second is None)
            assert first is None or torch.equal(first, second), (name, part)
        assert form.error == other.forms[name].error
    state = other.network.module.state_dict()
    for name, tensor in one.network.module.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert one.ranges == other.ranges


def check_pattern(scheme, weight):
    """Whether a convolution's weight (rows, channels, height, width) has the scheme's zeros."""
    zero = (weight == 0).movedim(1, -1)
    if "2:4" in scheme:
        assert (zero.reshape(-1, 4).sum(1) >= 2).all()
    elif "block4" in scheme:
        blocks = zero.reshape(-1, 4).sum(1)
        assert (blocks == 4).double().mean() >= 0.5
    elif "unstructured" in scheme:
        assert zero.double().mean() >= 0.5


@pytest.mark.parametrize("method", ["exact_obs", "magnitude"])
@pytest.mark.parametrize(
    "scheme",
    ["unstructured@0.5", "block4@0.5+w4", "2:4+w8a8", "w3-asym", "w4g4", "unstructured@0.5+w8a8"],
)
def test_layers_are_what_their_scheme_says(calibrated, scheme, method):
    made = compress(calibrated, scheme=scheme, method=method, baselines=False)
    assert made.scheme == scheme
    assert made.role == "compressed"
    assert [record.name for record in made.manifest.layers] == ["conv1", "conv2", "fc"]
    for layer, record in zip(made.layers, made.manifest.layers, strict=True):
        form = made.forms[layer.name]
        weight = get_tensor(made.network.module, layer.weight_name)
        assert torch.equal(weight_to_matrix(layer, weight), form.weight)
        assert not form.weight[~form.mask].any()
        if layer.name != "fc":
            check_pattern(scheme, weight)
        if "w" in scheme:
            step = layer.cols // form.scale.shape[1]
            zero = form.zero_point.float().repeat_interleave(step, 1)
            values = (form.codes.float() - zero) * form.scale.repeat_interleave(step, 1)
            assert torch.equal(values, form.weight)
        else:
            assert form.codes is None
        assert record.scheme == scheme
        pruned = "@" in scheme or ":" in scheme
        assert record.density == (float((form.weight != 0).double().mean()) if pruned else 1.0)
        assert record.error == (form.error if method == "exact_obs" else None)
        assert record.weights == form.weight.numel()
    assert bool(made.ranges) == ("a8" in scheme)
    assert made.manifest.batch_norms_reestimated == (0 if scheme == "w8a8" else 2)


def test_round_to_nearest_by_hand(model, calibrated):
    """conv1 has a batch norm behind it, some of whose gains are negative."""
    made = plainly(calibrated, scheme="w8a8")
    weight = model.conv1.weight.detach().double().numpy()
    steps = np.abs(weight).max((1, 2, 3), keepdims=True) / 127
    gain = (model.bn1.weight / torch.sqrt(model.bn1.running_var + model.bn1.eps)).detach()
    assert (gain < 0).any()
    wanted = np.round(weight / steps) * steps * gain.double().numpy()[:, None, None, None]
    found = get_tensor(made.network.module, "conv1.weight")
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)
    scale = made.forms["conv1"].scale[:, 0]
    np.testing.assert_allclose(scale, steps.ravel() * np.abs(gain.numpy()), rtol=1e-6)
    assert (scale > 0).all()


def test_errors_are_those_of_the_outputs(model, calibrated):
    """tr(ΔHΔᵀ)/tr(WHWᵀ) is the relative squared error of the layer's own outputs, less the bias."""
    made = compress(calibrated, scheme="unstructured@0.5+w4", baselines=False)
    seen = []
    handle = model.fc.register_forward_pre_hook(lambda _, given: seen.append(given[0].double()))
    outputs(model)
    handle.remove()
    weight = model.fc.weight.detach().double()
    change = seen[0] @ (weight - made.forms["fc"].weight.double()).T
    wanted = float(change.square().sum() / (seen[0] @ weight.T).square().sum())
    assert 0 < wanted < 1
    assert made.forms["fc"].error == pytest.approx(wanted, rel=1e-4)


def test_exact_obs_loses_less_than_the_baselines(calibrated):
    exact = compress(calibrated, scheme="unstructured@0.5+w4", baselines=False, damping=1e-4)
    for name, form in exact.forms.items():
        weight = calibrated.network.module.get_parameter(f"{name}.weight")
        matrix = weight_to_matrix(next(x for x in exact.layers if x.name == name), weight)
        cut = matrix.abs() > matrix.abs().flatten().kthvalue(matrix.numel() // 2).values
        hessian = calibrated.statistics[name].hessian
        lost = (matrix * ~cut).double()
        magnitude = torch.trace(lost @ hessian @ lost.T)
        magnitude = magnitude / torch.trace(matrix.double() @ hessian @ matrix.double().T)
        assert form.error < float(magnitude)


def test_nothing_done_is_the_dense_network(model, calibrated):
    made = plainly(calibrated, scheme="dense")
    assert (made.role, dict(made.forms), dict(made.ranges)) == ("dense-fp32", {}, {})
    torch.testing.assert_close(outputs(made.module()), outputs(model), rtol=1e-4, atol=1e-5)
    assert [(record.density, record.error) for record in made.manifest.layers] == [(1.0, None)] * 3


@pytest.mark.parametrize("skip", [["conv1", "fc"], "[!c]*", ("fc",), "conv*", []])
def test_skipped_layers_stay_as_they_are(calibrated, skip):
    made = plainly(calibrated, scheme="w8", skip=skip)
    dense = plainly(calibrated, scheme="dense")
    skipped = {
        "['conv1', 'fc']": {"conv1", "fc"}, "[!c]*": {"fc"}, "('fc',)": {"fc"},
        "conv*": {"conv1", "conv2"}, "[]": set(),
    }[str(skip)]  # fmt: skip
    assert set(made.forms) == {"conv1", "conv2", "fc"} - skipped
    for record in made.manifest.layers:
        name = f"{record.name}.weight"
        same = torch.equal(
            get_tensor(made.network.module, name), get_tensor(dense.network.module, name)
        )
        assert same == (record.name in skipped)
        assert record.scheme == ("dense" if record.name in skipped else "w8")
    assert made.role == "compressed"


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"layer_schemes": {"fc": "w8a8"}}, ["w4", "w4", "w8a8"]),
        ({"layer_schemes": {"conv*": "w8", "conv2": "w3"}}, ["w8", "w3", "w4"]),
        ({"layer_schemes": {"conv2": "w3", "conv*": "w8"}}, ["w8", "w8", "w4"]),
        ({"layer_schemes": {"fc": "w8"}, "skip": ["*"]}, ["dense", "dense", "w8"]),
        ({"layer_schemes": {"fc": "dense"}}, ["w4", "w4", "dense"]),
    ],
)
def test_schemes_of_single_layers(calibrated, options, wanted):
    made = plainly(calibrated, scheme="w4", **options)
    assert [record.scheme for record in made.manifest.layers] == wanted
    assert {str(form.scheme) for form in made.forms.values()} == set(wanted) - {"dense"}


@pytest.fixture(scope="module")
def depthwise():
    """3 input channels in its first layer, 1 in its second, 16 and 32 in the others."""
    return calibrate(build(Depthwise), samples(Depthwise, 16))


def test_the_fallback_is_for_layers_that_the_scheme_does_not_divide(depthwise):
    made = plainly(depthwise, scheme="2:4+w8a8", method="magnitude", fallback="w8a8")
    found = {record.name: record.scheme for record in made.manifest.layers}
    assert found == {
        "first": "w8a8", "depthwise": "w8a8", "pointwise": "2:4+w8a8", "head": "2:4+w8a8"
    }  # fmt: skip
    with pytest.raises(SchemeError, match=r"2 layers: first, depthwise\).*--skip 'first'.*w8a8"):
        plainly(depthwise, scheme="2:4+w8a8")
    # A scheme that was asked for by name is no default to fall back from.
    with pytest.raises(SchemeError, match="'first'"):
        plainly(depthwise, scheme="w8a8", layer_schemes={"first": "2:4"}, fallback="w8a8")


@pytest.mark.parametrize("kind", ["unstructured", "block4"])
def test_announced_levels_are_solved_at_once_and_as_they_would_be_alone(model, calibrated, kind):
    levels = [f"{kind}@0.5", f"{kind}@0.75", "2:4"]
    together = calibrate(model, X, batch_size=32, levels=levels)
    compress(together, scheme=levels[0], baselines=False)
    solved = {(key[0], key[1]) for key in together.pruned}
    assert solved == {(n, s) for n in ("conv1", "conv2", "fc") for s in levels[:2]}
    for level in levels:
        same_bits(
            compress(together, scheme=level, baselines=False),
            compress(calibrated, scheme=level, baselines=False),
        )


def test_baselines(model, calibrated):
    made = compress(calibrated, scheme="2:4", method="magnitude")
    dense, int8 = made.baselines
    assert (dense.role, dense.scheme, dense.baselines) == ("dense-fp32", "dense", ())
    assert (int8.role, int8.scheme, int8.baselines) == ("dense-int8", "w8a8", ())
    assert plainly(calibrated).baselines == ()
    torch.testing.assert_close(outputs(dense.module()), outputs(model), rtol=1e-4, atol=1e-5)
    alone = dense_baselines(calibrated)
    same_bits(alone[0], dense)
    same_bits(alone[1], int8)
    quantized = outputs(int8.module())
    assert not torch.equal(quantized, outputs(dense.module()))
    error = torch.linalg.vector_norm(quantized - outputs(model))
    assert error < 0.1 * torch.linalg.vector_norm(outputs(model))
    assert {form.method for form in int8.forms.values()} == {"rtn"}
    assert int8.quantized().int8_layers == ("conv1", "conv2", "fc")


def test_the_same_twice_in_any_order(model, calibrated):
    """Nothing that one scheme does to a calibrated model is seen by the next."""
    fresh = calibrate(model, (X, LABELS), batch_size=32)
    schemes = ["unstructured@0.5+w4", "w8a8", "2:4"]
    first = [compress(fresh, scheme=scheme, baselines=False) for scheme in schemes]
    again = [compress(calibrated, scheme=scheme, baselines=False) for scheme in schemes[::-1]]
    for one, other in zip(first, again[::-1], strict=True):
        same_bits(one, other)
        assert one.manifest.layers == other.manifest.layers
        assert one.manifest.calibration.sha256 == other.manifest.calibration.sha256


def test_the_seed_chooses_the_samples(model):
    chosen = [calibrate(model, X, limit=6, seed=seed).samples for seed in (1, 1, 2)]
    for found, seed in zip(chosen, (1, 1, 2), strict=True):
        wanted = Samples({"x": X}).take(6, seed)
        np.testing.assert_array_equal(found.inputs["x"], wanted.inputs["x"])
    assert chosen[0].sha256() == chosen[1].sha256() != chosen[2].sha256()


def test_the_callers_model_and_random_numbers_stay_as_they_are():
    model = build(Plain).train()
    before = copy.deepcopy(model.state_dict())
    places = [tensor.data_ptr() for tensor in model.state_dict().values()]
    random = torch.get_rng_state()
    made = compress(model, X, scheme="2:4+w8a8", method="magnitude", batch_size=32)
    for parameter in made.network.module.parameters():
        parameter.zero_()
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model._forward_pre_hooks
    assert [tensor.data_ptr() for tensor in model.state_dict().values()] == places
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_an_exported_program_stays_as_it_is_and_gives_the_same(model, calibrated):
    shapes = ({0: torch.export.Dim.AUTO},)
    program = torch.export.export(model, (torch.from_numpy(X[:2]),), dynamic_shapes=shapes)
    before = copy.deepcopy(dict(program.state_dict))
    made = plainly(calibrate(program, (X, LABELS), batch_size=32), scheme="w8a8")
    same_bits(made, plainly(calibrated, scheme="w8a8"))
    assert made.manifest.model.source == "ExportedProgram"
    for parameter in made.network.module.parameters():
        parameter.zero_()
    for name, tensor in program.state_dict.items():
        assert torch.equal(tensor, before[name]), name


class Words(nn.Module):
    """An embedding, which is neither linear nor a convolution, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, words):
        return self.head(self.table(words).mean(1))


def test_an_unsupported_layer_is_left_dense_and_reported():
    model = Words().eval()
    words = np.random.default_rng(0).integers(0, 10, (16, 5))
    made = compress(model, words, scheme="w4", baselines=False)
    assert list(made.forms) == ["head"]
    assert [record.name for record in made.manifest.layers] == ["head"]
    assert made.manifest.unsupported == {
        "table": "aten.embedding.default is no Linear or convolution: left dense"
    }
    assert f"table: {made.manifest.unsupported['table']}" in made.manifest.notes
    assert torch.equal(get_tensor(made.network.module, "table.weight"), model.table.weight)
    assert not torch.equal(get_tensor(made.network.module, "head.weight"), model.head.weight)


@pytest.mark.parametrize("wanted", [True, False])
def test_batch_norms_are_measured_anew_after_pruning(calibrated, wanted):
    made = plainly(calibrated, scheme="2:4", method="magnitude", bn_reestimate=wanted)
    assert made.manifest.batch_norms_reestimated == (2 if wanted else 0)
    deviation = []
    for module in (made.module(), calibrated.network.module):
        relu = next(n for n in module.graph.nodes if n.target is torch.ops.aten.relu.default)
        seen = {}
        with torch.no_grad():
            Watcher(module, lambda node, value, seen=seen: seen.update({node: value})).run(
                torch.from_numpy(X)
            )
        deviation.append(seen[relu.args[0]].std((0, 2, 3)))
    apart = (deviation[0] / deviation[1] - 1).abs().max()
    assert (apart < 0.02) == wanted


def test_accuracy_before_and_after(model, calibrated):
    guesses = outputs(model).argmax(1).numpy()
    made = plainly(calibrated, scheme="w2", evaluation=(X, guesses))
    accuracy = made.manifest.accuracy
    after = float((outputs(made.module()).argmax(1).numpy() == guesses).mean())
    assert (accuracy.dense, accuracy.compressed, accuracy.samples) == (1.0, after, 64)
    assert after < 1.0


def test_evaluation_samples_keep_a_preprocessing_of_their_own(model):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 4, 8, 8)).astype(np.uint8)
    own, other = Preprocessing(1 / 50, (1.0,) * 4, (2.0,) * 4), Preprocessing(1 / 9)
    known = calibrate(model, pixels, preprocessing=other)
    truth = {how: outputs(model, how.apply(pixels)).argmax(1).numpy() for how in (own, other)}
    assert (truth[own] != truth[other]).any()
    for evaluation, labels in [
        (Samples({"x": pixels}, truth[own], own), truth[own]),
        (Samples({"x": pixels}, truth[other]), truth[other]),
        ((pixels, truth[other]), truth[other]),
    ]:
        made = plainly(known, scheme="w8", evaluation=evaluation)
        assert made.manifest.accuracy.dense == 1.0, labels


class FourAtATime(nn.Module):
    """A network that takes four samples at a time, for the shape that it flattens to."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        return self.fc(x.reshape(4, -1))


def test_a_network_of_one_batch_size():
    model = FourAtATime().eval()
    x = samples(FixedBatch, 10)
    program = torch.export.export(model, (torch.from_numpy(x[:4]),))
    wanted = [int(model(torch.from_numpy(np.tile(x[i], (4, 1, 1))))[0].argmax()) for i in range(10)]
    made = compress(program, x, method="rtn", evaluation=(x, np.array(wanted)), baselines=False)
    assert made.network.batch_size == made.manifest.settings.batch_size == 4
    assert made.manifest.accuracy.dense == 1.0
    module = made.module()
    found = predictions(module, Samples({"x": x}), batch_size=4, fixed_batch=True)
    assert len(found) == 10
    share = float((found.numpy() == wanted).mean())
    assert made.manifest.accuracy.compressed == share
    # Two samples would fill no batch: nothing would be seen and no range be known.
    with pytest.raises(CalibrationError, match="takes batches of 4 and 'memory' has 2 samples"):
        compress(program, x[:2], method="rtn")


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 4), nn.Linear(3, 4)

    def forward(self, one, two):
        return self.left(one) - self.right(two)


@pytest.mark.parametrize("names", [("one", "two"), ("a", "b")])
def test_inputs_find_their_place_by_name_and_else_by_order(names):
    model = TwoInputs().eval()
    draw = np.random.default_rng(0)
    one, two = (draw.standard_normal((20, size)).astype(np.float32) for size in (6, 3))
    given = dict(zip(names, (one, two), strict=True))
    if names == ("one", "two"):
        given = dict(reversed(given.items()))
    made = compress(model, given, scheme="w8", method="rtn", baselines=False)
    assert list(made.samples.inputs) == ["one", "two"]
    assert made.manifest.model.inputs == {"one": [6], "two": [3]}
    with torch.no_grad():
        found = made.module()(torch.from_numpy(one), torch.from_numpy(two))
        wanted = model(torch.from_numpy(one), torch.from_numpy(two))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.05)
    with pytest.raises(ModelError, match="TwoInputs"):
        compress(model, {**given, "three": one}, scheme="w8")


def test_large_layers_are_rounded_some_rows_at_a_time(calibrated, monkeypatch):
    whole = plainly(calibrated, scheme="2:4+w4g4-asym", method="magnitude")
    monkeypatch.setattr(layerwise, "ROWS_ELEMENTS", 100)
    parts = plainly(calibrated, scheme="2:4+w4g4-asym", method="magnitude")
    for name, form in whole.forms.items():
        other = parts.forms[name]
        for part in ("weight", "mask", "codes", "scale", "zero_point"):
            assert torch.equal(getattr(form, part), getattr(other, part)), (name, part)
        assert form.error == pytest.approx(other.error, rel=1e-6)
        assert form.error > 0


def test_equal_layers_are_compressed_each_for_itself():
    made = compress(build(Twins), samples(Twins), scheme="w4", method="rtn", baselines=False)
    assert list(made.forms) == ["one", "two"]
    assert torch.equal(made.forms["one"].codes, made.forms["two"].codes)


def test_progress_only_rises(calibrated):
    told = []
    compress(calibrated, scheme="2:4+w8a8", progress=lambda *note: told.append(note))
    stages = list(dict.fromkeys(what for what, _ in told))
    assert stages[:3] == ["pruning", "re-estimating batch norm", "quantizing"]
    first = [share for what, share in told if what == "pruning"]
    assert all(0.0 <= share <= 1.0 + 1e-9 for _, share in told)
    assert first[0] <= first[-1] == pytest.approx(1.0)


NAN = X.copy()
NAN[7, 1, 0, 0] = np.nan


@pytest.mark.parametrize(
    ("options", "kind", "named"),
    [
        ({"calibration": NAN}, CalibrationError, "sample 7 of input 'images' in .* NaN"),
        ({"calibration": X[:0]}, CalibrationError, "'memory' is empty: give at least one sample"),
        ({"calibration": []}, CalibrationError, "'memory' is empty"),
        ({"calibration": None}, CalibrationError, "needs calibration samples"),
        ({"calibration": "none.npz"}, CalibrationError, "no file 'none.npz'; give the path"),
        ({"calibration": X[:, :3]}, ModelError, r"Plain on inputs of shape \[\(2, 3, 8, 8\)\]"),
        ({"calibration": X.astype(int)}, ModelError, "cannot capture Plain.* type"),
        ({"calibration": (X, X)}, ModelError, "cannot capture Plain .*argument"),
        ({"batch_size": 0}, CalibrationError, "batch size 0: give 1 or more"),
        ({"skip": ["head"]}, LayerError, "no layer matches 'head'; the layers are conv1, conv2"),
        ({"skip": "head"}, LayerError, "no layer matches 'head'; the layers are conv1, conv2, fc"),
        ({"layer_schemes": {"c?": "w4"}}, LayerError, r"no layer matches 'c\?'; the layers are"),
        ({"layer_schemes": {"fc": "w99"}}, SchemeError, "'w99' asks for 99-bit weights; 2 to 8"),
        ({"scheme": "block5@0.9"}, SchemeError, "cannot read scheme 'block5@0.9': a scheme is"),
        ({"scheme": "w4g5"}, SchemeError, r"groups of 5 .*'conv1'.*--skip 'conv1'"),
        ({"fallback": "some"}, SchemeError, "cannot read scheme 'some'"),
        ({"target": "abacus"}, TargetError, "no target 'abacus'; the targets are"),
        ({"ranges": "best"}, CalibrationError, "no range method 'best'; use one of min-max"),
        ({"method": "best"}, ProblemError, "method 'best' is unknown; use one of exact_obs"),
        ({"dtype": "float16"}, ProblemError, "dtype 'float16'.*use 'float32' or 'float64'"),
        ({"damping": float("nan")}, ProblemError, "layer 'conv1': damping nan"),
        ({"damping": -1.0, "method": None}, ProblemError, "layer 'conv1': damping -1.0"),
        ({"device": "abacus"}, ProblemError, "device 'abacus' is unknown; use 'cpu'"),
        ({"budget": "2x"}, BudgetError, "cannot read budget '2x'"),
        ({"evaluation": X}, CalibrationError, "'memory' has no labels to measure"),
        ({"evaluation": (X[:0], LABELS[:0])}, CalibrationError, "'memory' is empty"),
        (
            {"evaluation": (X[:, :, 1:], LABELS)},
            CalibrationError,
            "evaluation samples in 'memory' have shape 4x7x8, the calibration samples 4x8x8",
        ),
    ],
)  # fmt: skip
def test_bad_input(model, calibrated, options, kind, named):
    early = options.keys() & {"calibration", "batch_size", "device", "budget"}
    first = (model, options.get("calibration", X)) if early else (calibrated,)
    rest = {name: value for name, value in options.items() if name != "calibration"}
    with pytest.raises(kind, match=named) as error:
        plainly(*first, **rest)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_that_leaves_nothing(model, limit):
    with pytest.raises(CalibrationError, match=f"limit {limit}: give 1 or more"):
        calibrate(model, X, limit=limit)


def test_samples_for_a_model_that_has_its_own(calibrated):
    with pytest.raises(CalibrationError, match="calibrated on 'memory' already; leave the"):
        compress(calibrated, X)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(value):
    model = build(Plain)
    with torch.no_grad():
        model.conv2.weight[3, 2, 1, 0] = value
    with pytest.raises(ModelError, match=r"parameter 'conv2\.weight' has 1 values .* NaN or Inf"):
        compress(model, X)


def test_large_weights_are_finite_though_their_sum_is_not():
    model = nn.Linear(4, 4, bias=False)
    nn.init.constant_(model.weight, 3e38)
    made = compress(model, np.zeros((4, 4), np.float32), scheme="w8", method="rtn", baselines=False)
    assert torch.isfinite(made.forms["weight"].weight).all()


@pytest.mark.parametrize(
    ("x", "named"),
    [
        (X[:, :3], r"input 'x' .* of shape \(4, 8, 8\), .* ones of shape \(3, 8, 8\); give such"),
        (X[:, 0], r"takes float32 samples of shape \(4, 8, 8\), the data has .*shape \(8, 8\)"),
        (X.astype(int), r"takes float32 samples .*, the data has int64 ones"),
    ],
)  # fmt: skip
def test_samples_that_an_exported_program_does_not_take(model, x, named):
    program = torch.export.export(model, (torch.from_numpy(X[:2]),))
    with pytest.raises(ModelError, match=named) as error:
        compress(program, x)
    assert "\n" not in str(error.value)


def test_torch_logs_no_traceback_beside_the_error():
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addHandler(handler)
    try:
        with pytest.raises(ModelError, match="cannot capture Linear"):
            compress(nn.Linear(6, 4), X[:, 0, 0, :3])
    finally:
        logger.removeHandler(handler)
    assert records == []


def test_accuracy_needs_labels(model):
    with pytest.raises(CalibrationError, match="'ours' has no labels"):
        top1(model, Samples({"x": X}, source="ours"))
