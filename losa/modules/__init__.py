"""Drop-in replacements of ``nn.Linear``: masked LoRA for training, packed weights for inference; norms that train."""

from losa.modules.gated_lora import AdaLoRALinear, SoRALinear
from losa.modules.lora import LoRALinear
from losa.modules.masked_linear import MaskedLinear
from losa.modules.masked_lora import MaskedLoRALinear, dense_mode
from losa.modules.pruned_linear import PrunedLinear
from losa.modules.sparse import SparseLinear, share_rows, unpack_linears
from losa.modules.trained_norm import TrainedNorm

__all__ = [
    "MaskedLoRALinear",
    "dense_mode",
    "LoRALinear",
    "MaskedLinear",
    "PrunedLinear",
    "SoRALinear",
    "AdaLoRALinear",
    "SparseLinear",
    "TrainedNorm",
    "share_rows",
    "unpack_linears",
]
