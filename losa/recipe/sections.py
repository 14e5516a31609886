"""Recipes, section by section: every setting of a run, with its type, its limits and its default."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from losa.errors import shown
from losa.recipe.machines import CheckpointConfig, DistributedConfig
from losa.recipe.methods import MAX_RANK, METHODS, Method, MethodName, check_first_rank
from losa.recipe.paths import check_outside, output_path
from losa.recipe.rates import check_counts, check_rates, compares_samples, follows_curves, takes_backward
from losa.recipe.sources import MAX_COUNT, Section, Source, Sources
from losa.recipe.training import ReconstructConfig, TrainConfig

MAX_SPARSITY = 0.95


def _targets(value):
    """One message for the union of text and list; pydantic has one message for each of the two."""
    names = [value] if isinstance(value, str) else value
    if value is not None and not (isinstance(names, list) and names and all(isinstance(n, str) and n for n in names)):
        raise ValueError(f"expected names of linears, such as [q_proj, v_proj], or 're:<regex>'; got {shown(value)}")
    return value


Targets = Annotated[list[str] | str | None, BeforeValidator(_targets)]
"""Which linears of a block: names or ends of names, 're:<regex>', a list of both, or None for all linears."""


class PruneConfig(Section):
    """How weights are removed. ``pattern`` is ``"keep_n:m"``: N weights *kept* out of every M."""

    pruner: str = Field(
        "wanda", description="magnitude, wanda, sparsegpt, alps, pruner_zero, wanda_sp, or a registered name"
    )
    sparsity: float | None = Field(
        None, gt=0, le=MAX_SPARSITY, description="share of weights to remove; this or pattern"
    )
    pattern: Annotated[str | None, Field(pattern=r"^[0-9]{1,4}:[0-9]{1,4}$")] = Field(
        None, description="keep_n:m, weights kept of every m along a row; this or sparsity"
    )
    mixed: bool = Field(False, description="blocks may differ in keep_n; their mean is exactly the pattern's")
    targets: Targets = Field(None, description="linear names, or 're:<regex>'; default: all")
    regrow: bool = Field(False, description="later rounds may bring pruned weights back")
    damping: float = Field(
        0.01, gt=0, le=1, description="share of the Hessian's mean diagonal that is added to it (sparsegpt, alps)"
    )
    block_size: int = Field(128, gt=0, le=MAX_COUNT, description="columns that are pruned together (sparsegpt)")
    on_singular: Literal["error", "wanda"] = Field(
        "error", description="a Hessian that stays singular: stop, or take Wanda's mask (sparsegpt, alps)"
    )
    regrow_by: Literal["score", "gradient"] = Field(
        "score", description="which weights come back where regrow is true: by the pruner's score, or by gradient"
    )
    regrow_share: float = Field(
        0.1, gt=0, lt=1, description="share of kept weights to exchange, times 1 - t/T (regrow_by: gradient)"
    )
    partly: bool = Field(
        False, description="go on where less than half of the blocks' weights can be pruned, without targets"
    )

    @model_validator(mode="after")
    def _one_goal(self):
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError("give exactly one of prune.sparsity and prune.pattern")
        if self.keep_n_m is not None:
            keep_n, m = self.keep_n_m
            if not 0 < keep_n < m:
                raise ValueError(f"prune.pattern: expected keep_n:m with 0 < keep_n < m, got {self.pattern!r}")
            if 1 - keep_n / m > MAX_SPARSITY:
                raise ValueError(f"prune.pattern: {self.pattern!r} exceeds sparsity {MAX_SPARSITY}")
        if self.mixed and self.pattern is None:
            raise ValueError("prune.mixed needs prune.pattern")
        if self.regrow_by == "gradient" and not self.regrow:
            raise ValueError("prune.regrow_by: gradient needs prune.regrow: true")
        return self

    @property
    def decisions_nested(self) -> bool:
        """Whether the pruner itself brings nothing back: what is pruned already stays pruned in its decisions."""
        return not self.regrow or self.regrow_by == "gradient"

    @property
    def rates_nested(self) -> bool:
        """Whether nothing comes back at all: no rate falls from one round to the next."""
        return not self.regrow

    @property
    def keep_n_m(self) -> tuple[int, int] | None:
        if self.pattern is None:
            return None
        keep_n, m = self.pattern.split(":")
        return int(keep_n), int(m)

    @property
    def final_sparsity(self) -> float:
        if self.keep_n_m is not None:
            keep_n, m = self.keep_n_m
            return 1 - keep_n / m
        assert self.sparsity is not None, "one of sparsity and pattern is given"
        return self.sparsity


class RoundsConfig(Section):
    """T rounds: cubic theta_t = theta_f - theta_f (1 - t/T)^3 (Eq. 8), linear (Eq. 10), or all at once."""

    count: int = Field(5, ge=1, le=1000, description="T, the number of rounds")
    schedule: Literal["cubic", "linear", "oneshot"] = Field(
        "cubic", description="how sparsity grows; oneshot is one round"
    )


class AllocationConfig(Section):
    """Layer-wise rates (Eq. 4-5) and ranks (Eq. 7, 9)."""

    rates: Annotated[str, BeforeValidator(check_rates)] = Field(
        "cka",
        description="sparsity of each block: cka, cka_normalised, owl, dlp, atp, update, fisher, or uniform",
    )
    delta: float | None = Field(
        None, ge=0, le=0.5, description="half width of the box around theta_t (fisher: less); default: the rates' own"
    )
    ranks: Literal["error", "uniform", "sparsity"] = Field(
        "error", description="rank of each block: by reconstruction error, by sparsity, or the same for all"
    )
    error: Literal["relative", "frobenius"] = Field("relative", description="E_l of Eq. 7: per-channel or Eq. 1's")
    mean_rank: int = Field(6, ge=1, le=MAX_RANK, description="Omega_0, mean rank of the first round")
    rank_growth: int = Field(1, ge=0, le=MAX_RANK, description="what the mean rank gains each round")
    rank_min: int = Field(1, ge=1, description="smallest rank of a block")
    rank_max: int = Field(16, ge=1, le=MAX_RANK, description="largest rank of a block, and of the mean")
    fill: Literal["lp", "smooth", "curves"] | None = Field(
        None,
        description="lp: Eq. 5's two plateaus; smooth: affine in importance; curves: the least expected loss; default: "
        "that of the rates",
    )
    per: Literal["block", "linear", "row"] = Field(
        "block",
        description="linear: rates and ranks of a block's linears differ, within the block's; row: rates of a linear's "
        "rows too, by expected loss",
    )
    apply_to: Literal["dynamic", "all"] = Field(
        "dynamic", description="whose rates these are: those of dynamic methods, or of every method that prunes"
    )
    linear_delta: float = Field(
        0.05, ge=0, lt=1, description="per: linear: half width of the box around the block's rate"
    )

    @model_validator(mode="after")
    def _bounds(self):
        if not self.rank_min <= self.mean_rank <= self.rank_max:
            raise ValueError(
                "allocation: expected rank_min <= mean_rank <= rank_max, got "
                f"{self.rank_min}, {self.mean_rank}, {self.rank_max}"
            )
        if self.fill == "curves" and not takes_backward(self.rates):
            raise ValueError(f"allocation.fill: curves needs expected losses, which rates {self.rates!r} do not take")
        if self.per == "row" and not follows_curves(self.rates, self.fill):
            raise ValueError(
                f"allocation.per: row: rows are compared by expected losses: expected rates fisher, "
                f"got rates {self.rates!r}" + ("" if self.fill is None else f" with fill {self.fill!r}")
            )
        return self


class LoraConfig(Section):
    """Adapters. ``scaling`` is alpha / r and stays constant whatever the rank; ``rank`` is the rank of methods that are
    not dynamic."""

    scaling: float = Field(2.0, gt=0, description="s = alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input while training")
    rank: int = Field(8, ge=1, le=MAX_RANK, description="rank of the methods whose rank stays; adalora's mean rank")
    gate_penalty: float = Field(
        0.4, ge=0, description="sora: after a step gates come nearer to zero by this times the learning rate"
    )


class CalibrationConfig(Section):
    """The samples that a pruner's statistics, CKA and reconstruction errors are taken from."""

    data: Sources = Field(description="text that statistics are taken from")
    samples: int = Field(128, ge=1, le=MAX_COUNT, description="number of samples")
    length: int = Field(2048, ge=8, le=MAX_COUNT, description="tokens of a sample")
    cka_samples: int = Field(64, ge=2, le=256, description="how many of the samples serve CKA and other rates")
    batch_size: int = Field(1, ge=1, le=MAX_COUNT, description="samples of a forward pass")
    experts: Literal["routed", "all"] = Field(
        "routed", description="which tokens an expert's statistics are of: those that chose it, or all"
    )
    statistics_gb: float = Field(8, gt=0, description="Hessians of a block beyond so many GB take several passes")


class EvaluateConfig(Section):
    """Perplexity on held-out text, in windows that do not overlap."""

    data: Source = Field(description="text to measure perplexity on")
    length: int = Field(2048, ge=8, le=MAX_COUNT, description="tokens of a window")
    max_windows: int | None = Field(None, gt=0, le=MAX_COUNT, description="use only the first windows")
    batch_size: int = Field(1, ge=1, le=MAX_COUNT, description="windows of a forward pass")
    each_round: bool = Field(True, description="measure after every round too")
    bos_per_window: bool = Field(
        False, description="begin each window with the beginning-of-text token; published protocols do not"
    )


def _device(name: str) -> str:
    # Tensors on meta have no values to compute with.
    if not re.fullmatch(r"(?!meta)[a-z]+(:[0-9]{1,3})?", name):
        raise ValueError(f"expected auto, cpu, cuda, cuda:1, ...; got {shown(name)}")
    return name


class Recipe(Section):
    """One run. ``examples/every-setting.yaml`` is a complete file."""

    model: str = Field(
        min_length=1, description="Hugging Face id, local directory, or 'package:NAME' (an installed GGUF package)"
    )
    gguf_file: str | None = Field(None, description="which GGUF file of the model's directory, repository or package")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the weights; auto: the checkpoint's"
    )
    device: Annotated[str, AfterValidator(_device)] = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    offload: Literal["disk"] | None = Field(
        None, description="disk: one decoder block in memory at a time, for models larger than memory (prune_only)"
    )
    output: Annotated[Path, AfterValidator(output_path)] = Field(description="directory to write")
    seed: int = Field(0, ge=0, lt=2**32, description="of data order, adapters and samples")
    deterministic: bool = Field(False, description="the same bits in every run, at some cost in time")
    method: MethodName = Field("losa", description="what is run and exported")
    compare: list[MethodName] = Field([], description="further methods run in the same harness, for the final table")
    prune: PruneConfig
    rounds: RoundsConfig = RoundsConfig()
    allocation: AllocationConfig = AllocationConfig()
    lora: LoraConfig = LoraConfig()
    calibration: CalibrationConfig
    train: TrainConfig | None = None
    evaluate: EvaluateConfig | None = None
    distributed: DistributedConfig = DistributedConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    reconstruct: ReconstructConfig | None = None

    @property
    def methods(self) -> dict[MethodName, Method]:
        """All methods that are run, each once, in the order in which they run: the exported one is the last."""
        names = [name for name in dict.fromkeys(self.compare) if name != self.method]
        return {name: METHODS[name] for name in [*names, self.method]}

    def rated(self, name: MethodName) -> bool:
        """Whether a method's blocks have the rates of ``allocation``. All blocks of another method are pruned alike."""
        return METHODS[name].dynamic or self.allocation.apply_to == "all"

    @property
    def any_rated(self) -> bool:
        """Whether any method's blocks have the rates of ``allocation``."""
        return any(map(self.rated, self.methods))

    def allocation_of(self, name: MethodName) -> AllocationConfig:
        """Rates and ranks of a method; the ranks of dynamic methods alone differ between blocks."""
        if METHODS[name].dynamic:
            return self.allocation
        alike = {} if self.rated(name) else {"rates": "uniform", "per": "block", "fill": None, "delta": None}
        return self.allocation.model_copy(update={"ranks": "uniform", **alike})

    @property
    def compares_samples(self) -> bool:
        """Whether a method compares calibration samples with each other."""
        return self.any_rated and compares_samples(self.allocation.rates)

    def reconstructs(self, name: MethodName) -> bool:
        """Whether a method's rounds reconstruct the blocks that they prune."""
        return self.reconstruct is not None and METHODS[name].reconstructs

    def streams_dense(self, name: MethodName) -> bool:
        """Whether a method's rounds compare pruned blocks with the dense model's blocks."""
        return METHODS[name].dynamic or self.reconstructs(name)

    def distills(self, name: MethodName) -> bool:
        """Whether a method's training in rounds learns from the dense model."""
        return METHODS[name].training == "rounds" and self.train is not None and self.train.distill is not None

    @model_validator(mode="after")
    def _first_ranks(self):
        check_first_rank(self.methods, self.lora.rank)
        return self

    @model_validator(mode="after")
    def _prunes_alone(self):
        if self.offload is None:
            return self
        if others := [name for name in self.methods if name != "prune_only"]:
            raise ValueError(f"offload: disk: expected method prune_only alone, got {', '.join(others)}, which train")
        if self.distributed.cpu_offload or self.gguf_file is not None:
            other = "distributed.cpu_offload" if self.distributed.cpu_offload else "gguf_file"
            raise ValueError(f"offload: disk reads blocks from safetensors files as they are needed, not with {other}")
        return self

    @model_validator(mode="after")
    def _reconstructs_something(self):
        if self.reconstruct is not None and not any(map(self.reconstructs, self.methods)):
            able = ", ".join(name for name, method in METHODS.items() if method.reconstructs)
            raise ValueError(
                f"reconstruct: expected a method whose adapters are pruned along with the weights ({able}), "
                f"got {', '.join(self.methods)}"
            )
        return self

    @model_validator(mode="after")
    def _needs_training_data(self):
        trains = [name for name in (self.method, *self.compare) if METHODS[name].trains]
        if trains and self.train is None:
            raise ValueError(f"train: method {trains[0]!r} needs a train section with data")
        return self

    @model_validator(mode="after")
    def _counts_for_linears(self):
        check_counts(self.allocation.per, self.prune.pattern)
        return self

    @model_validator(mode="after")
    def _enough_for_similarity(self):
        rates = self.allocation.rates
        if self.compares_samples and self.calibration.samples < 2:
            raise ValueError(
                f"calibration.samples: allocation.rates {rates!r} compares samples and needs at least 2, "
                f"got {self.calibration.samples}"
            )
        return self

    @model_validator(mode="after")
    def _output_apart_from_inputs(self):
        sources = {"calibration.data": self.calibration.data, "train.data": self.train.data if self.train else []}
        inputs = [("model", self.model), *((key, source.path) for key, part in sources.items() for source in part)]
        if self.evaluate is not None:
            inputs.append(("evaluate.data", self.evaluate.data.path))
        check_outside(self.output, inputs)
        return self
