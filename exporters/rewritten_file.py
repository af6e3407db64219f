"""An ONNX file from anywhere, with integer or sparse float layers, gets our operators.

Each layer does where measured costs say that it is faster so. Takes integer operators (QLinearConv,
QGemm, ...) and QuantizeLinear/DequantizeLinear pairs around float ones, which become integer
operators first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from obc_deploy.data import first_line
from obc_deploy.errors import ArtifactError, ExportError
from obc_deploy.targets import Target
from obc_deploy.whole_files import whole_file

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

CHECKED_INPUTS = 4
"""Random inputs that a rewritten file is compared with the original on."""
_SEED = 0

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class RewrittenFile:
    """What became of an ONNX file.

    Attributes:
        path: the new file.
        size_bytes: its size.
        dense_size_bytes: that of the same integer graph with every weight stored.
        layers: those on our operators: the value each computes, and the fraction of its blocks
            that are not stored, 0.0 for some.
        integer_layers: convolutions and fully connected layers in integers, and float ones with
            zeros, all of them.
        relative_error: ‖new - old‖ / ‖old‖ of the outputs on random inputs; None unchecked.
        sample: one such input, of batch size 1 where that is open: input name to array.
    """

    path: Path
    size_bytes: int
    dense_size_bytes: int
    layers: tuple[tuple[str, float], ...]
    integer_layers: int
    relative_error: float | None
    sample: Mapping[str, Array] = field(compare=False)


def _load(source: Path) -> onnx.ModelProto:
    import onnx

    try:
        proto = onnx.load(source)
        onnx.checker.check_model(proto)
    except OSError as error:
        raise ArtifactError(
            f"'{source}' cannot be read ({error.strerror}); name an ONNX file"
        ) from error
    except Exception as error:
        raise ArtifactError(
            f"'{source}' is no valid ONNX file ({first_line(error)}); export it again"
        ) from error
    opset = next((entry.version for entry in proto.opset_import if not entry.domain), 0)
    if opset < 13:
        raise ExportError(
            f"'{source.name}' uses opset {opset}; convert it to 13 or later "
            "(onnx.version_converter)"
        )
    return proto


def _random_inputs(proto: onnx.ModelProto, source: Path, count: int) -> list[dict[str, Array]]:
    """Inputs of batch size 1 where it is open: normal values, small integers."""
    from onnx.helper import tensor_dtype_to_np_dtype

    constants = {item.name for item in proto.graph.initializer}
    rng = np.random.default_rng(_SEED)
    found: list[dict[str, Array]] = [{} for _ in range(count)]
    for value in proto.graph.input:
        if value.name in constants:
            continue
        sizes = []
        for axis, size in enumerate(value.type.tensor_type.shape.dim):
            if size.dim_value < 1 and axis > 0:
                raise ExportError(
                    f"input '{value.name}' of '{source.name}' has an open size on axis {axis}; "
                    "fix all but the batch size (onnxruntime.tools.make_dynamic_shape_fixed)"
                )
            sizes.append(max(size.dim_value, 1))
        dtype = tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        for each in found:
            whole = np.issubdtype(dtype, np.integer)
            values = rng.integers(0, 2, sizes) if whole else rng.standard_normal(sizes)
            each[value.name] = values.astype(dtype)
    return found


def _run(proto: onnx.ModelProto, feeds: list[dict[str, Array]]) -> list[list[Array]]:
    import onnxruntime

    from obc_deploy.runtimes.onnxruntime_cpu import libraries

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    for library in libraries({node.domain for node in proto.graph.node}):
        options.register_custom_ops_library(str(library))
    try:
        session = onnxruntime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return [session.run(None, feed) for feed in feeds]
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot run the graph: {first_line(error)}") from error


def _learn_sizes(model: ir.Model, feed: dict[str, Array]) -> None:
    """Give every value the sizes that it has on one input."""
    import onnx
    import onnx_ir as ir

    proto = ir.to_proto(model)
    known = {output.name for output in proto.graph.output}
    names = [name for node in proto.graph.node for name in node.output if name]
    more = [name for name in dict.fromkeys(names) if name not in known]
    proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in more)
    (found,) = _run(proto, [feed])
    arrays = dict(zip([*(output.name for output in proto.graph.output)], found, strict=True))
    for node in model.graph:
        for value in node.outputs:
            array = arrays.get(value.name or "")
            if array is not None and hasattr(array, "shape"):
                value.shape = ir.Shape(array.shape)
                value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))


def _forget_sizes(model: ir.Model) -> None:
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None


def unsigned_activations(model: ir.Model) -> int:
    """Write int8 codes between QuantizeLinear and DequantizeLinear as uint8 ones, 128 higher.

    Returns how many values were changed; each stands for the same numbers as before.
    """
    from obc_deploy.exporters.edit import add_initializer, constant

    changed = 0
    for node in list(model.graph):
        if node.op_type != "QuantizeLinear" or node.domain or len(node.inputs) < 3:
            continue
        readers = [use.node for use in node.outputs[0].uses()]
        if node.outputs[0].is_graph_output() or not all(
            reader.op_type == "DequantizeLinear" for reader in readers
        ):
            continue
        zeros = [constant(each.inputs[2]) for each in (node, *readers) if len(each.inputs) > 2]
        if len(zeros) != len(readers) + 1:
            continue
        if any(zero is None or zero.size != 1 or zero.dtype != np.int8 for zero in zeros):
            continue
        for each, zero in zip((node, *readers), zeros, strict=True):
            assert zero is not None
            code = np.array(int(zero.reshape(())) + 128, np.uint8)
            each.replace_input_with(2, add_initializer(model, f"zero_point_{int(code)}", code))
        node.outputs[0].type = None
        changed += 1
    return changed


def rewrite_onnx(source: Path, path: Path, target: Target, *, check: bool = True) -> RewrittenFile:
    """Write an ONNX file with our sparse operators where they make it faster.

    Args:
        source: an ONNX file with quantized layers, or with zeros in float ones.
        path: an .onnx file, or a folder that gets a file of the source's name.
        target: one whose runtime loads our sparse kernels.
        check: compare outputs with the original's on random inputs.

    Raises:
        ArtifactError: the source cannot be read.
        ExportError: none of its layers gets faster, or the outputs differ.
        RuntimeMissingError: the sparse kernels are not built.
    """
    import onnx
    import onnx_ir as ir

    from obc_deploy.exporters.edit import drop_dead
    from obc_deploy.exporters.parity import QUANTIZED_TOLERANCE, relative_error
    from obc_deploy.exporters.qoperator import to_qoperators
    from obc_deploy.exporters.sparse_float import LEAST_ZEROS, float_zeros
    from obc_deploy.exporters.sparse_onnxruntime import to_sparse_operators, zero_blocks
    from obc_deploy.runtimes.onnxruntime_cpu import libraries
    from obc_deploy.runtimes.regions import joined
    from obc_deploy.runtimes.sparse import DOMAIN

    if not target.sparse_operators:
        raise ExportError(
            f"target {target.name} is exported from a run directory; from an ONNX file only "
            "--target ort-sparse"
        )
    libraries({DOMAIN})
    original = _load(source)
    if any(node.domain == DOMAIN for node in original.graph.node):
        raise ExportError(
            f"'{source.name}' is on sparse operators already; give the file that it was made from"
        )
    feeds = _random_inputs(original, source, CHECKED_INPUTS)
    model = ir.from_proto(original)
    unsigned_activations(model)
    _learn_sizes(model, feeds[0])
    to_qoperators(model, linear_as_convolution=False, operators=target.integer_operators)
    drop_dead(model)
    _learn_sizes(model, feeds[0])
    integer, floats = zero_blocks(model), float_zeros(model)
    if not integer and max(floats.values(), default=0.0) < LEAST_ZEROS:
        raise ExportError(
            f"'{source.name}' has no integer layer (QLinearConv, QGemm) and none that becomes one: "
            "quantize it first, in QOperator form, with uint8 activations and symmetric int8 "
            "weights, or prune its float layers to 85 % zeros and more"
        )
    dense_bytes = ir.to_proto(model).ByteSize()
    sparse = to_sparse_operators(model, target.processor)
    if not sparse.layers:
        raise ExportError(
            f"no layer of '{source.name}' gets faster on our operators: at most {sparse.zeros:.0%} "
            "of a layer's blocks of four input channels are zero; prune it in blocks (block4@0.5 "
            "or more), with uint8 activations and symmetric int8 weights"
        )
    _forget_sizes(model)
    model.ir_version = min(model.ir_version, target.ir_version)
    proto = joined(ir.to_proto(model))
    error = None
    if check:
        wanted, found = _run(original, feeds), _run(proto, feeds)
        error = relative_error(
            [array for each in found for array in each],
            [array for each in wanted for array in each],
        )
        if not error <= QUANTIZED_TOLERANCE:
            raise ExportError(
                f"the rewritten '{source.name}' differs from it by {error:.2e} (relative, "
                f"{len(feeds)} random inputs; {QUANTIZED_TOLERANCE:g} is allowed)"
            )
    file = path if path.suffix == ".onnx" else path / source.name
    if file.exists() and file.samefile(source):
        raise ExportError(f"'{file}' is the source itself; give another --output")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as partial:
            onnx.save(proto, partial)
    except OSError as failure:
        raise ExportError(
            f"cannot write '{file}': {failure.strerror}; choose a writable place"
        ) from failure
    return RewrittenFile(
        file, file.stat().st_size, dense_bytes, sparse.layers, len(integer) + len(floats), error,
        feeds[0],
    )  # fmt: skip
