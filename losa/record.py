"""What a run leaves behind, as plain data: written to losa_config.json, read by reports and `losa inspect`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field


@dataclass
class RoundRecord:
    """One LoSA round. Per-block lists are ordered as ``RunRecord.blocks``; ``damping`` is what each linear's Hessian
    needed, None where it stayed singular and Wanda's mask was taken."""

    index: int
    target_sparsity: float
    mean_rank: float | None
    sparsity: list[float]
    ranks: list[int]
    errors: list[float] | None = None
    keep_n: list[int] | None = None
    m: int | None = None
    importance: list[float] | None = None
    similarity: list[list[float]] | None = None
    damping: dict[str, float | None] = field(default_factory=dict)
    train_steps: int = 0
    train_tokens: int = 0
    train_loss: float | None = None
    perplexity: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class MethodResult:
    """One row of the final table; perplexities on the recipe's evaluation text."""

    method: str
    perplexity: float | None
    sparsity: float
    zeros: int
    prunable: int
    seconds: float
    mergeable: bool = True
    perplexity_unmerged: float | None = None
    train_tokens: int = 0
    parameters_trained: int = 0


@dataclass
class MaskRecord:
    """Checksum (SHA-256 of the packed bytes) and counts of one linear's mask."""

    sha256: str
    shape: list[int]
    kept: int


@dataclass
class RunRecord:
    losa_version: str
    method: str
    recipe: dict
    model: str
    blocks: list[str]
    environment: dict
    rounds: list[RoundRecord] = field(default_factory=list)
    results: list[MethodResult] = field(default_factory=list)
    masks: dict[str, MaskRecord] = field(default_factory=dict)
    evaluation: dict | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> RunRecord:
        data = dict(data)
        data["rounds"] = [RoundRecord(**r) for r in data.get("rounds", [])]
        data["results"] = [MethodResult(**r) for r in data.get("results", [])]
        data["masks"] = {k: MaskRecord(**v) for k, v in data.get("masks", {}).items()}
        return cls(**data)
