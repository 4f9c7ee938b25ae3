"""Errors that stop a batch job, below the engine's tree.

RaywardError
`- JobError
   |- CorpusError       the input cannot be planned or read
   |- OutputError       the output folder cannot be used, or holds the work of another run
   |- ResourceError     the cluster has no room for the actors that were asked for
   |- WorkerError       a task on a worker failed in a way that no row explains
   |- ScorerError       the model cannot be loaded on the workers, or keeps dying
   |- ServedModelError  the application of --via-serve is not there, or serves another model
   |- GeneratorError    the generator cannot be reached, loaded or used, or keeps dying
   |- UnpublishedModelError  no figures are published for the model that is to be verified
   |- ComparisonError   Transformers has no class for the model that is to be verified, or cannot load it
   |- MissingPackageError  a job needs a package that is not installed
   `- TooManyErrorsError    more rows failed than --max-errors allows
"""

from __future__ import annotations

from serve_app.reward_model.errors import RaywardError


class JobError(RaywardError):
    """A job stops; what it committed stays and a restart goes on from there."""


class CorpusError(JobError):
    """The input is missing, unreadable, changed, or its columns are not those of conversations."""


class OutputError(JobError):
    """The output folder cannot be written, or it holds the work of a run with other settings."""


class MissingPackageError(JobError):
    """A job needs a package that is not installed; the text names the extra that brings it."""


class UnpublishedModelError(JobError):
    """No figures are published for the model that is to be verified."""


class ComparisonError(JobError):
    """Transformers has no class of its own for the model that is to be verified, or cannot load it here."""


class ResourceError(JobError):
    """The cluster has no room for the scoring actors that were asked for."""


class WorkerError(JobError):
    """A task on a worker failed in a way that no row explains."""


class ScorerError(JobError):
    """The scorer failed in a way that is no row's fault."""


class GeneratorError(JobError):
    """The generator failed in a way that is no prompt's fault."""


class TooManyErrorsError(JobError):
    """More rows failed than the caller allows."""


class ServedModelError(JobError):
    """The application that should score is not there, or it serves another model than was asked for."""
