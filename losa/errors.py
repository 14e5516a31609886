"""Errors a user can act on. The CLI prints their message without a traceback and exits with code 1."""


class LosaError(Exception):
    """Base of every error that losa raises on purpose."""


class RecipeError(LosaError):
    """A recipe is missing, malformed, or asks for something impossible."""


class DataError(LosaError):
    """A data source is missing, empty, or not in the expected format."""


class ModelError(LosaError):
    """A model cannot be loaded, or has no structure that losa can work on."""


class NumericsError(LosaError):
    """A statistic, loss or weight became non-finite, or a Hessian singular."""


class OutputError(LosaError):
    """The output cannot be written, or fails its final check."""
