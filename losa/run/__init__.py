"""One recipe from start to finish, and what it will cost."""

from losa.run.pipeline import run_recipe

__all__ = ["run_recipe"]
