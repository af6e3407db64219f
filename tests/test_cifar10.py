"""Real trained CIFAR-10 networks the whole way: accuracy before, after, and in the runtime."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import obc_deploy as obc
from obc_deploy.accuracy import predictions, top1
from obc_deploy.benchmarks.reference_networks import load_network, load_samples, shared_data

SHARED = shared_data()
IMAGES = 1000

pytestmark = [
    pytest.mark.shared,
    pytest.mark.slow,
    pytest.mark.skipif(
        SHARED is None,
        reason="the trained CIFAR-10 networks are not here; set OBC_DEPLOY_SHARED to their folder",
    ),
]


@pytest.fixture(scope="module")
def resnet20():
    torch.manual_seed(0)
    return obc.calibrate(
        load_network("cifar10_resnet20", SHARED),
        load_samples("cifar10_resnet20", "calib", SHARED, limit=256),
        source="cifar10_resnet20",
        batch_size=64,
    )


@pytest.fixture(scope="module")
def images():
    return load_samples("cifar10_resnet20", "test", SHARED, limit=IMAGES)


@pytest.mark.parametrize(
    ("scheme", "method", "most_lost"),
    [
        ("w8a8", "rtn", 0.015),
        ("w4", "exact_obs", 0.03),
        ("2:4+w8a8", "exact_obs", 0.03),
        ("block4@0.5+w8a8", "exact_obs", 0.05),
        ("unstructured@0.5", "exact_obs", 0.02),
    ],
)
def test_accuracy_lost_is_small_and_measured(resnet20, images, scheme, method, most_lost):
    # One standard error is 0.9 points on 1,000 images; both networks see the same ones.
    made = obc.compress(
        resnet20, scheme=scheme, method=method, fallback="w8a8", evaluation=images, baselines=False
    )
    accuracy = made.manifest.accuracy
    assert accuracy.samples == IMAGES
    assert accuracy.dense == top1(load_network("cifar10_resnet20", SHARED), images)
    assert accuracy.dense - accuracy.compressed <= most_lost


def test_exact_obs_beats_magnitude_on_every_layer_and_on_accuracy(resnet20, images):
    kwargs = {"scheme": "block4@0.7", "fallback": "dense", "baselines": False, "skip": ["linear"]}
    exact = obc.compress(resnet20, evaluation=images, **kwargs)
    magnitude = obc.compress(resnet20, method="magnitude", evaluation=images, **kwargs)
    assert exact.manifest.accuracy.compressed > magnitude.manifest.accuracy.compressed
    for layer, form in exact.forms.items():
        hessian = resnet20.statistics[layer].hessian
        weight = next(x for x in resnet20.layers if x.name == layer)
        dense = obc_matrix(resnet20, weight)
        assert form.mask.sum() == magnitude.forms[layer].mask.sum()
        unfolded = resnet20.pruned[(layer, "block4@0.7", None, 0.01, "float32")].weight
        rough = resnet20.pruned[(layer, "block4@0.7", "magnitude", 0.01, "float32")].weight
        assert output_error(dense, unfolded, hessian) < output_error(dense, rough, hessian)


def obc_matrix(calibrated, layer):
    from obc_deploy.capture import get_tensor
    from obc_deploy.layers import weight_to_matrix

    return weight_to_matrix(layer, get_tensor(calibrated.network.module, layer.weight_name))


def output_error(weight, compressed, hessian):
    difference = (weight - compressed).double()
    return float((difference @ hessian.double() * difference).sum())


@pytest.mark.parametrize("target", ["onnxruntime", "onnxruntime-qoperator"])
def test_artifact_answers_as_pytorch_does(resnet20, images, tmp_path, target):
    from obc_deploy.runtimes.session import open_session

    made = obc.compress(resnet20, scheme="w8a8", method="rtn", baselines=False)
    artifact = made.export(tmp_path / "model.onnx", target=target, batch_size=50)
    wanted = predictions(made.module(target), images).numpy()
    with open_session(artifact.runtime, artifact.path, threads=1, batch_size=50) as session:
        name = session.inputs[0].name
        found = np.concatenate(
            [
                next(iter(session.run({name: images.arrays(i, i + 50)[0]}).values())).argmax(1)
                for i in range(0, IMAGES, 50)
            ]
        )
    assert (found == wanted).mean() >= 0.99
