"""Re-estimated batch-norm statistics against NumPy's, on the inputs that PyTorch's hooks see."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_networks import Plain, build, samples
from torch import nn

from obc_deploy.capture import capture, get_tensor
from obc_deploy.corrections import MomentStream, reestimate_batch_norms
from obc_deploy.data import Samples


@pytest.mark.parametrize("size", [3, 8, 20])
@pytest.mark.parametrize("shape", [(4, 6, 5), (4, 9)])
def test_one_norm_gets_the_moments_of_its_inputs(size, shape):
    kind = nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d
    # Far from zero, where a sum of squares would cancel.
    x = np.random.default_rng(0).normal(1000.0, 0.5, (20, *shape)).astype(np.float32)
    network = capture(kind(shape[0]).eval(), (torch.from_numpy(x[:2]),))
    progress = []
    count = reestimate_batch_norms(
        network, Samples({"x": x}).batches(size), progress=progress.append
    )
    values = x.astype(np.float64).swapaxes(0, 1).reshape(shape[0], -1)
    assert count == 1
    np.testing.assert_allclose(
        get_tensor(network.module, "running_mean"), values.mean(1), rtol=1e-7
    )
    np.testing.assert_allclose(
        get_tensor(network.module, "running_var"), values.var(1, ddof=1), rtol=1e-6
    )
    assert progress[-1] == 1.0


def test_a_network_in_one_batch_gets_what_training_mode_sees():
    model = build(Plain)
    x = samples(Plain, 64)
    network = capture(model, (torch.from_numpy(x[:2]),))
    assert reestimate_batch_norms(network, Samples({"x": x}).batches(64)) == 2

    # PyTorch's own way to the same statistics: a pass in training mode with momentum 1.
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(torch.from_numpy(x))
    for name in ("bn1", "bn2"):
        for statistic in ("running_mean", "running_var"):
            torch.testing.assert_close(
                get_tensor(network.module, f"{name}.{statistic}"),
                getattr(model.get_submodule(name), statistic),
                rtol=1e-4,
                atol=1e-6,
            )
    # The network runs in evaluation mode on them.
    model.eval()
    with torch.no_grad():
        x = torch.from_numpy(x)
        torch.testing.assert_close(network.module(x), model(x), rtol=1e-4, atol=1e-5)


def test_nothing_to_do_without_batch_norms():
    network = capture(nn.Linear(3, 2), (torch.randn(2, 3),))
    assert (
        reestimate_batch_norms(network, Samples({"x": np.ones((4, 3), np.float32)}).batches(2)) == 0
    )


def test_moments_merge_in_any_order():
    values = torch.randn(30, 3, 2, dtype=torch.float64) * 2 + 50
    merged = MomentStream()
    for part in values.split([1, 10, 2, 17]):
        merged.add(part)
    flat = values.movedim(1, 0).reshape(3, -1)
    torch.testing.assert_close(merged.mean, flat.mean(1))
    torch.testing.assert_close(merged.squares / (flat.shape[1] - 1), flat.var(1))


def test_the_reference_leaves_the_dense_network_as_it_is():
    """μ' = μ and σ' = σ where nothing was compressed, whatever the samples' own statistics."""
    import torch
    from torch import nn

    from obc_deploy.capture import capture, get_tensor
    from obc_deploy.corrections import batch_norm_moments, reestimate_batch_norms
    from obc_deploy.data import Samples
    from obc_deploy.folding import find_batch_norms

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()).eval()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2.0)
    images = torch.randn(64, 3, 8, 8)
    network = capture(model, (images[:2],))
    batches = Samples({"x": images.numpy()}).batches(64)
    reference = batch_norm_moments(network, batches)
    corrected = network.copy()
    assert reestimate_batch_norms(corrected, batches, reference=reference) == 1
    (norm,) = find_batch_norms(network.module)
    for name in (norm.mean_name, norm.variance_name):
        torch.testing.assert_close(
            get_tensor(corrected.module, name), get_tensor(network.module, name)
        )


def test_the_reference_undoes_a_shrunk_layer():
    """A layer whose output was halved and shifted behaves as before after the correction."""
    import torch
    from torch import nn

    from obc_deploy.capture import capture, get_tensor, set_tensor
    from obc_deploy.corrections import batch_norm_moments, reestimate_batch_norms
    from obc_deploy.data import Samples

    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).eval()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2.0)
    images = torch.randn(64, 3, 8, 8)
    network = capture(model, (images[:2],))
    batches = Samples({"x": images.numpy()}).batches(64)
    reference = batch_norm_moments(network, batches)
    changed = network.copy()
    set_tensor(changed.module, "0.weight", 0.5 * get_tensor(network.module, "0.weight"))
    set_tensor(changed.module, "0.bias", get_tensor(network.module, "0.bias") + 3.0)
    reestimate_batch_norms(changed, batches, reference=reference)
    torch.testing.assert_close(changed.module(images), network.module(images), rtol=1e-3, atol=1e-3)
