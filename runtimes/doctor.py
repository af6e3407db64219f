"""What works on this machine, what does not, why, and the command that changes it."""

from __future__ import annotations

import ctypes
import platform
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obc_deploy import native
from obc_deploy.errors import ObcDeployError
from obc_deploy.runtimes import sparse, tensorrt
from obc_deploy.runtimes.contract import RuntimeInfo
from obc_deploy.runtimes.fingerprint import Fingerprint, take_fingerprint
from obc_deploy.runtimes.registry import RUNTIMES
from obc_deploy.runtimes.session import open_session
from obc_deploy.targets import INTEGER_PRODUCTS

if TYPE_CHECKING:
    from rich.console import Group

PACKAGES = ("obc-deploy", "torch", "torchvision", "onnx", "onnxruntime", "numpy", "safetensors")


@dataclass(frozen=True)
class CpuFeature:
    """An instruction set that matters.

    Attributes:
        name: its name.
        present: the CPU has it.
        meaning: what that means for speed or results.
    """

    name: str
    present: bool
    meaning: str


@dataclass(frozen=True)
class SolverInfo:
    """Whether the compiled row solvers work; without them the exact solver runs on torch, slowly.

    Attributes:
        works: they solved a small problem.
        instruction_set: the one in use, "avx512", "avx2" or "portable"; None where they do not run.
        reason: why they do not work, with the fix; None where they do.
    """

    works: bool
    instruction_set: str | None
    reason: str | None


@dataclass(frozen=True)
class SparseKernelsInfo:
    """Whether the sparse kernels for ONNX Runtime work.

    Attributes:
        works: ONNX Runtime loaded them, and they computed a small layer.
        instruction_set: the one in use, of `sparse.INSTRUCTION_SETS`; None where they do not load.
        reason: why they do not work, with the fix; None where they do.
    """

    works: bool
    instruction_set: str | None
    reason: str | None


@dataclass(frozen=True)
class Diagnosis:
    """Everything `obc-deploy doctor` says.

    Attributes:
        runtimes: each runtime, tried on a small graph where it is installed.
        solvers: the compiled row solvers, tried on a small problem.
        sparse_kernels: the sparse kernels for ONNX Runtime, tried on a small layer.
        machine: the machine.
        cpu_features: those that matter here, with what their presence or absence means.
        versions: installed packages; None where one is missing.
        python: version of this interpreter.
        compiler: path of a C++ compiler, or None.
    """

    runtimes: tuple[RuntimeInfo, ...]
    solvers: SolverInfo
    sparse_kernels: SparseKernelsInfo
    machine: Fingerprint
    cpu_features: tuple[CpuFeature, ...]
    versions: dict[str, str | None]
    python: str
    compiler: str | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "runtimes": [runtime.as_dict() for runtime in self.runtimes],
            "solvers": asdict(self.solvers),
            "sparse_kernels": asdict(self.sparse_kernels),
            "machine": self.machine.as_dict(),
            "cpu_features": [asdict(feature) for feature in self.cpu_features],
            "versions": dict(self.versions),
            "python": self.python,
            "compiler": self.compiler,
        }


def _write_probe(path: Path) -> None:
    """A graph that every runtime takes: y = relu(x · 2)."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "two"], ["doubled"]),
            helper.make_node("Relu", ["doubled"], ["y"]),
        ],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 16])],
        [numpy_helper.from_array(2 * np.eye(16, dtype=np.float32), "two")],
    )
    opset = helper.make_opsetid("", 13)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), path)


def _built(probe: Path) -> Path:
    """An engine of the probe graph, by whichever library is here."""
    from obc_deploy.exporters.engine import build_engine

    return build_engine(probe).path


def try_runtime(info: RuntimeInfo, probe: Path, timeout_s: float = 120.0) -> RuntimeInfo:
    """The same information after running the runtime, where installed, on the probe graph."""
    import numpy as np

    if not info.works:
        return info
    values = np.linspace(-1, 1, 16, dtype=np.float32).reshape(1, 16)
    try:
        if info.name == tensorrt.NAME:
            probe = _built(probe)
        with open_session(info.name, probe, threads=1, timeout_s=timeout_s) as session:
            found = session.run({"x": values})["y"]
            version = session.version
    except ObcDeployError as error:
        return replace(info, works=False, reason=str(error))
    if not np.allclose(found, np.maximum(2 * values, 0), atol=1e-6):
        wrong = f"{info.title} computed a wrong result on a graph of two operators; reinstall it"
        return replace(info, works=False, reason=wrong)
    return replace(info, version=version)


def try_solvers() -> SolverInfo:
    """The compiled row solvers after pruning one row with uncorrelated inputs: smallest first."""
    import numpy as np

    if not native.is_available():
        return SolverInfo(False, None, native.why_missing())
    name = native.instruction_set()
    weight = np.array([[3.0, -1.0, 4.0, 0.5, 2.0]])
    cols = weight.size
    identity, group = np.eye(cols), np.zeros(1, dtype=np.int64)
    order, increase = np.zeros(cols, dtype=np.int32), np.zeros(cols, dtype=np.float32)
    control = native.Control(0, 0)
    prune = native.library().obc_prune_columns

    def call() -> int:
        layer = native.Layer(
            1, cols, 1, identity.ctypes.data, identity.ctypes.data, group.ctypes.data,
            weight.ctypes.data, cols, 1, ctypes.addressof(control),
        )  # fmt: skip
        to = order.ctypes.data, increase.ctypes.data
        return int(prune(ctypes.addressof(layer), 32, cols, cols, *to))

    native.run(call, control, cols**3, lambda _: None)
    smallest = np.argsort(weight[0] ** 2)
    if (order == smallest).all() and np.allclose(increase, weight[0, smallest] ** 2):
        return SolverInfo(True, name, None)
    return SolverInfo(
        False, name, "they computed a wrong result on a row of five weights; reinstall obc-deploy, "
        f"or set {native.DISABLE_VARIABLE}=0 to do without them",
    )  # fmt: skip


def _sparse_probe() -> bytes:
    """A graph of one sparse operator: y = x · w, where w has one block of four twos."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    weights: dict[str, Any] = {
        "values": np.full((1, 4), 2, np.int8),
        "mask": np.array([[0b0000], [0b0010]], np.uint8),
        "weight_scale": np.ones(1, np.float32),
    }
    node = helper.make_node(
        "SparseLinearDequantize", ["x", *weights], ["y"], domain=sparse.DOMAIN,
        features=16, input_scale=1.0, input_zero_point=0,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [
        helper.make_opsetid("", 13),
        helper.make_opsetid(sparse.DOMAIN, sparse.DOMAIN_VERSION),
    ]
    probe: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    return probe


def try_sparse_kernels() -> SparseKernelsInfo:
    """The sparse kernels after ONNX Runtime, in this process, computed a small layer with them."""
    import numpy as np
    import onnxruntime

    if not sparse.is_available():
        return SparseKernelsInfo(False, None, sparse.why_missing())
    name = sparse.instruction_set()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        options.register_custom_ops_library(str(sparse.library_path()))
        session = onnxruntime.InferenceSession(
            _sparse_probe(), options, providers=["CPUExecutionProvider"]
        )
        (found,) = session.run(None, {"x": np.arange(16, dtype=np.uint8)[None]})
    except Exception as error:  # ONNX Runtime has one class for each of its error codes
        said = " ".join(str(error).split())
        return SparseKernelsInfo(
            False, name, f"ONNX Runtime {onnxruntime.__version__} does not run them ({said}): "
            "install onnxruntime 1.17 or later",
        )  # fmt: skip
    if np.array_equal(found, [[0, 2 * (4 + 5 + 6 + 7)]]):
        return SparseKernelsInfo(True, name, None)
    return SparseKernelsInfo(
        False, name, "they computed a wrong result on a layer of two outputs; reinstall "
        f"obc-deploy, or set {sparse.DISABLE_VARIABLE}=0 to do without them",
    )  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def explain_cpu(features: tuple[str, ...], machine: str) -> tuple[CpuFeature, ...]:
    """What the CPU's features mean for compressed networks.

    Args:
        features: those it has, as the Linux kernel spells them.
        machine: its architecture, as `platform.machine` spells it.
    """
    has = set(features)
    dot = not INTEGER_PRODUCTS.isdisjoint(has)
    if machine in ("aarch64", "arm64"):
        return (
            CpuFeature(
                "SDOT",
                dot,
                "8-bit products are added four at a time"
                if dot
                else "int8 networks are hardly faster than float ones",
            ),
        )
    return (
        CpuFeature(
            "AVX2",
            "avx2" in has,
            "DeepSparse runs" if "avx2" in has else "DeepSparse does not run on this CPU",
        ),
        CpuFeature(
            "AVX-512",
            "avx512f" in has,
            "16 floats an instruction"
            if "avx512f" in has
            else "8 floats an instruction: float networks run at AVX2 speed",
        ),
        CpuFeature(
            "VNNI",
            dot,
            "four 8-bit products an instruction: int8 is faster, and exact"
            if dot
            else "int8 is hardly faster than float, and ONNX Runtime's 8-bit products (uint8 "
            "activations, int8 weights) saturate at 16 bits: use 7-bit weights (w7a8) or float",
        ),
        CpuFeature(
            "AMX",
            "amx_int8" in has,
            "tile products for dense int8 and bfloat16"
            if "amx_int8" in has
            else "no tile products: dense int8 runs at VNNI speed"
            if dot
            else "no tile products",
        ),
    )


def diagnose(timeout_s: float = 120.0) -> Diagnosis:
    """Look at the machine, and run each installed runtime on a small graph in its own process.

    Args:
        timeout_s: seconds any runtime may take to answer.
    """
    machine = take_fingerprint()
    with tempfile.TemporaryDirectory(prefix="obc-doctor-") as folder:
        probe = Path(folder) / "probe.onnx"
        _write_probe(probe)
        tried = [try_runtime(runtime.info(), probe, timeout_s) for runtime in RUNTIMES.values()]
    compiler = next(
        (found for name in ("g++", "clang++", "c++") if (found := shutil.which(name))), None
    )
    return Diagnosis(
        runtimes=tuple(tried),
        solvers=try_solvers(),
        sparse_kernels=try_sparse_kernels(),
        machine=machine,
        cpu_features=explain_cpu(machine.cpu_features, platform.machine()),
        versions={package: _version(package) for package in PACKAGES},
        python=platform.python_version(),
        compiler=compiler,
    )


def _size(number: int) -> str:
    return f"{number / 2**30:.1f} GiB"


def render(diagnosis: Diagnosis) -> Group:
    """The diagnosis as tables for a terminal."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    def mark(good: bool) -> str:
        return "[green]yes[/green]" if good else "[red]no[/red]"

    runtimes = Table("runtime", "works", "version", "", title="Runtimes", title_justify="left")
    for info in diagnosis.runtimes:
        notes = [] if info.works else [escape(f"{info.reason}"), escape(f"{info.install_command}")]
        notes += [escape(info.licence)] if info.licence else []
        runtimes.add_row(info.title, mark(info.works), info.version or "-", "\n".join(notes))

    features = Table("CPU feature", "here", "means", title="CPU", title_justify="left")
    for feature in diagnosis.cpu_features:
        features.add_row(feature.name, mark(feature.present), escape(feature.meaning))

    machine = diagnosis.machine
    rest = Table(show_header=False, title="Machine and packages", title_justify="left")
    rest.add_row(
        "CPU",
        f"{escape(machine.cpu)}, {machine.physical_cores} cores ({machine.usable_cores} usable)",
    )
    rest.add_row("memory", _size(machine.memory_bytes))
    rest.add_row("system", escape(f"{machine.system}, kernel {machine.kernel}"))
    rest.add_row("governor", machine.governor or "not readable")
    rest.add_row("load", " ".join(f"{load:.2f}" for load in machine.load_average))
    gpus = "\n".join(
        f"{gpu.name}, {_size(gpu.memory_bytes)}, driver {gpu.driver}, "
        f"compute capability {gpu.compute_capability}"
        for gpu in machine.gpus
    )
    rest.add_row("GPU", escape(gpus) or "none")
    for part, state in (
        ("compiled solvers", diagnosis.solvers),
        ("sparse kernels", diagnosis.sparse_kernels),
    ):
        rest.add_row(
            part,
            f"[green]yes[/green], with {state.instruction_set}"
            if state.works
            else f"[red]no[/red]: {escape(str(state.reason))}",
        )
    rest.add_row("compiler", diagnosis.compiler or "none: install g++ (apt install g++)")
    rest.add_row("python", diagnosis.python)
    for package, version in diagnosis.versions.items():
        rest.add_row(package, version or "not installed")
    return Group(runtimes, features, rest)
