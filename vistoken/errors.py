"""Errors that vistoken raises on purpose: what was given, what is allowed, what to do."""

from __future__ import annotations


class VistokenError(Exception):
    """Base of every error that vistoken raises on purpose."""


class ModelNotSupported(VistokenError, TypeError):
    """No host knows this model, or the model lacks a part that its host needs."""


class AttachError(VistokenError, RuntimeError):
    """The edit cannot be made, or cannot be undone, in the state the model is in."""


class MethodError(VistokenError, ValueError):
    """A method, an option or a budget has a name or a value that is not allowed."""


class BackendUnavailable(VistokenError, RuntimeError):
    """The backend that was asked for by name cannot run here."""


class DataError(VistokenError, ValueError):
    """A file, an image, a prompt or a record is not what it must be."""
