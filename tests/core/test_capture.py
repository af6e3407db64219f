"""Capture: however a model is written, the graph computes the same, the model stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_networks import Plain, Residual, build, samples
from torch import nn
from torch.nn import functional

from obc_deploy.capture import capture, get_tensor, recapture, set_tensor
from obc_deploy.errors import ModelError
from obc_deploy.layers import find_layers


def agrees(network, model, inputs):
    with torch.no_grad():
        torch.testing.assert_close(network.module(*inputs), model(*inputs), rtol=1e-5, atol=1e-6)


def test_the_callers_model_is_not_changed():
    model = build(Plain).train()
    before = copy.deepcopy(model.state_dict())
    pointers = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    network = capture(model, (torch.from_numpy(samples(Plain, 2)),))
    set_tensor(network.module, "conv1.weight", torch.zeros(8, 4, 3, 3))
    network.module.get_parameter("fc.weight").zero_()
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.data_ptr() == pointers[name]


def test_parameters_keep_their_names_and_the_batch_stays_open():
    model = build(Plain)
    network = capture(model, (torch.from_numpy(samples(Plain, 1)),))
    assert network.dynamic_batch
    assert network.batch_size is None
    assert network.input_names == ("x",)
    for name, tensor in model.named_parameters():
        assert torch.equal(get_tensor(network.module, name), tensor)
    for count in (1, 2, 5):
        agrees(network, model, (torch.from_numpy(samples(Plain, count)),))


def test_a_copy_owns_its_parameters():
    network = capture(build(Plain), (torch.from_numpy(samples(Plain, 2)),))
    other = network.copy()
    other.module.get_parameter("fc.weight").zero_()
    assert bool(get_tensor(network.module, "fc.weight").any())


def test_a_branch_shares_tensors_until_they_are_replaced():
    network = capture(build(Plain), (torch.from_numpy(samples(Plain, 2)),))
    other = network.branch()
    for name in ("conv1.weight", "bn1.running_var", "fc.bias"):
        known = get_tensor(network.module, name)
        before = known.clone()
        assert get_tensor(other.module, name).data_ptr() == known.data_ptr()
        set_tensor(other.module, name, torch.zeros_like(known))
        assert torch.equal(get_tensor(network.module, name), before)
    other.module.to(torch.float64)
    other.module.graph.erase_node(next(iter(reversed(other.module.graph.nodes))))
    assert {p.dtype for p in network.module.parameters()} == {torch.float32}
    agrees(network, build(Plain), (torch.from_numpy(samples(Plain, 3)),))


@pytest.mark.parametrize("kind", [Plain, Residual])
def test_captured_again_it_is_the_same(kind):
    network = capture(build(kind), (torch.from_numpy(samples(kind, 2)),))
    again = recapture(network)
    assert again.dynamic_batch
    assert [n.name for n in again.module.graph.nodes] == [
        n.name for n in network.module.graph.nodes
    ]
    agrees(again, build(kind), (torch.from_numpy(samples(kind, 5)),))


class FixedBatch(nn.Module):
    def __init__(self, reshape: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 4)
        self.reshape = reshape

    def forward(self, x):
        x = x.view(1, -1) if self.reshape else x.flatten(1) + torch.zeros(1, 12)
        return self.fc(x)


def test_a_model_that_fixes_its_batch_at_one_is_captured_at_one():
    model = FixedBatch(reshape=True)
    network = capture(model, (torch.randn(2, 3, 4),))
    assert not network.dynamic_batch
    assert network.batch_size == 1
    agrees(network, model, (torch.randn(1, 3, 4),))
    assert capture(FixedBatch(reshape=False), (torch.randn(2, 3, 4),)).dynamic_batch


class Functional(nn.Module):
    """Weights without modules, in-place operators, a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 3, 3, 3))
        self.shift = nn.Parameter(torch.randn(6))

    def forward(self, x):
        x = functional.conv2d(x, self.kernel, self.shift, padding=1)
        x.add_(1.0)
        functional.relu_(x)
        x[:, 0] *= 2.0
        return x


def test_functional_layers_and_in_place_operators():
    model = Functional()
    network = capture(model, (torch.randn(2, 3, 6, 6),))
    agrees(network, model, (torch.randn(3, 3, 6, 6),))
    (layer,), unsupported = find_layers(network)
    assert (layer.name, layer.bias_name, unsupported) == ("kernel", "shift", [])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(5, 5)
        self.two = nn.Linear(5, 5, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(torch.relu(self.one(x)))


def test_tied_weights_are_one_layer_with_two_call_sites():
    model = Tied()
    network = capture(model, (torch.randn(2, 5),))
    agrees(network, model, (torch.randn(4, 5),))
    (layer,), _ = find_layers(network)
    assert len(layer.call_sites) == 2
    assert layer.macs == 2 * 25


def test_several_inputs():
    class Two(nn.Module):
        def forward(self, first, second):
            return first * second.sum(1, keepdim=True)

    network = capture(Two(), (torch.randn(2, 4), torch.randn(2, 3)))
    assert network.input_names == ("first", "second")
    assert network.dynamic_batch


def test_half_precision_models_become_float32():
    network = capture(build(Plain).half(), (torch.from_numpy(samples(Plain, 2)),))
    assert {p.dtype for p in network.module.parameters()} == {torch.float32}


@pytest.mark.parametrize("dynamic", [True, False])
def test_pt2_round_trip(tmp_path, dynamic):
    model = build(Residual)
    x = torch.from_numpy(samples(Residual, 2))
    shapes = ({0: torch.export.Dim.AUTO},) if dynamic else None
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=shapes), tmp_path / "m.pt2")
    network = capture(torch.export.load(tmp_path / "m.pt2"), (x[:1],))
    assert network.batch_size == (None if dynamic else 2)
    agrees(network, model, (torch.from_numpy(samples(Residual, 2, seed=1)),))
    assert [layer.name for layer in find_layers(network)[0]] == ["first", "second", "third", "head"]


def test_an_exported_program_with_another_number_of_inputs():
    program = torch.export.export(build(Residual), (torch.from_numpy(samples(Residual, 2)),))
    with pytest.raises(ModelError, match=r"takes 1 inputs \(x\), the calibration data has 2"):
        capture(program, (torch.randn(2, 3, 8, 8), torch.randn(2)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["conv2.weight", "bn1.running_var"])
def test_values_that_are_not_finite(name, value):
    model = build(Plain)
    model.state_dict()[name].view(-1)[3] = value
    with pytest.raises(ModelError, match=f"parameter '{name}' has 1 values that are NaN or Inf"):
        capture(model, (torch.from_numpy(samples(Plain, 2)),))


def test_a_program_exported_in_training_mode():
    model = build(Plain).train()
    program = torch.export.export(model, (torch.from_numpy(samples(Plain, 2)),))
    with pytest.raises(ModelError, match=r"training mode; call model\.eval\(\) before"):
        capture(program, (torch.from_numpy(samples(Plain, 2)),))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else x


def test_data_dependent_control_flow():
    with pytest.raises(ModelError, match="data-dependent Python control flow") as error:
        capture(Branching(), (torch.randn(2, 4),))
    assert "\n" not in str(error.value)


def test_an_input_that_does_not_fit():
    with pytest.raises(
        ModelError, match=r"cannot capture Plain on inputs of shape \[\(2, 7, 8, 8\)\]"
    ):
        capture(build(Plain), (torch.randn(2, 7, 8, 8),))
