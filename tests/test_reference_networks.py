"""The networks beside the checkout load strictly, score what is published for them, and export."""

from __future__ import annotations

from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch

from obc_deploy.benchmarks import reference_networks as reference
from obc_deploy.errors import CalibrationError, ModelError

SHARED = reference.shared_data()
NAMES = tuple(reference.REFERENCE_NETWORKS)

needs_shared = [
    pytest.mark.shared,
    pytest.mark.skipif(
        SHARED is None,
        reason="no real networks and data in ../shared/data or $OBC_DEPLOY_SHARED",
    ),
]


@pytest.fixture
def shared() -> Path:
    assert SHARED is not None
    return SHARED


def shared_cases(*cases):
    return [pytest.param(*case, marks=needs_shared) for case in cases]


def share_correct(name: str, shared: Path, limit: int) -> float:
    network = reference.load_network(name, shared)
    inputs, labels = reference.load_images(name, "test", shared, limit)
    with torch.inference_mode():
        scores = torch.cat([network(part) for part in torch.from_numpy(inputs).split(50)])
    assert len(labels) == limit
    return float((scores.argmax(1).numpy() == labels).mean())


@pytest.mark.parametrize(
    ("name", "limit"),
    shared_cases(
        ("cifar10_resnet20", 1000),
        ("cifar10_resnet32", 700),
        ("cifar10_vgg16_bn", 150),
        ("fashion_cnn", 1000),
        ("imagenet_mobilenet_v1_075", 40),
        ("imagenet_mobilenet_v2", 40),
    ),
)
def test_accuracy_is_the_published_one(name, limit, shared):
    published = reference.REFERENCE_NETWORKS[name].test_accuracy
    standard_error = sqrt(published * (1 - published) / limit)
    assert abs(share_correct(name, shared, limit) - published) < 3 * standard_error


@pytest.mark.parametrize("name", shared_cases(*((name,) for name in NAMES)))
def test_loaded_network_is_float32_and_in_evaluation_mode(name, shared):
    network = reference.load_network(name, shared)
    tensors = [*network.parameters(), *network.buffers()]
    assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.float32}
    assert all(bool(torch.isfinite(t).all()) for t in tensors)
    assert not any(module.training for module in network.modules())


@pytest.mark.parametrize("name", shared_cases(*((name,) for name in NAMES)))
def test_exports_with_a_dynamic_batch(name, shared):
    network = reference.load_network(name, shared)
    inputs = torch.from_numpy(reference.load_images(name, "calib", shared, 3)[0])
    program = torch.export.export(
        network, (inputs[:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    with torch.inference_mode():
        torch.testing.assert_close(program.module()(inputs), network(inputs))


@pytest.mark.parametrize(
    ("name", "split", "count"),
    shared_cases(
        ("cifar10_resnet20", "calib", 2048),
        ("cifar10_resnet20", "test", 5000),
        ("fashion_cnn", "calib", 1024),
        ("fashion_cnn", "test", 2000),
    ),
)
def test_a_whole_split_has_every_image(name, split, count, shared):
    pixels, labels = reference.load_pixels(name, split, shared)
    assert pixels.shape == (count, *reference.REFERENCE_NETWORKS[name].input_shape)
    assert (pixels.dtype, labels.dtype) == (np.uint8, np.int64)
    assert set(labels) == set(range(10))


@pytest.mark.parametrize("name", shared_cases(("imagenet_mobilenet_v2",)))
def test_photographs_are_turned_and_scaled_between_minus_one_and_one(name, shared):
    from PIL import Image

    pixels, labels = reference.load_pixels(name, "test", shared, 2)
    inputs, _ = reference.load_images(name, "test", shared, 2)
    first = (shared / "imagenet" / "labels_test.csv").read_text("utf-8").splitlines()[1].split(",")
    upright = np.asarray(Image.open(shared / "imagenet" / first[0]).convert("RGB"))
    np.testing.assert_array_equal(np.rot90(upright, 2).transpose(2, 0, 1), pixels[0])
    assert labels[0] == int(first[1])
    np.testing.assert_allclose(inputs, pixels / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_random_network_scores_every_class_of_its_input_shape(name):
    network = reference.reference_network(name)
    with torch.inference_mode():
        scores = network.build().eval()(torch.zeros(2, *network.input_shape))
    assert scores.shape == (2, 1000 if network.dataset == "imagenet" else 10)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("cifar10_resnet20", 269_722),
        ("cifar10_resnet32", 464_154),
        ("imagenet_mobilenet_v2", 3_504_872),
    ],
)
def test_parameter_counts_are_those_of_the_papers(name, parameters):
    network = reference.reference_network(name).build()
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_option_a_shortcut_subsamples_and_pads_channels_on_both_sides():
    block = reference.OptionABlock(2, 4, stride=2).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.rand(1, 2, 4, 4)
    with torch.inference_mode():
        shortcut = block(x)
    expected = torch.zeros(1, 4, 2, 2)
    expected[:, 1:3] = x[:, :, ::2, ::2]
    torch.testing.assert_close(shortcut, expected)


def test_preprocessing_is_scale_mean_and_standard_deviation():
    network = reference.REFERENCE_NETWORKS["cifar10_resnet20"]
    white = network.preprocessing.apply(np.full((1, 3, 1, 1), 255, np.uint8))
    assert white.dtype == np.float32
    expected = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    np.testing.assert_allclose(white.ravel(), expected, rtol=1e-6)


def small_cifar(folder: Path) -> Path:
    (folder / "weights").mkdir()
    (folder / "cifar10").mkdir()
    images = np.arange(10 * 3 * 32 * 32).astype(np.uint8).reshape(10, 3, 32, 32)
    np.savez(folder / "cifar10" / "test.npz", images=images, labels=np.arange(10))
    return folder


def test_limit_takes_images_evenly_and_keeps_labels_beside_them(tmp_path):
    folder = small_cifar(tmp_path)
    everything, _ = reference.load_pixels("cifar10_resnet20", "test", folder)
    pixels, labels = reference.load_pixels("cifar10_resnet20", "test", folder, 5)
    np.testing.assert_array_equal(labels, [0, 2, 4, 6, 8])
    np.testing.assert_array_equal(pixels, everything[::2])


def test_samples_give_the_network_what_load_images_gives(tmp_path):
    folder = small_cifar(tmp_path)
    samples = reference.load_samples("cifar10_resnet20", "test", folder, 5)
    inputs, labels = reference.load_images("cifar10_resnet20", "test", folder, 5)
    np.testing.assert_array_equal(samples.arrays(0, 5)[0], inputs)
    np.testing.assert_array_equal(samples.labels, labels)


def test_environment_variable_names_the_folder(tmp_path, monkeypatch):
    folder = small_cifar(tmp_path)
    monkeypatch.setenv(reference.SHARED_VARIABLE, str(folder))
    assert reference.shared_data() == folder


def test_environment_variable_that_names_no_data_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv(reference.SHARED_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(CalibrationError, match="nowhere has no folder 'weights'"):
        reference.shared_data()


def test_half_precision_weights_are_widened(tmp_path):
    from safetensors.torch import save_file

    stored = reference.fashion_cnn().state_dict()
    halves = {name: t.half() if t.is_floating_point() else t for name, t in stored.items()}
    (tmp_path / "weights").mkdir()
    save_file(halves, tmp_path / "weights" / "fashion_cnn.safetensors")
    loaded = reference.load_network("fashion_cnn", tmp_path).state_dict()
    for name, tensor in loaded.items():
        assert tensor.dtype == stored[name].dtype
        torch.testing.assert_close(tensor, halves[name].to(tensor.dtype), rtol=0, atol=0)


@pytest.mark.parametrize("content", [None, b"not safetensors", "missing tensors"])
def test_bad_weights_are_one_line_that_names_the_file(tmp_path, content):
    from safetensors.torch import save_file

    file = tmp_path / "weights" / "fashion_cnn.safetensors"
    file.parent.mkdir()
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        save_file({"0.weight": torch.zeros(16, 1, 3, 3)}, file)
    with pytest.raises(ModelError) as raised:
        reference.load_network("fashion_cnn", tmp_path)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_unknown_names_and_splits_are_errors(tmp_path):
    with pytest.raises(ModelError, match="'resnet21'; there are cifar10_resnet20"):
        reference.load_network("resnet21", tmp_path)
    with pytest.raises(CalibrationError, match="'train' is no split of cifar10"):
        reference.load_pixels("cifar10_resnet20", "train", tmp_path)
    with pytest.raises(CalibrationError, match="cannot read the test images of cifar10"):
        reference.load_pixels("cifar10_resnet20", "test", tmp_path)
    with pytest.raises(CalibrationError, match="limit 0 asks for no images"):
        reference.load_pixels("cifar10_resnet20", "test", small_cifar(tmp_path), 0)
