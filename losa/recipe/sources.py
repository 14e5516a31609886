"""Where a recipe's text comes from, and what all sections of a recipe are."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from losa.errors import shown

MAX_COUNT = 2**31 - 1


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _number_is_no_flag(cls, value, info: ValidationInfo):
        """To pydantic true is the number 1."""
        kinds = _kinds_of(cls.model_fields[info.field_name or ""].annotation)
        if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
            raise ValueError(f"expected a number, got {str(value).lower()}")
        return value


def _kinds_of(annotation: Any) -> set[Any]:
    """The types that a value may have, of a union's parts."""
    return {annotation, *get_args(annotation)}


class DataSource(Section):
    """One text source.

    ``path`` is a local file or directory (.jsonl, .json, .parquet, .txt, .raw), a Hugging Face dataset name,
    or ``builtin:pydoc/{calibration,train,heldout}``, text that every Python carries.
    """

    path: str = Field(description="file, directory, data set name or builtin text")
    format: Literal["auto", "alpaca", "messages", "text"] = Field(
        "auto", description="how a row is read; auto looks at the row's columns"
    )
    split: str = Field("train", description="split of a Hugging Face data set")
    subset: str | None = Field(None, description="subset (configuration) of a Hugging Face data set")
    text_field: str = Field("text", description="column that holds the text")
    limit: int | None = Field(None, gt=0, le=MAX_COUNT, description="use at most this many rows")


def _as_sources(value):
    if isinstance(value, (str, dict, DataSource)):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"expected a path, a mapping with a path, or a list of those; got {shown(value)}")
    return [_as_source(v) for v in value]


def _as_source(value):
    return {"path": value} if isinstance(value, str) else value


Sources = Annotated[list[DataSource], BeforeValidator(_as_sources), Field(min_length=1)]
"""At least one data source: a path, a mapping, or a list of paths and mappings."""

Source = Annotated[DataSource, BeforeValidator(_as_source)]
"""One data source: a path or a mapping."""
