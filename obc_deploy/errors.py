"""The exception tree: every error a user can cause, each one line naming the value, place and fix.

The command line prints the message and exits with `exit_code`; Python callers catch
`ObcDeployError` or one of its children.
"""


class ObcDeployError(Exception):
    """Base of all errors that this package raises on purpose."""

    exit_code: int = 2


class SchemeError(ObcDeployError, ValueError):
    """A scheme that cannot be read, or that a layer's shape forbids."""


class ModelError(ObcDeployError):
    """A model that cannot be loaded, captured, or that holds values nothing can be done with."""


class LayerError(ObcDeployError, KeyError):
    """A layer name or layer pattern that matches nothing, or a layer that cannot be compressed."""

    def __str__(self) -> str:
        """The message itself; KeyError would put it in quotes."""
        return str(self.args[0]) if self.args else ""


class CalibrationError(ObcDeployError, ValueError):
    """Calibration or evaluation data that is missing, empty, wrongly shaped or not finite."""


class ProblemError(ObcDeployError, ValueError):
    """A layer problem (weight, Hessian) that no solver can work on."""


class DeviceMemoryError(ObcDeployError, ValueError):
    """A memory limit that cannot be kept, or work that does not fit the device's memory."""


class TargetError(ObcDeployError, ValueError):
    """An unknown target, or one that cannot take what it was given."""


class BudgetError(ObcDeployError, ValueError):
    """A budget that cannot be read, that nothing was measured for, or that no plan can meet."""


class LatencyError(ObcDeployError):
    """A latency table that is damaged, of another machine, or of another network."""


class RunDirectoryError(ObcDeployError):
    """A run directory that is missing, in use, not writable or damaged."""


class DatabaseError(ObcDeployError):
    """A database of compressed layers that is missing, in use, damaged or of another problem."""


class ExportError(ObcDeployError):
    """An export that could not be written, or whose outputs differ from the model's."""


class ArtifactError(ObcDeployError):
    """An artifact file that is missing, corrupt, or not what its manifest says."""


class RuntimeMissingError(ObcDeployError):
    """A runtime that is not installed or does not work; the message has the install command."""


class RuntimeFailedError(ObcDeployError):
    """A runtime's worker crashed, hung, or refused the artifact."""


class MeasurementError(ObcDeployError, ValueError):
    """Timings or counts that say nothing: missing, not finite, or a plan that measures nothing."""


class SlowerThanDenseError(ObcDeployError):
    """A compressed network that measured slower than the dense one."""

    exit_code = 3
