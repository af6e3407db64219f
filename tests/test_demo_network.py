"""The demo network's checkpoint is what its training recorded, and its images never change."""

from __future__ import annotations

import builtins
import json
import struct

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from obc_deploy import demo_network as demo
from obc_deploy.benchmarks import train_demo_model as training
from obc_deploy.data import load_samples
from obc_deploy.errors import CalibrationError, ModelError


@pytest.fixture(scope="module")
def split() -> demo.DigitsSplit:
    return demo.load_digits_split()


@pytest.fixture(scope="module")
def recorded() -> dict[str, str]:
    with safe_open(demo.CHECKPOINT, "pt") as checkpoint:
        return checkpoint.metadata()


@pytest.fixture(scope="module")
def scores(split) -> torch.Tensor:
    network = demo.digits_net()
    inputs = torch.from_numpy(demo.DIGITS_PREPROCESSING.apply(split.test_images))
    with torch.inference_mode():
        return torch.cat([network(part) for part in inputs.split(100)])


def test_checkpoint_loads_strictly_and_is_small():
    network = demo.DigitsNet()
    network.load_state_dict(load_file(demo.CHECKPOINT), strict=True)
    parameters = sum(p.numel() for p in network.parameters())
    assert 800_000 <= parameters <= 1_200_000
    assert demo.CHECKPOINT.stat().st_size < 6_000_000


def test_test_accuracy_is_the_recorded_one(scores, split, recorded):
    correct = int((scores.argmax(1).numpy() == split.test_labels).sum())
    assert correct == int(recorded["correct"])
    assert f"{correct / len(split.test_labels):.6f}" == recorded["accuracy"]
    assert correct >= 0.985 * len(split.test_labels)
    assert int(recorded["test_images"]) == len(split.test_labels)


def test_no_test_image_is_so_close_a_call_that_rounding_could_turn_it(scores):
    best = scores.topk(2, dim=1).values
    assert float((best[:, 0] - best[:, 1]).min()) > 1e-3


def test_checkpoint_records_how_it_was_made(recorded):
    assert int(recorded["seed"]) >= 0
    assert int(recorded["epochs"]) >= 1
    assert int(recorded["threads"]) >= 1
    assert recorded["torch"][0].isdigit()


def test_split_is_the_one_the_checkpoint_was_trained_on(split, recorded):
    demo.load_digits_split.cache_clear()
    again = demo.load_digits_split()
    assert again is not split
    assert training.split_digest(again) == recorded["split_sha256"]
    assert training.split_digest(split) == recorded["split_sha256"]


def test_split_uses_every_scan_once_and_fifty_of_each_digit_for_testing(split):
    from sklearn.datasets import load_digits

    digits = load_digits()
    counted = {}
    for scan, label in zip(demo.enlarge(digits.images), digits.target, strict=True):
        key = (scan.tobytes(), int(label))
        counted[key] = counted.get(key, 0) + 1
    for images, labels in (
        (split.train_images, split.train_labels),
        (split.test_images, split.test_labels),
    ):
        for image, label in zip(images, labels, strict=True):
            counted[image.tobytes(), int(label)] -= 1
    assert set(counted.values()) == {0}
    np.testing.assert_array_equal(np.bincount(split.test_labels), [50] * 10)


def test_no_test_image_is_a_training_image(split):
    train = {image.tobytes() for image in split.train_images}
    assert not train & {image.tobytes() for image in split.test_images}


def test_every_training_prefix_mixes_classes(split):
    for count in (10, 70, 1000):
        of_each = np.bincount(split.train_labels[:count], minlength=10)
        assert set(of_each) == {count // 10}


def test_split_cannot_be_changed_by_a_caller(split):
    with pytest.raises(ValueError, match="read-only"):
        split.train_images[0] = 0
    images, _ = demo.calibration_images()
    images[:] = 0
    assert demo.calibration_images()[0].any()


def test_enlarging_agrees_with_an_independent_bilinear_one():
    rng = np.random.default_rng(3)
    scans = rng.integers(0, 17, (20, 8, 8)).astype(np.float64)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(scans)[:, None] * 255 / 16, size=(32, 32), mode="bilinear"
    )
    pixels = demo.enlarge(scans)
    assert (pixels.shape, pixels.dtype) == ((20, 1, 32, 32), np.uint8)
    assert np.abs(pixels - expected.numpy()).max() <= 0.5 + 1e-9


def test_preprocessing_matches_the_training_pixels(split):
    scaled = split.train_images * demo.DIGITS_SCALE
    assert (round(scaled.mean(), 2),) == demo.DIGITS_MEAN
    assert (round(scaled.std(), 2),) == demo.DIGITS_STD
    inputs = demo.DIGITS_PREPROCESSING.apply(split.test_images[:8])
    pixels = torch.from_numpy(split.test_images[:8].astype(np.float32))
    np.testing.assert_allclose(training.normalize(pixels).numpy(), inputs, atol=1e-6)


@pytest.mark.parametrize(
    ("factory", "images", "labels"),
    [
        ("calibration_samples", "train_images", "train_labels"),
        ("test_samples", "test_images", "test_labels"),
    ],
)
def test_factories_work_by_name_and_bring_their_preprocessing(split, factory, images, labels):
    samples = load_samples(f"obc_deploy.demo_network:{factory}")
    np.testing.assert_array_equal(samples.labels, getattr(split, labels))
    np.testing.assert_array_equal(
        samples.arrays(0, 4)[0], demo.DIGITS_PREPROCESSING.apply(getattr(split, images)[:4])
    )


@pytest.mark.parametrize(
    ("factory", "images", "labels"),
    [
        ("calibration_images", "train_images", "train_labels"),
        ("test_images", "test_images", "test_labels"),
    ],
)
def test_bare_factories_give_pixels_and_labels(split, factory, images, labels):
    pixels, classes = getattr(demo, factory)()
    assert (pixels.dtype, classes.dtype) == (np.uint8, np.int64)
    np.testing.assert_array_equal(pixels, getattr(split, images))
    np.testing.assert_array_equal(classes, getattr(split, labels))


@pytest.mark.parametrize("batch", [1, 5])
def test_exports_with_a_dynamic_batch(batch):
    network = demo.digits_net()
    program = torch.export.export(
        network,
        (torch.zeros(2, 1, 32, 32),),
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
    )
    inputs = torch.randn(batch, 1, 32, 32, generator=torch.Generator().manual_seed(batch))
    with torch.inference_mode():
        torch.testing.assert_close(program.module()(inputs), network(inputs))


def test_shapes_suit_block_sparse_kernels_and_the_exact_solver():
    network = demo.DigitsNet()
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert max(m.weight[0].numel() for m in convolutions) <= 1152
    assert all(m.out_channels % 16 == 0 for m in convolutions)
    assert all(m.in_channels % 16 == 0 for m in convolutions[1:])


def test_work_is_what_the_docstring_says():
    from torch.utils.flop_counter import FlopCounterMode

    network = demo.DigitsNet().eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(torch.zeros(1, 1, 32, 32))
    assert round(counter.get_total_flops() / 2e6) == 103
    assert round(sum(p.numel() for p in network.parameters()) / 1e4) == 84


def test_untrained_network_follows_the_seed_and_needs_no_checkpoint(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "CHECKPOINT", tmp_path / "missing.safetensors")
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(demo.digits_net(pretrained=False).state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def truncated() -> bytes:
    return demo.CHECKPOINT.read_bytes()[:5000]


def without_tensors() -> bytes:
    header = json.dumps({}).encode()
    return struct.pack("<Q", len(header)) + header


@pytest.mark.parametrize("content", [None, truncated, without_tensors])
def test_broken_checkpoint_is_one_line_that_names_the_file(monkeypatch, tmp_path, content):
    file = tmp_path / "weights.safetensors"
    if content is not None:
        file.write_bytes(content())
    monkeypatch.setattr(demo, "CHECKPOINT", file)
    with pytest.raises(ModelError) as raised:
        demo.digits_net()
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_scikit_learn_names_the_command(monkeypatch):
    real_import = builtins.__import__

    def without_sklearn(name, *arguments, **options):
        if name.startswith("sklearn"):
            raise ModuleNotFoundError(name)
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    demo.load_digits_split.cache_clear()
    with pytest.raises(CalibrationError, match=r'pip install "obc-deploy\[demo\]"'):
        demo.calibration_images()


def small_split(split: demo.DigitsSplit) -> demo.DigitsSplit:
    return demo.DigitsSplit(
        *(split.train_images[:96], split.train_labels[:96]),
        *(split.test_images[:100], split.test_labels[:100]),
    )


def test_training_repeats_itself_and_follows_the_seed(split):
    few = small_split(split)
    first, again, other = (training.train(few, 1, seed).state_dict() for seed in (1, 1, 2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_training_writes_a_checkpoint_that_scores_what_it_records(split, monkeypatch, tmp_path):
    monkeypatch.setattr(training, "load_digits_split", lambda: small_split(split))
    threads = torch.get_num_threads()
    output = tmp_path / "new" / "weights.safetensors"
    try:
        training.main(["--epochs", "1", "--seed", "7", "--threads", "1", "--output", str(output)])
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    with safe_open(output, "pt") as checkpoint:
        recorded = checkpoint.metadata()
    monkeypatch.setattr(demo, "CHECKPOINT", output)
    assert training.correct_predictions(demo.digits_net(), small_split(split)) == int(
        recorded["correct"]
    )
    assert (recorded["seed"], recorded["epochs"], recorded["threads"]) == ("7", "1", "1")
    assert [path.name for path in output.parent.iterdir()] == ["weights.safetensors"]


@pytest.mark.parametrize("arguments", [["--epochs", "0"], ["--threads", "0"]])
def test_training_refuses_nothing_to_do(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        training.main(arguments)
    assert stopped.value.code == 2
    assert "must be 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize(("correct", "total"), [(0, 20), (13, 20), (496, 500), (500, 500)])
def test_interval_agrees_with_scipy(correct, total):
    from scipy.stats import binomtest

    low, high = training.wilson_interval(correct, total)
    expected = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    assert low == pytest.approx(expected.low, abs=1e-5)
    assert high == pytest.approx(expected.high, abs=1e-5)


def test_augmentation_of_limits_zero_changes_nothing(monkeypatch, split):
    for limit in ("MAX_ROTATION", "MAX_SHIFT", "MAX_RESIZE"):
        monkeypatch.setattr(training, limit, 0.0)
    images = torch.from_numpy(split.train_images[:4].astype(np.float32))
    augmented = training.augment(images, torch.Generator().manual_seed(0))
    torch.testing.assert_close(augmented, images, rtol=0, atol=2e-2)


def test_augmentation_gives_each_image_its_own_small_change(split):
    images = torch.from_numpy(split.train_images[:1].astype(np.float32)).repeat(8, 1, 1, 1)
    augmented = training.augment(images, torch.Generator().manual_seed(0))
    assert float(augmented.min()) >= 0
    assert float(augmented.max()) <= 255
    assert len({image.numpy().tobytes() for image in augmented}) == 8
    # A shift is at most 2 pixels, so a digit that keeps 4 from the edge keeps most of its ink.
    assert float((augmented.sum((1, 2, 3)) / images.sum((1, 2, 3))).min()) > 0.7
