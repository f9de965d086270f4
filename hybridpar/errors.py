"""Errors that a user can cause and cure.

::

    HybridparError              what happened, with the values, and the remedy; exit code 2, no traceback
    |-- ConfigError             an override or a config value is unknown or out of range
    |-- ModelError              a model cannot be built or traced into a chain
    |-- ProfileError            a profile is malformed, or belongs to another model
    |-- ClusterError            a cluster description is malformed or lacks a link
    |-- PlanError               a plan is impossible, or a plan file is malformed (the field is named)
    |   `-- MemoryLimitError    a plan needs more memory than a device has
    |-- ProgramError            a program would hang, or its actions do not fit together
    |-- DataError               a data set is missing or malformed
    |-- CheckpointError         a checkpoint is missing, foreign, or cannot be written
    |   `-- DamageError         a checkpoint is damaged
    |-- RecordError             a run's folder lacks a record, or a record is malformed (the field is named)
    |-- DivergenceError         the training left the finite numbers
    |-- StuckError              a rank did not come to a communication in time
    |-- MonitorError            GPU data that the job requires is not there
    `-- LaunchError             the job was started in a way that cannot work (world size, backend)

Everything else that is raised is a bug of ours or a fault of the machine: exit code 1, with its traceback.
"""


class HybridparError(Exception):
    """Base of all errors that a user can cause and cure."""


class ConfigError(HybridparError):
    """An override or a config value is unknown or out of range."""


class ModelError(HybridparError):
    """A model cannot be built or traced into a chain."""


class ProfileError(HybridparError):
    """A profile is malformed, or belongs to another model."""


class ClusterError(HybridparError):
    """A cluster description is malformed or lacks a link."""


class PlanError(HybridparError):
    """A plan is impossible, or a plan file is malformed."""


class MemoryLimitError(PlanError):
    """A plan needs more memory than a device has."""


class ProgramError(HybridparError):
    """A program would hang, or its actions do not fit together."""


class DataError(HybridparError):
    """A data set is missing or malformed."""


class CheckpointError(HybridparError):
    """A checkpoint is missing, foreign, or cannot be written."""


class DamageError(CheckpointError):
    """A checkpoint is damaged."""


class RecordError(HybridparError):
    """A run's folder lacks a record, or a record is malformed."""


class DivergenceError(HybridparError):
    """The training left the finite numbers."""


class StuckError(HybridparError):
    """A rank did not come to a communication in time."""


class MonitorError(HybridparError):
    """GPU data that the job requires is not there."""


class LaunchError(HybridparError):
    """The job was started in a way that cannot work."""


def require(condition: bool, name: str, value: object, remedy: str) -> None:
    """Raise ConfigError, which names a field, its value and what to give instead, unless a condition holds."""
    if not condition:
        raise ConfigError(f"{name}: {value} {remedy}")
