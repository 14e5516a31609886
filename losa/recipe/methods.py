"""The methods that a recipe may name, and everything in which they differ. A new method is a new row here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from losa.errors import RecipeError

MethodName = Literal[
    "losa", "lora", "sparse_lora", "prune_only", "finetune_then_prune", "sparse_full", "sora", "adalora"
]
"""The names of ``METHODS``."""
MAX_RANK = 128
"""The most components of an adapter."""
Adapter = Literal["masked", "dense", "weights", "gated", "budgeted"]
"""What a method trains: see ``Method``."""


@dataclass(frozen=True)
class Method:
    """One way from a dense model to a sparse one.

    ``dynamic``: in rounds, with rates and ranks that calibration decides anew each round; otherwise one round with the
    same rate and rank for every block.
    ``training``: when adapters are trained: "rounds", in every round after its pruning; "before", once, on the dense
    model; None, never.
    ``adapter``: what is trained: "masked", low-rank factors whose product is pruned along with the weight; "dense",
    factors beside the pruned weight; "gated" and "budgeted", dense ones whose rank is trained too, by an L1 penalty and
    within a budget; "weights", every kept weight itself; None, nothing.
    ``mergeable``: merging what was trained into the weights keeps both the zeros and the function.
    ``label``: the method's name in tables and figures; ``sentence``: what the model card says of it.
    ``first_rank``: how many times ``lora.rank`` components an adapter begins with.
    ``shards``: whether processes may hold the model together.
    ``package``: a package that the method needs and losa does not.
    """

    dynamic: bool
    training: Literal["rounds", "before"] | None
    adapter: Adapter | None
    mergeable: bool
    label: str
    sentence: str
    first_rank: float = 1.0
    shards: bool = True
    package: str | None = None

    @property
    def trains(self) -> bool:
        return self.training is not None

    @property
    def zeros_in_weights(self) -> bool:
        """Whether masks are written into a copy of the weights, beside which dense adapters are trained."""
        return self.training == "rounds" and self.adapter in ("dense", "gated", "budgeted")

    @property
    def ranked(self) -> bool:
        """Whether the rounds' ranks are ranks of trained adapters."""
        return self.training == "rounds" and self.adapter != "weights"

    @property
    def reconstructs(self) -> bool:
        """Whether a block that is pruned can be reconstructed: it has adapters to train, and the block that is trained
        is the block that merging gives. Whole weights would want a learning rate of their own."""
        return self.training == "rounds" and self.adapter == "masked"


METHODS: dict[MethodName, Method] = {
    "losa": Method(
        dynamic=True,
        training="rounds",
        adapter="masked",
        mergeable=True,
        label="LoSA",
        sentence="pruned round by round and fine-tuned under the mask with adapters of dynamic rank, merged at the end",
    ),
    "lora": Method(
        dynamic=False,
        training="rounds",
        adapter="dense",
        mergeable=False,
        label="pruned + LoRA (not mergeable)",
        sentence="pruned at once, fine-tuned with dense adapters, and merged under the mask, which changes the "
        "function",
    ),
    "sparse_lora": Method(
        dynamic=False,
        training="rounds",
        adapter="masked",
        mergeable=True,
        label="pruned + sparse LoRA",
        sentence="pruned at once, fine-tuned under the mask with adapters of one rank, and merged",
    ),
    "prune_only": Method(
        dynamic=False,
        training=None,
        adapter=None,
        mergeable=True,
        label="pruned only",
        sentence="pruned at once, without any training",
    ),
    "finetune_then_prune": Method(
        dynamic=False,
        training="before",
        adapter="dense",
        mergeable=True,
        label="LoRA, then pruned",
        sentence="fine-tuned dense, then pruned at once, without training afterwards",
    ),
    "sparse_full": Method(
        dynamic=False,
        training="rounds",
        adapter="weights",
        mergeable=True,
        label="pruned + all kept weights",
        sentence="pruned at once, after which every kept weight of the pruned matrices was fine-tuned under the mask",
    ),
    "sora": Method(
        dynamic=False,
        training="rounds",
        adapter="gated",
        mergeable=False,
        label="pruned + SoRA (not mergeable)",
        sentence="pruned at once, fine-tuned with dense adapters whose components an L1 penalty closes, and merged "
        "under the mask, which changes the function",
    ),
    "adalora": Method(
        dynamic=False,
        training="rounds",
        adapter="budgeted",
        mergeable=False,
        label="pruned + AdaLoRA (not mergeable)",
        sentence="pruned at once, fine-tuned with dense adapters that share out a budget of ranks, and merged under "
        "the mask, which changes the function",
        first_rank=1.5,
        shards=False,
        package="peft",
    ),
}
"""Every method by its name in recipes."""


def check_packages(names: Iterable[MethodName]) -> None:
    """Raises RecipeError where a method needs a package that is not installed."""
    for name in names:
        package = METHODS[name].package
        if package is not None and find_spec(package) is None:
            raise RecipeError(f"method: {name!r} needs the package {package}: pip install {package}")


def check_first_rank(names: Iterable[MethodName], rank: int) -> None:
    """Raises ValueError where an adapter would begin with more than ``MAX_RANK`` components, ``rank`` being
    ``lora.rank``."""
    for name in names:
        first = METHODS[name].first_rank
        if rank > (highest := int(MAX_RANK / first)):
            raise ValueError(
                f"lora.rank: expected at most {highest} for {name}, which begins with {first:g} times as many "
                f"components, got {rank}"
            )


def find_method(name: str) -> Method | None:
    """The method of that name; None for a name that is no method's, such as "dense" or one of another version."""
    return next((method for own, method in METHODS.items() if own == name), None)


def method_label(name: str) -> str:
    """A result's name in tables and figures; a name that is no method's stands for itself."""
    method = find_method(name)
    return name if method is None else method.label
