"""What goes wrong inside a runtime, by whose fault."""

from __future__ import annotations


class BadArtifact(Exception):
    """The file is not a model that anything could load."""


class Refused(Exception):
    """The runtime will not load or run this model, or not with these inputs."""


class Explained(Refused):
    """The same, where the message says what to do."""


class Missing(Exception):
    """The runtime cannot be imported in this interpreter."""


class NoDevice(Exception):
    """The device that the runtime computes on is not here; the message says what is missing."""
