"""Errors a user can act on. The command line prints their message and exits with `exit_code`."""

from __future__ import annotations


class CopdError(Exception):
    """Something the user can act on: the message says what was found, what was expected and what to do."""

    exit_code = 1


class ConfigError(CopdError):
    """The run description is wrong; nothing was started."""

    exit_code = 2


class DataError(CopdError):
    """A data set or a line of one cannot be used."""


class WeightsError(CopdError):
    """A checkpoint or a Hugging Face folder cannot be used."""


class PeerLost(CopdError):
    """A branch that others depend on is gone or silent."""


class TrainingDiverged(CopdError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class Interrupted(CopdError):
    """The user asked to stop; every branch has saved the same step."""

    exit_code = 130
