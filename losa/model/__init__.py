"""A Hugging Face model: its blocks found, its linears wrapped and merged."""

from losa.model.blocks import Blocks, Targets, block_linears, find_blocks, find_linears
from losa.model.norms import train_norms
from losa.model.wrapping import merge_model, sparsity_of, unwrap_model, wrap_model, wrapped_linears

__all__ = [
    "Blocks",
    "Targets",
    "block_linears",
    "find_blocks",
    "find_linears",
    "merge_model",
    "sparsity_of",
    "train_norms",
    "unwrap_model",
    "wrap_model",
    "wrapped_linears",
]
