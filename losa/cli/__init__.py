"""The command line: ``losa`` and ``python -m losa``."""

from losa.cli.app import main

__all__ = ["main"]
