"""What a user names becomes a module with the right weights in it, or a line that says why not."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from tiny_networks import Plain, build, samples
from torch import nn

from obc_deploy.errors import ModelError
from obc_deploy.models import load_model, load_weights


def same_weights(one, other):
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
@pytest.mark.parametrize("wrapped", ["", "state_dict", "model", "module."])
def test_checkpoints(tmp_path, suffix, wrapped):
    source = build(Plain, seed=3)
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    if wrapped == "module.":
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({wrapped: state, "epoch": 3} if wrapped.isidentifier() else state, path)
    same_weights(source, load_weights(build(Plain), path))


def test_half_precision_checkpoints_become_float32(tmp_path):
    source = build(Plain, seed=3).half()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model = load_weights(build(Plain), tmp_path / "w.pth")
    assert model.fc.weight.dtype == torch.float32
    same_weights(source.float(), model)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "no checkpoint file"),
        (b"rubbish", "cannot read checkpoint"),
        ([1, 2], "holds a list that is no state_dict"),
        (torch.zeros(3), "holds a Tensor that is no state_dict"),
        ({"epoch": 3}, "holds a dict that is no state_dict"),
        ({}, r"does not fit Plain: 13 tensors missing \(first 'conv1.weight'\), 0 unknown"),
    ],
)
def test_checkpoints_that_are_none(tmp_path, content, named):
    path = tmp_path / "w.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ModelError, match=named) as error:
        load_weights(build(Plain), path)
    assert "\n" not in str(error.value)


def test_checkpoints_that_do_not_fit(tmp_path):
    path = tmp_path / "w.safetensors"
    state = build(Plain).state_dict()
    save_file({**state, "fc.weight": torch.zeros(7, 8)}, path)
    with pytest.raises(ModelError, match=r"'fc.weight' has shape \(7, 8\), Plain needs \(5, 8\)"):
        load_weights(build(Plain), path)
    state["fc.weigth"] = state.pop("fc.weight")
    save_file(state, path)
    with pytest.raises(
        ModelError,
        match=r"1 tensors missing \(first 'fc.weight'\), 1 unknown \(first 'fc.weigth'\)",
    ):
        load_weights(build(Plain), path)


@pytest.mark.parametrize("weights", [None, "none", "None"])
def test_torchvision_without_weights(weights):
    model = load_model("torchvision:resnet18", weights=weights)
    assert type(model).__name__ == "ResNet"
    assert model.fc.out_features == 1000


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_torchvision_checkpoint_says_how_many_classes_there_are(tmp_path, suffix):
    torchvision = pytest.importorskip("torchvision")
    source = torchvision.models.mobilenet_v2(weights=None, num_classes=7)
    path = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file(source.state_dict(), path)
    else:
        torch.save(source.state_dict(), path)
    model = load_model("torchvision:mobilenet_v2", weights=str(path))
    assert model.classifier[1].out_features == 7
    same_weights(source, model)


@pytest.mark.parametrize(
    ("spec", "weights", "named"),
    [
        (
            "torchvision:resnet81",
            None,
            "torchvision has no model 'resnet81'; did you mean resnet18",
        ),
        (
            "torchvision:resnet18",
            "IMAGENET",
            "has no weights 'IMAGENET'; it has IMAGENET1K_V1, DEFAULT, or give",
        ),
        ("torchvision:resnet18", "ResNet18_Weights.V9", "has no weights 'ResNet18_Weights.V9'"),
        ("torchvision:resnet18", "missing.pth", "no checkpoint file 'missing.pth'"),
        ("resnet18", None, "'resnet18' is no model: give torchvision:NAME"),
        ("missing.pt2", None, "no file 'missing.pt2'"),
        ("no_such_module_at_all:f", None, "cannot import 'no_such_module_at_all'"),
        ("my_models:nothing", None, "module 'my_models' has no 'nothing'"),
        ("my_models:number", None, "'my_models:number' gave a int, not a torch.nn.Module"),
        ("my_models:NUMBER", None, "'my_models:NUMBER' gave a int, not a torch.nn.Module"),
        ("my_models:broken", None, "'my_models:broken' failed: ValueError: two$"),
        ("my_models:linear", "missing.pth", "no checkpoint file 'missing.pth'"),
    ],
)
@pytest.mark.usefixtures("factories")
def test_names_that_lead_nowhere(spec, weights, named):
    with pytest.raises(ModelError, match=named) as error:
        load_model(spec, weights=weights)
    assert "\n" not in str(error.value)


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "from torch import nn\n"
        "NUMBER = 3\n"
        "ready = nn.Linear(2, 3)\n"
        "def linear():\n    return nn.Linear(2, 3)\n"
        "def number():\n    return NUMBER\n"
        "def broken():\n    raise ValueError('two\\nlines')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("factories")
def test_factories_and_modules(tmp_path):
    assert isinstance(load_model("my_models:linear"), nn.Linear)
    ready = load_model("my_models:ready")
    save_file({k: v + 1 for k, v in ready.state_dict().items()}, tmp_path / "w.safetensors")
    loaded = load_model("my_models:linear", weights=str(tmp_path / "w.safetensors"))
    torch.testing.assert_close(loaded.weight, ready.weight + 1)


def test_exported_programs(tmp_path):
    model = build(Plain)
    x = torch.from_numpy(samples(Plain, 2))
    path = tmp_path / "m.pt2"
    torch.export.save(torch.export.export(model, (x,)), path)
    program = load_model(str(path))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))
    with pytest.raises(ModelError, match="has its weights inside; leave --weights out"):
        load_model(str(path), weights="w.pth")
    path.write_bytes(b"no zip")
    with pytest.raises(ModelError, match=r"as an exported program: .*torch\.export\.save") as error:
        load_model(str(path))
    assert "\n" not in str(error.value)
