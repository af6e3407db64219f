"""Run directories: what was saved comes back; what is damaged or in the way is named."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_networks import Depthwise, FixedBatch, Plain, Residual, build, samples
from torch import nn

from obc_deploy.compression import compress
from obc_deploy.data import IMAGENET, Preprocessing, Samples
from obc_deploy.errors import ObcDeployError, RunDirectoryError
from obc_deploy.manifest import Manifest
from obc_deploy.run_directory import check_free, load_run, save_run

FILES = ("manifest.json", "network.pt2", "layers.safetensors", "samples.npz")


@pytest.fixture(scope="module")
def model():
    """A compressed network with both baselines, and labelled pictures."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 4, 8, 8)).astype(np.uint8)
    how = Preprocessing(1 / 50, (1.0, 2.0, 3.0, 2.0), (1.5, 1.0, 0.3, 1 / 3))
    data = Samples({"x": pixels}, np.arange(40) % 5, how, "pictures")
    return compress(build(Plain), data, scheme="2:4+w8a8", method="magnitude", batch_size=20)


@pytest.fixture(scope="module")
def small(model):
    """The same without baselines: quicker to save."""
    return replace(model, baselines=())


@pytest.fixture(scope="module")
def saved(small, tmp_path_factory):
    return save_run(small, tmp_path_factory.mktemp("saved") / "run")


@pytest.fixture
def run(saved, tmp_path):
    """A run directory of the test's own."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def same_bits(one, other):
    if one is None or other is None:
        assert one is other
        return
    assert one.dtype == other.dtype
    assert torch.equal(one, other)


def check_same(found, wanted):
    """Every array to the bit, every record as it was."""
    assert found.manifest == wanted.manifest
    assert found.layers == wanted.layers
    assert found.ranges == wanted.ranges
    assert found.forms.keys() == wanted.forms.keys()
    for name, form in wanted.forms.items():
        other = found.forms[name]
        assert (other.scheme, other.method) == (form.scheme, form.method)
        for part in ("weight", "mask", "codes", "scale", "zero_point"):
            same_bits(getattr(other, part), getattr(form, part))
    parameters = dict(found.network.module.named_parameters())
    assert parameters.keys() == dict(wanted.network.module.named_parameters()).keys()
    for name, tensor in wanted.network.module.named_parameters():
        same_bits(parameters[name].data, tensor.data)
    nodes = [[n.name for n in m.network.module.graph.nodes] for m in (found, wanted)]
    assert nodes[0] == nodes[1]
    assert found.network.dynamic_batch == wanted.network.dynamic_batch
    for one, other in zip(found.network.example, wanted.network.example, strict=True):
        same_bits(one, other)
    assert found.samples.sha256() == wanted.samples.sha256()
    assert found.samples.preprocessing == wanted.samples.preprocessing
    assert found.samples.source == wanted.samples.source
    with torch.no_grad():
        inputs = next(iter(wanted.samples.batches(wanted.network.batch_size or 8)))
        outputs = [each.module()(*inputs) for each in (found, wanted)]
    for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in outputs), strict=True):
        same_bits(one, other)


def check_error(error, *names):
    assert isinstance(error.value, ObcDeployError)
    assert error.value.exit_code == 2
    message = str(error.value)
    assert "\n" not in message
    for name in names:
        assert name in message


def test_a_run_comes_back_to_the_bit_with_its_baselines(model, tmp_path):
    folder = model.save(tmp_path / "run")
    assert folder == tmp_path / "run"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert {path.name for path in folder.iterdir()} == {*FILES, "baselines"}
    found = load_run(folder)
    check_same(found, model)
    assert [form.error for form in found.forms.values()] == [
        pytest.approx(math.nan, nan_ok=True)
    ] * 3
    assert [each.role for each in found.baselines] == ["dense-fp32", "dense-int8"]
    for one, other in zip(found.baselines, model.baselines, strict=True):
        check_same(one, other)
        assert one.baselines == ()
    alone = load_run(str(folder), baselines=False)
    assert alone.baselines == ()
    check_same(alone, model)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 4), nn.Linear(3, 4)

    def forward(self, one, two):
        return self.left(one), self.right(two)


def two_inputs():
    draw = np.random.default_rng(0)
    one, two = (draw.standard_normal((9, size)).astype(np.float64) for size in (6, 3))
    return TwoInputs(), {"two": two, "one": one}


def labelled():
    return build(Residual), Samples({"x": samples(Residual)}, np.arange(32), IMAGENET)


@pytest.mark.parametrize(
    ("make", "scheme"),
    [
        (lambda: (build(Plain), samples(Plain)), "unstructured@0.5+w4g4-asym"),
        (lambda: (build(Depthwise), samples(Depthwise)), "w8a8"),
        (labelled, "unstructured@0.5"),
        (lambda: (build(FixedBatch), samples(FixedBatch)), "w8a8"),
        (two_inputs, "w8a8"),
    ],
    ids=["groups", "depthwise", "pruned", "fixed batch", "two inputs"],
)
def test_all_kinds_come_back(make, scheme, tmp_path):
    made = compress(*make(), scheme=scheme, baselines=False)
    found = load_run(save_run(made, tmp_path / "run"))
    check_same(found, made)
    assert (found.samples.labels is None) == (made.samples.labels is None)
    assert [form.error for form in found.forms.values()] == [
        form.error for form in made.forms.values()
    ]
    check_same(load_run(save_run(found, tmp_path / "again")), made)


def test_a_loaded_run_exports_the_same_file(small, saved, tmp_path):
    one = small.export(tmp_path / "one.onnx", "onnxruntime-qoperator")
    other = load_run(saved).export(tmp_path / "other.onnx", "onnxruntime-qoperator")
    assert one.path.read_bytes() == other.path.read_bytes()
    assert one.manifest.parity == other.manifest.parity


def test_a_relative_place_and_folders_that_are_not_there_yet(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = small.save("one/two/run[1]")
    assert folder == tmp_path / "one" / "two" / "run[1]"
    check_same(load_run("one/two/run[1]"), small)


def test_a_used_directory_is_left_alone(small, run, tmp_path):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(RunDirectoryError, match="is in use already") as error:
        save_run(small, run)
    check_error(error, str(run), "--overwrite")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match="is no run directory and is left alone") as error:
        save_run(small, tmp_path / "notes", overwrite=True)
    check_error(error, str(tmp_path / "notes"), "manifest.json", "another name")
    with pytest.raises(RunDirectoryError, match="is a file") as error:
        save_run(small, tmp_path / "notes" / "a.txt", overwrite=True)
    check_error(error, "a.txt", "another name")
    with pytest.raises(RunDirectoryError, match="cannot write") as error:
        save_run(small, tmp_path / "notes" / "a.txt" / "run")
    check_error(error, "a.txt/run", "another place")
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"run", "notes"}
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["a.txt"]


def test_overwriting_replaces_all_of_a_run(model, small, run, tmp_path):
    (run / "artifacts").mkdir()
    (run / "artifacts" / "model.onnx").write_bytes(b"of the old run")
    other = replace(model, baselines=model.baselines[:1])
    save_run(other, run, overwrite=True)
    assert {path.name for path in run.iterdir()} == {*FILES, "baselines"}
    assert [each.role for each in load_run(run).baselines] == ["dense-fp32"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    shutil.rmtree(run)
    run.mkdir()
    check_same(load_run(save_run(small, run)), small)


def test_what_a_killed_save_left_is_cleared_away(small, tmp_path):
    (tmp_path / ".run.1.partial").mkdir()
    (tmp_path / ".run.1.partial" / "network.pt2").write_bytes(b"half")
    (tmp_path / ".runner.1.partial").mkdir()
    save_run(small, tmp_path / "run")
    assert {path.name for path in tmp_path.iterdir()} == {"run", ".runner.1.partial"}


@contextlib.contextmanager
def no_file_larger_than(size):
    """What a full disk is to a writer: writing beyond so many bytes fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 2000, 12000])
def test_a_disk_that_is_full_leaves_nothing_half_written(small, saved, tmp_path, size):
    assert size < max((saved / name).stat().st_size for name in FILES)
    with no_file_larger_than(size), pytest.raises(RunDirectoryError) as error:
        save_run(small, tmp_path / "new" / "run")
    check_error(error, str(tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_leaves_the_old_run(small, run, tmp_path):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with no_file_larger_than(2000), pytest.raises(RunDirectoryError, match="cannot write"):
        save_run(small, run, overwrite=True)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


class Interrupting:
    """Stands in for a part of a model; whoever reads it is interrupted."""

    def __getattr__(self, name):
        raise KeyboardInterrupt


class InterruptingManifest(Manifest):
    def model_dump_json(self, **options):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("moment", "overwrite"),
    [
        ("network", False),
        ("forms", True),
        ("samples", False),
        ("manifest", True),
        ("baselines", False),
        ("baselines", True),
    ],
)
def test_an_interrupted_save_leaves_nothing(model, run, tmp_path, moment, overwrite):
    """Ctrl-C in the middle of each file, by way of the value that is written then."""
    part = {
        "manifest": InterruptingManifest.model_validate(model.manifest.model_dump()),
        "baselines": (model.baselines[0], replace(model.baselines[1], samples=Interrupting())),
    }.get(moment, Interrupting())
    broken = replace(model, **{moment: part})
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    place = run if overwrite else tmp_path / "deep" / "new"
    with pytest.raises(KeyboardInterrupt):
        save_run(broken, place, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(small, tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RunDirectoryError, match=r"Permission denied.*another place") as error:
            save_run(small, tmp_path / "run")
    finally:
        tmp_path.chmod(0o700)
    check_error(error, str(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["/proc/run", "/proc/obc/deep/run", "/dev/null/run"])
def test_places_where_nothing_can_be(small, place):
    for call in (lambda: check_free(Path(place)), lambda: save_run(small, Path(place))):
        with pytest.raises(
            RunDirectoryError, match=r"cannot write .*choose another place"
        ) as error:
            call()
        check_error(error, place)


def test_looking_at_a_free_place_leaves_nothing(tmp_path):
    check_free(tmp_path / "a" / "b")
    check_free(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "rubbish"])
def test_files_that_are_missing_or_damaged(run, name, damage):
    path = run / name
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {"empty": b"", "cut": whole[: len(whole) // 2], "rubbish": b"no" * 99}[damage]
        )
    with pytest.raises(RunDirectoryError) as error:
        load_run(run)
    check_error(error, str(run), "compress")


def test_no_run_directory(tmp_path):
    for place in (tmp_path / "none", tmp_path):
        with pytest.raises(
            RunDirectoryError, match="is no run directory: it has no manifest"
        ) as error:
            load_run(place)
        check_error(error, str(place), "obc-deploy compress")
    (tmp_path / "file").touch()
    with pytest.raises(RunDirectoryError) as error:
        load_run(tmp_path / "file")
    check_error(error, "file")


@pytest.mark.parametrize(
    ("role", "name"),
    [
        ("dense-fp32", "manifest.json"),
        ("dense-int8", "manifest.json"),
        ("dense-int8", "layers.safetensors"),
    ],
)
def test_a_damaged_baseline(run, saved, role, name):
    shutil.copytree(saved, run / "baselines" / role)
    (run / "baselines" / role / name).unlink()
    with pytest.raises(RunDirectoryError) as error:
        load_run(run)
    check_error(error, role)
    assert load_run(run, baselines=False).baselines == ()


def flipped(tensor, index):
    changed = tensor.clone()
    changed.view(-1)[index] += 1
    return changed


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {"conv2/codes": flipped(tensors["conv2/codes"], 5)},
        lambda tensors: {"conv2/scale": tensors["conv2/scale"] * 1.001},
        lambda tensors: {"conv2/scale": tensors["conv2/scale"][:, 0]},
        lambda tensors: {"conv2/scale": tensors["conv2/scale"][:4]},
        lambda tensors: {"conv2/zero_point": flipped(tensors["conv2/zero_point"], 0)},
        lambda tensors: {"conv2/mask": ~tensors["conv2/mask"]},
        lambda tensors: {"conv2/mask": tensors["conv2/mask"][:, :4]},
        lambda tensors: {"conv2/codes": tensors["conv2/codes"][:4]},
        lambda tensors: {"conv2/codes": None},
        lambda tensors: {"conv2/mask": None},
    ],
)
def test_layers_that_are_not_those_of_the_network(run, change):
    """There is no checksum in safetensors: a changed code would be exported as it is."""
    tensors = load_file(run / "layers.safetensors")
    tensors |= change(tensors)
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(
        {name: tensor.contiguous() for name, tensor in kept.items()}, run / "layers.safetensors"
    )
    with pytest.raises(RunDirectoryError, match="layer 'conv2'") as error:
        load_run(run)
    check_error(error, str(run), "compress again")


def test_the_network_of_another_run(run, tmp_path):
    other = compress(build(Plain, seed=1), samples(Plain), scheme="dense", baselines=False)
    save_run(other, tmp_path / "other")
    shutil.copy(tmp_path / "other" / "network.pt2", run)
    with pytest.raises(RunDirectoryError, match="layer 'conv1'") as error:
        load_run(run)
    check_error(error, str(run), "compress again")


def test_a_preprocessing_that_is_none(run):
    text = (run / "manifest.json").read_text()
    assert text.count('"scale": 0.02') == 1
    (run / "manifest.json").write_text(text.replace('"scale": 0.02', '"skale": 0.02'))
    with pytest.raises(ObcDeployError, match="is no pre-processing") as error:
        load_run(run)
    check_error(error, "skale")


def test_samples_that_were_changed_in_the_file(run):
    """NumPy's archive has checksums of its own."""
    path = run / "samples.npz"
    with zipfile.ZipFile(path) as archive:
        entry = archive.infolist()[0]
    data = bytearray(path.read_bytes())
    data[entry.header_offset + 200] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(RunDirectoryError, match="is damaged") as error:
        load_run(run)
    check_error(error, str(run))
