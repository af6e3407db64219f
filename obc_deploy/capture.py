"""Capture: a PyTorch model becomes a graph of ATen operators whose parameters keep their names.

Everything after this works on that graph: no matter whether the model was written with modules,
functions, or came as a `.pt2` file, a convolution is a convolution node with a named weight.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import operator
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from obc_deploy.errors import ModelError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

EXAMPLE_BATCH = 2
"""Samples in the example a model is captured with; one would fix the batch dimension at 1."""


@dataclass(frozen=True)
class Network:
    """A captured model in evaluation mode.

    Attributes:
        module: the functional ATen graph; parameters and buffers keep the model's names.
        example: one small batch of inputs on the CPU, as the graph takes them.
        dynamic_batch: whether the first dimension of every input may change.
    """

    module: fx.GraphModule
    example: tuple[Tensor, ...]
    dynamic_batch: bool

    @property
    def input_names(self) -> tuple[str, ...]:
        """The inputs' names in the order the graph takes them."""
        # A node called like a built-in ("input") is renamed; its target keeps the name.
        return tuple(
            str(node.target) for node in self.module.graph.nodes if node.op == "placeholder"
        )

    @property
    def batch_size(self) -> int | None:
        """The only batch size the graph takes, or None where any is fine."""
        return None if self.dynamic_batch else int(self.example[0].shape[0])

    def copy(self) -> Network:
        """The same network with parameters of its own."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Network(copy.deepcopy(self.module), self.example, self.dynamic_batch)

    def branch(self) -> Network:
        """The same network with a graph of its own, its tensors shared until `set_tensor`.

        Networks made from one another differ in a few tensors; what stays the same is held once.
        """
        # Parameters of their own, so that moving one network to a device leaves the other.
        shared: dict[int, Any] = {
            id(parameter): nn.Parameter(parameter.detach(), requires_grad=False)
            for parameter in self.module.parameters()
        }
        shared |= {id(buffer): buffer for buffer in self.module.buffers()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = copy.deepcopy(self.module, shared)
        return Network(module, self.example, self.dynamic_batch)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from printing its own traceback of an error that becomes one line here."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _export(model: nn.Module, example: tuple[Tensor, ...], *, dynamic: bool) -> ExportedProgram:
    shapes: Any = None
    if dynamic:
        shapes = tuple({0: torch.export.Dim.AUTO} for _ in example)
    with _quiet(), torch.no_grad():
        return torch.export.export(model, example, dynamic_shapes=shapes)


def _export_any_batch(
    model: nn.Module, inputs: tuple[Tensor, ...]
) -> tuple[ExportedProgram, tuple[Tensor, ...]]:
    """The program with its batch left open, or of one sample where the model fixes the batch."""
    pair = tuple(at_batch(tensor, EXAMPLE_BATCH) for tensor in inputs)
    one = tuple(tensor[:1] for tensor in inputs)
    try:
        program = _export(model, pair, dynamic=True)
    except Exception as error:
        try:
            return _export(model, one, dynamic=False), one
        except Exception:
            raise error from None
    if _has_dynamic_batch(program):
        return program, pair
    return _export(model, one, dynamic=False), one


def _input_nodes(program: ExportedProgram) -> list[fx.Node]:
    names = set(program.graph_signature.user_inputs)
    return [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]


def _has_dynamic_batch(program: ExportedProgram) -> bool:
    return all(not isinstance(node.meta["val"].shape[0], int) for node in _input_nodes(program))


def input_names(model: nn.Module | ExportedProgram) -> tuple[str, ...]:
    """The names under which a model takes its inputs, in order, as far as it tells."""
    if isinstance(model, nn.Module):
        try:
            return tuple(inspect.signature(model.forward).parameters)
        except (TypeError, ValueError):
            return ()
    return tuple(str(node.target) for node in _input_nodes(model))


def _check_inputs(program: ExportedProgram, inputs: Sequence[Tensor]) -> None:
    """Whether samples of these shapes and types are what an exported program takes."""
    for node, given in zip(_input_nodes(program), inputs, strict=True):
        wanted = node.meta["val"]
        sizes = [size if isinstance(size, int) else None for size in wanted.shape[1:]]
        fits = len(sizes) == given.dim() - 1 and all(
            size in (None, found) for size, found in zip(sizes, given.shape[1:], strict=True)
        )
        if not fits or given.dtype != wanted.dtype:
            raise ModelError(
                f"input '{node.target}' of the exported program takes {_kind(wanted)} samples of "
                f"shape {tuple(wanted.shape[1:])}, the data has {_kind(given)} ones of shape "
                f"{tuple(given.shape[1:])}; give such samples, or export the program for these"
            )


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _captured(program: ExportedProgram) -> fx.GraphModule:
    with _quiet():
        module = program.run_decompositions({}).module(check_guards=False)
    if not isinstance(module, fx.GraphModule):
        raise ModelError(
            f"the captured model is a {type(module).__name__}, not a graph; export it anew"
        )
    module.graph.eliminate_dead_code()
    module.recompile()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def capture(model: nn.Module | ExportedProgram, example: Sequence[Tensor]) -> Network:
    """Capture a model with `torch.export` on an example batch, its batch left open if it can be.

    The caller's model is left as it is: the captured graph owns copies of its parameters, as
    float32, in evaluation mode.

    Args:
        model: a module or an exported program (from a `.pt2` file).
        example: one tensor an input, first dimension the batch.

    Raises:
        ModelError: the model cannot be captured, was captured in training mode, or holds a
            parameter that is not finite.
    """
    inputs = tuple(tensor.detach().cpu() for tensor in example)
    if isinstance(model, nn.Module):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = copy.deepcopy(model).cpu().float().eval()
        _check_finite(model)
        try:
            program, inputs = _export_any_batch(model, inputs)
        except Exception as error:
            raise ModelError(
                f"torch.export cannot capture {type(model).__name__} on inputs of shape "
                f"{[tuple(tensor.shape) for tensor in inputs]}: {_reason(error)}; check that the "
                "input shape fits the model, and rewrite data-dependent Python control flow in "
                "forward"
            ) from error
        module = _captured(program)
    else:
        program = model
        names = program.graph_signature.user_inputs
        if len(names) != len(inputs):
            raise ModelError(
                f"the exported program takes {len(names)} inputs ({', '.join(map(str, names))}), "
                f"the calibration data has {len(inputs)}; name the .npz keys after the inputs"
            )
        _check_inputs(program, inputs)
        batch = EXAMPLE_BATCH
        if not _has_dynamic_batch(program):
            batch = int(_input_nodes(program)[0].meta["val"].shape[0])
        inputs = tuple(at_batch(tensor, batch) for tensor in inputs)
        # The program's parameters are the caller's.
        module = copy.deepcopy(_captured(program))
    _check_finite(module)
    _check_evaluation(module)
    return Network(module, inputs, _has_dynamic_batch(program))


def recapture(network: Network) -> Network:
    """A captured network captured once more after its graph was edited; parameters are taken over.

    Its nodes then have the names that they will have when it was saved and loaded.
    """
    program = _export(network.module, network.example, dynamic=network.dynamic_batch)
    return Network(_captured(program), network.example, network.dynamic_batch)


def at_batch(tensor: Tensor, batch: int) -> Tensor:
    """The tensor repeated or cut to that many samples."""
    repeats = -(-batch // tensor.shape[0])
    return tensor.repeat(repeats, *([1] * (tensor.dim() - 1)))[:batch].contiguous()


def _check_finite(module: nn.Module) -> None:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        # A sum keeps every NaN and Inf and needs no memory; it may overflow by itself.
        if not tensor.is_floating_point() or bool(torch.isfinite(tensor.detach().sum())):
            continue
        if count := int((~torch.isfinite(tensor)).sum()):
            raise ModelError(
                f"parameter '{name}' has {count} values that are NaN or Inf; load a checkpoint "
                "that is finite (torch.isfinite finds the first bad one)"
            )


def _check_evaluation(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        name = str(node.target)
        training = "batch_norm" in name and "no_training" not in name and "functional" in name
        if training or (name == "aten.batch_norm.default" and node.args[5]):
            raise ModelError(
                f"'{node.name}' was captured in training mode; call model.eval() before "
                "exporting it"
            )


def parameter_name(node: object) -> str | None:
    """The dotted name of the parameter or buffer a node stands for, or None."""
    if isinstance(node, fx.Node) and node.op == "get_attr" and isinstance(node.target, str):
        return node.target
    return None


def get_tensor(module: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that dotted name."""
    return operator.attrgetter(name)(module)  # type: ignore[no-any-return]


def set_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in place of the parameter or buffer of that dotted name, or add a buffer."""
    prefix, _, leaf = name.rpartition(".")
    owner = module
    for part in prefix.split(".") if prefix else ():
        child = getattr(owner, part, None)
        if child is None:
            child = nn.Module()
            owner.add_module(part, child)
        owner = child
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    elif leaf in owner._buffers:
        owner._buffers[leaf] = tensor
    else:
        owner.register_buffer(leaf, tensor)


class Watcher(fx.Interpreter):
    """Runs a captured graph and shows each node's value to `watch(node, value)`."""

    def __init__(self, module: fx.GraphModule, watch: Any) -> None:
        super().__init__(module)
        self._watch = watch

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, then show its value."""
        value = super().run_node(n)
        if n.op == "call_function":
            self._watch(n, value)
        return value
