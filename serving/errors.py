"""What can go wrong with a model or its registry."""

from __future__ import annotations


class ServingError(Exception):
    """The service can't start or go on; the message says why and what to do."""


class ModelRefusedError(ServingError):
    """A version that is not to be served: corrupt, or not what its registry says."""


class RegistryError(ServingError):
    """The registry is away, or has no such version; it may be asked again."""
