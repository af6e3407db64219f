"""Models: what a user names becomes a PyTorch module.

torchvision:NAME          with weights from a file, a torchvision weights name, or none
package.module:factory    any callable that returns a module
path/to/model.pt2         a program saved by torch.export.save
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obc_deploy.data import first_line
from obc_deploy.errors import ModelError

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram


CHECKPOINT_SUFFIXES = frozenset({".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar"})


def _state_dict(path: Path) -> dict[str, Any]:
    import torch

    if not path.is_file():
        raise ModelError(f"no checkpoint file '{path}'")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: dict[str, Any] = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ModelError(
            f"cannot read checkpoint '{path}': {first_line(error)}; save its state_dict anew"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise ModelError(
            f"checkpoint '{path}' holds a {type(state).__name__} that is no state_dict of tensors; "
            "save model.state_dict()"
        )
    return {
        name.removeprefix("module."): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Load a checkpoint into a module, every tensor in its place, as float32.

    Raises:
        ModelError: the file cannot be read, or its names or shapes are not the model's.
    """
    state = _state_dict(path)
    own = model.state_dict()
    missing = [
        name for name in own if name not in state and not name.endswith("num_batches_tracked")
    ]
    extra = [name for name in state if name not in own]
    if missing or extra:
        raise ModelError(
            f"checkpoint '{path}' does not fit {type(model).__name__}: {len(missing)} tensors "
            f"missing{f' (first {missing[0]!r})' if missing else ''}, {len(extra)} unknown"
            f"{f' (first {extra[0]!r})' if extra else ''}"
        )
    wrong = [name for name in state if state[name].shape != own[name].shape]
    if wrong:
        raise ModelError(
            f"checkpoint '{path}': '{wrong[0]}' has shape {tuple(state[wrong[0]].shape)}, "
            f"{type(model).__name__} needs {tuple(own[wrong[0]].shape)}"
        )
    model.load_state_dict(state, strict=False)
    return model


def _from_torchvision(name: str, weights: str | None) -> nn.Module:
    from torchvision import models

    if name not in models.list_models():
        import difflib

        near = difflib.get_close_matches(name, models.list_models(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ModelError(f"torchvision has no model '{name}'{hint}")
    named: Any = None
    path = Path(weights) if weights and weights.lower() != "none" else None
    if path is not None and not path.is_file() and path.suffix not in CHECKPOINT_SUFFIXES:
        options = models.get_model_weights(name)
        member = str(path).rpartition(".")[2]
        if member not in options.__members__:
            raise ModelError(
                f"torchvision's {name} has no weights '{weights}'; it has "
                f"{', '.join(options.__members__)}, or give a checkpoint file"
            )
        named, path = options[member], None
    keywords: dict[str, Any] = {}
    parameters = inspect.signature(models.get_model_builder(name)).parameters
    if "init_weights" in parameters or name in {"googlenet", "inception_v3"}:
        keywords["init_weights"] = True
    state_classes = None
    if path is not None:
        state = _state_dict(path)
        heads = [
            t
            for n, t in state.items()
            if n.endswith(("fc.weight", "classifier.weight")) or n.startswith("classifier.")
        ]
        heads = [t for t in heads if t.dim() == 2]
        state_classes = int(heads[-1].shape[0]) if heads else None
    if state_classes is not None:
        keywords["num_classes"] = state_classes
    try:
        model: nn.Module = models.get_model(name, weights=named, **keywords)
    except Exception as error:
        raise ModelError(
            f"torchvision cannot build '{name}' with weights '{weights}': {first_line(error)}"
        ) from error
    return load_weights(model, path) if path is not None else model


def load_model(spec: str, *, weights: str | None = None) -> nn.Module | ExportedProgram:
    """The model a user names.

    Args:
        spec: `torchvision:NAME`, `package.module:factory`, or the path of a `.pt2` file.
        weights: a checkpoint file (.safetensors, .pt, .pth), a torchvision weights name, or None.

    Raises:
        ModelError: there is no such model, or its checkpoint does not fit.
    """
    import torch
    from torch import nn

    if spec.startswith("torchvision:"):
        return _from_torchvision(spec.removeprefix("torchvision:"), weights)
    path = Path(spec)
    if path.suffix == ".pt2":
        if not path.is_file():
            raise ModelError(f"no file '{spec}'")
        if weights:
            raise ModelError(f"'{spec}' has its weights inside; leave --weights out")
        try:
            return torch.export.load(spec)
        except Exception as error:
            raise ModelError(
                f"cannot read '{spec}' as an exported program: {first_line(error)}; "
                "write it with torch.export.save"
            ) from error
    if ":" not in spec:
        raise ModelError(
            f"'{spec}' is no model: give torchvision:NAME, package.module:factory, or a .pt2 file"
        )
    module_name, _, attribute = spec.partition(":")
    try:
        made = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, ValueError, TypeError) as error:
        raise ModelError(
            f"cannot import '{module_name}' for '{spec}': {error}; is it on PYTHONPATH?"
        ) from error
    except AttributeError as error:
        raise ModelError(f"module '{module_name}' has no '{attribute}'") from error
    try:
        model = made() if callable(made) and not isinstance(made, nn.Module) else made
    except Exception as error:
        raise ModelError(f"'{spec}' failed: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"'{spec}' gave a {type(model).__name__}, not a torch.nn.Module")
    if weights and weights.lower() != "none":
        return load_weights(model, Path(weights))
    return model
