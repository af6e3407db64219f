"""Everything that a user may bring as data becomes the same samples; every mistake is named."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from obc_deploy.data import (
    IMAGENET,
    ImageOptions,
    Preprocessing,
    Samples,
    as_samples,
    load_samples,
)
from obc_deploy.errors import CalibrationError

X = np.arange(60, dtype=np.float32).reshape(5, 3, 2, 2)
LABELS = np.array([0, 1, 2, 1, 0])


def same(found, labels=None, inputs=X):
    (array,) = found.inputs.values()
    np.testing.assert_array_equal(array, inputs)
    if labels is None:
        assert found.labels is None
    else:
        np.testing.assert_array_equal(found.labels, labels)
        assert found.labels.dtype == np.int64


@pytest.mark.parametrize(
    ("data", "labels"),
    [
        (X, None),
        (torch.from_numpy(X), None),
        ((X, LABELS), LABELS),
        ((torch.from_numpy(X), torch.from_numpy(LABELS).int()), LABELS),
        ({"images": X, "labels": LABELS}, LABELS),
        ({"anything": X}, None),
        ([X[:2], X[2:]], None),
        ([(X[:2], LABELS[:2]), (X[2:], LABELS[2:])], LABELS),
        ([[torch.from_numpy(X[:4]), torch.from_numpy(LABELS[:4])], [X[4:], LABELS[4:]]], LABELS),
        ([{"x": X[:3], "y": LABELS[:3]}, {"x": X[3:], "y": LABELS[3:]}], LABELS),
        ((part for part in (X[:1], X[1:])), None),
    ],
)
def test_what_a_python_caller_may_have(data, labels):
    same(as_samples(data), labels)


def test_a_data_loader():
    dataset = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(LABELS))
    same(as_samples(torch.utils.data.DataLoader(dataset, batch_size=2)), LABELS)


def test_several_inputs():
    other = np.ones((5, 7), np.float32)
    assert list(as_samples((X, other)).inputs) == ["input_0", "input_1"]
    assert list(as_samples({"one": X, "two": other}).inputs) == ["one", "two"]


def test_samples_pass_through():
    samples = Samples({"x": X})
    assert as_samples(samples) is samples
    assert as_samples(samples, preprocessing=IMAGENET).preprocessing is IMAGENET


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (7, "is a int"),
        (None, "is a NoneType"),
        ([1, 2], "is a int"),
        (b"bytes", "is a bytes"),
        ([], "is empty"),
        ({}, "none is an array of samples"),
        ({"labels": LABELS}, "none is an array of samples"),
        (np.zeros((0, 3), np.float32), "is empty"),
        (np.ones(()), "is empty"),
        ((X, LABELS[:3]), "5 samples and 3 labels"),
        ({"a": X, "b": X[:2]}, "different numbers of samples"),
        ([X, X[:, :2]], r"batch 1 of 'memory' has samples of shape .*2, 2, 2"),
        (np.array(["a", "b"]), "holds <U1 values; give numbers"),
    ],
)
def test_data_that_is_none(data, named):
    with pytest.raises(CalibrationError, match=named) as error:
        as_samples(data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(value):
    bad = X.copy()
    bad[3, 1, 0, 1] = value
    with pytest.raises(
        CalibrationError, match="sample 3 of input 'images' in 'memory' holds NaN or"
    ):
        as_samples(bad)


def test_npz_and_npy_files(tmp_path):
    np.save(tmp_path / "x.npy", X)
    same(load_samples(str(tmp_path / "x.npy")))
    np.savez(tmp_path / "x.npz", images=X, labels=LABELS, names=np.array(list("abcde")))
    same(load_samples(str(tmp_path / "x.npz")), LABELS)
    np.savez(tmp_path / "plain.npz", X)
    same(load_samples(str(tmp_path / "plain.npz")))
    first = load_samples(str(tmp_path / "x.npz"), limit=2)
    same(first, LABELS[:2], X[:2])
    assert first.source == str(tmp_path / "x.npz")


def test_a_seeded_choice():
    samples = Samples({"x": X}, LABELS)
    chosen = samples.take(3, seed=4)
    assert len(chosen) == 3
    index = [int(row.flat[0]) // 12 for row in chosen.inputs["x"]]
    assert sorted(set(index)) == index
    np.testing.assert_array_equal(chosen.labels, LABELS[index])
    np.testing.assert_array_equal(samples.take(3, seed=4).inputs["x"], chosen.inputs["x"])
    assert {tuple(samples.take(3, seed=s).inputs["x"][:, 0, 0, 0]) for s in range(8)} != {
        tuple(chosen.inputs["x"][:, 0, 0, 0])
    }
    assert samples.take(None) is samples.take(9) is samples


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("missing.npz", None),
        ("missing.npy", None),
        ("text.npz", b"not a zip"),
        ("text.npy", b"not an array"),
        ("cut.npz", b"PK\x03\x04 and then nothing"),
        ("empty.npy", b""),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CalibrationError, match=f"{name}'.*; (save it anew|give the path)") as error:
        load_samples(str(path))
    assert "\n" not in str(error.value)


def test_a_cut_file_and_an_object_array(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", images=np.random.default_rng(0).random((50, 40)))
    whole = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CalibrationError, match="save it anew with numpy"):
        load_samples(str(tmp_path / "x.npz"))
    np.save(tmp_path / "o.npy", np.array([{}, {}]), allow_pickle=True)
    with pytest.raises(CalibrationError, match="save it anew with numpy"):
        load_samples(str(tmp_path / "o.npy"))


def test_an_empty_file_is_named_for_what_it_is(tmp_path):
    np.save(tmp_path / "x.npy", X[:0])
    with pytest.raises(CalibrationError, match=r"x\.npy' is empty: give at least one sample$"):
        load_samples(str(tmp_path / "x.npy"))


@pytest.fixture
def folder(tmp_path):
    """Two classes of pictures, wide and tall, each of one colour."""
    for index, (name, size) in enumerate([("cat", (40, 20)), ("dog", (20, 40)), ("dog", (30, 30))]):
        place = tmp_path / "pictures" / name
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (10 * index, 20, 30)).save(place / f"{index}.png")
    return tmp_path / "pictures"


def test_image_folder(folder):
    found = load_samples(str(folder), images=ImageOptions(resize=16, crop=8))
    images = found.inputs["images"]
    assert (images.shape, images.dtype) == ((3, 3, 8, 8), np.uint8)
    assert found.labels.tolist() == [0, 1, 1]
    assert found.preprocessing is IMAGENET
    for index in range(3):
        assert images[index, :, 3, 3].tolist() == [10 * index, 20, 30]
    assert len(load_samples(str(folder), limit=2)) == 2
    # A limit takes from all of the folder, not from its first class alone.
    assert load_samples(str(folder), limit=2).labels.tolist() == [0, 1]


@pytest.mark.parametrize("size", [(50, 70), (71, 53), (40, 40), (25, 33), (60, 47)])
def test_pictures_are_resized_and_cropped_as_torchvision_does(tmp_path, size):
    transforms = pytest.importorskip("torchvision.transforms")
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    found = load_samples(str(tmp_path), images=ImageOptions(resize=25, crop=20))
    pipeline = transforms.Compose([transforms.Resize(25), transforms.CenterCrop(20)])
    wanted = np.asarray(pipeline(Image.fromarray(noise))).transpose(2, 0, 1)
    np.testing.assert_array_equal(found.inputs["images"][0], wanted)
    assert found.labels is None


def test_image_folders_that_cannot_be_used(folder, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(CalibrationError, match=r"image folder .*none' holds no picture"):
        load_samples(str(tmp_path / "none"))
    with pytest.raises(CalibrationError, match=r"3 different sizes; give a crop size"):
        load_samples(str(folder), images=ImageOptions(resize=None, crop=None))
    (folder / "cat" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(CalibrationError, match=r"cannot read picture .*broken\.png"):
        load_samples(str(folder))


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "my_factories.py").write_text(
        "import numpy as np\n"
        "VALUES = np.ones((3, 2), np.float32)\n"
        "def pair():\n    return VALUES, np.array([0, 1, 0])\n"
        "def broken():\n    raise RuntimeError('no disk\\nno hope')\n"
        "def needs(argument):\n    return VALUES\n"
    )
    (tmp_path / "my_broken_module.py").write_text("import no_such_package_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("factories")
def test_factories():
    same(load_samples("my_factories:VALUES"), inputs=np.ones((3, 2)))
    same(load_samples("my_factories:pair"), [0, 1, 0], np.ones((3, 2)))


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("my_factories:nothing", "module 'my_factories' has no 'nothing'"),
        ("my_factories:broken", "failed: RuntimeError: no disk$"),
        ("my_factories:needs", "failed: TypeError"),
        ("no_such_module_at_all:f", "cannot import 'no_such_module_at_all'.*PYTHONPATH"),
        ("my_broken_module:f", "cannot import 'my_broken_module'.*no_such_package_at_all"),
        (":f", "cannot import ''"),
        ("nowhere", "is no image folder, .npz or .npy file, or package.module:factory"),
    ],
)
def test_names_that_lead_nowhere(spec, named):
    with pytest.raises(CalibrationError, match=named) as error:
        load_samples(spec)
    assert "\n" not in str(error.value)


def test_preprocessing_is_scale_mean_std():
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 5), dtype=np.uint8)
    found = IMAGENET.apply(images)
    mean, std = np.array(IMAGENET.mean), np.array(IMAGENET.std)
    wanted = (images / 255.0 - mean[:, None, None]) / std[:, None, None]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
    assert IMAGENET.as_dict() == {
        "scale": 1 / 255, "mean": list(IMAGENET.mean), "std": list(IMAGENET.std)
    }  # fmt: skip
    assert Preprocessing.from_dict(IMAGENET.as_dict()) == IMAGENET


@pytest.mark.parametrize(
    "values", [{}, {"scale": 1.0, "mean": [0.5]}, {"scale": "x", "mean": [], "std": []}]
)
def test_values_that_are_no_preprocessing(values):
    with pytest.raises(CalibrationError, match="is no pre-processing; give scale, mean and std"):
        Preprocessing.from_dict(values)


def test_uint8_is_preprocessed_and_floats_are_not():
    pixels = np.full((2, 3, 2, 2), 255, np.uint8)
    (found,) = Samples({"x": pixels}, preprocessing=IMAGENET).arrays(0, 2)
    np.testing.assert_allclose(found, IMAGENET.apply(pixels))
    (found,) = Samples({"x": pixels}).arrays(0, 2)
    np.testing.assert_allclose(found, 1.0)
    (found,) = Samples({"x": X.astype(np.float64)}, preprocessing=IMAGENET).arrays(1, 3)
    np.testing.assert_array_equal(found, X[1:3])
    assert found.dtype == np.float32
    (found,) = Samples({"x": np.array([[1, 2]])}).arrays(0, 1)
    assert found.dtype == np.int64


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"mean": (0.5,)}, "1 means and 0 standard deviations"),
        ({"mean": (0.5,), "std": (0.0,)}, "divides by std"),
    ],
)
def test_preprocessing_that_makes_no_sense(arguments, named):
    with pytest.raises(CalibrationError, match=named):
        Preprocessing(**arguments)


def test_preprocessing_of_other_channels():
    with pytest.raises(
        CalibrationError, match=r"3 channel means, the images have shape \(1, 4, 4\)"
    ):
        IMAGENET.apply(np.zeros((2, 1, 4, 4), np.uint8))


def test_batches():
    samples = Samples({"x": X, "n": LABELS})
    sizes = [tuple(part.shape[0] for part in batch) for batch in samples.batches(2)]
    assert sizes == [(2, 2), (2, 2), (1, 1)]
    exact = samples.batches(2, exact=True)
    assert len(exact) == len(list(exact)) == len(list(exact)) == 2
    assert torch.equal(torch.cat([x for x, _ in samples.batches(3)]), torch.from_numpy(X))
    with pytest.raises(CalibrationError, match="batch size 0: give 1 or more"):
        samples.batches(0)


def test_hash_tells_samples_apart():
    digest = Samples({"x": X}, LABELS).sha256()
    assert digest == Samples({"x": X.copy()}, LABELS.copy()).sha256()
    others = [
        Samples({"x": X}),
        Samples({"y": X}, LABELS),
        Samples({"x": X.astype(np.float64)}, LABELS),
        Samples({"x": X.reshape(5, 12)}, LABELS),
        Samples({"x": X + 1}, LABELS),
        Samples({"x": X}, LABELS + 1),
    ]
    assert len({digest, *(other.sha256() for other in others)}) == 1 + len(others)
    wanted = hashlib.sha256(b"x:float32:(5, 3, 2, 2)" + X.tobytes()).hexdigest()
    assert others[0].sha256() == wanted
    assert Samples({"x": X}, LABELS).take(2).sha256() != digest
