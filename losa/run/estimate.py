"""What a recipe will cost, from the model's configuration alone: parameters, rounds, peak memory, work and time.

An estimate. It counts the tensors that losa holds and the matrix products that it computes. The allocator's slack,
CUDA's own memory, data loading and element-wise work come on top: allow a fifth more memory, and take the time as a
floor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from losa.algorithm.schedule import Round, make_schedule
from losa.algorithm.stream_storage import fits_on_device
from losa.errors import ModelError, RecipeError
from losa.model.blocks import find_blocks
from losa.model.loading import explain_failure, locate_model, refuse_other_kinds
from losa.pruners import LinearShape, PruningShape, get_pruner
from losa.recipe.rates import compares_samples
from losa.recipe.sections import Recipe
from losa.run.machine import capacity, product_rate
from losa.training.loss import CHUNK_BYTES
from losa.training.precision import autocast_dtype

PHASES = ("throughout", "loading", "pruning", "training", "export")


@dataclass(frozen=True)
class Part:
    """``size`` bytes held on ``place`` ("device" or "host") during ``phase``; ``how`` says how they are counted."""

    phase: str
    place: str
    what: str
    size: int
    how: str


@dataclass(frozen=True)
class Stage:
    """``flops`` of matrix products. ``counted``: False for a rate per million tokens, where their number is open."""

    what: str
    flops: float
    counted: bool = True


@dataclass(frozen=True)
class Plan:
    """``parameters``: of the whole model, ``prunable``: of the linears that are pruned. ``rounds``: the main method's;
    their sequences are 0 where the recipe leaves the number open, and ``train_length`` is 0 without training.
    ``rate``: measured FLOP/s, or None. ``capacity``: bytes of memory by place, where known."""

    model: str
    parameters: int
    prunable: int
    blocks: int
    dtype: str
    device: str
    rounds: list[Round]
    train_length: int
    parts: list[Part]
    stages: list[Stage]
    rate: float | None
    capacity: dict[str, int]

    def size(self, what: str) -> int:
        """Bytes of the part of that name. Raises KeyError."""
        return {part.what: part.size for part in self.parts}[what]

    def peak(self, place: str) -> tuple[int, str]:
        """Most bytes held at a time on ``place``, and the phase: what is always there and the largest phase's own."""
        sums = dict.fromkeys(PHASES, 0)
        for part in self.parts:
            if part.place == place:
                sums[part.phase] += part.size
        phase = max(PHASES[1:], key=sums.__getitem__)
        return sums["throughout"] + sums[phase], phase

    @property
    def flops(self) -> float:
        return sum(stage.flops for stage in self.stages if stage.counted)

    @property
    def seconds(self) -> float | None:
        """Time of all counted products at the measured rate: a floor. None without a rate."""
        return None if self.rate is None else self.flops / self.rate


def plan(recipe: Recipe, *, probe: bool = True) -> Plan:
    """Estimate a recipe without loading weights.

    Args:
        probe: measure the device's rate by about a second of matrix products.

    Raises:
        RecipeError: an unknown pruner or device.
        ModelError: the configuration cannot be had, or the model has no blocks.
    """
    # Before the model: a wrong name should not wait for a download.
    get_pruner(recipe.prune)
    device = _device(recipe.device)
    model = _skeleton(recipe)
    shape = _Shape.of(model, recipe, device)
    runs = [_Run(recipe, method) for method in dict.fromkeys([*recipe.compare, recipe.method])]
    main = next(run for run in runs if run.method == recipe.method)
    largest = max(shape.pruned, key=lambda w: w.numel)
    available = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available())
    memory = capacity(device if available else None)
    return Plan(
        model=recipe.model,
        parameters=sum(p.numel() for p in model.parameters()),
        prunable=sum(w.numel for w in shape.pruned),
        blocks=shape.blocks,
        dtype=str(shape.dtype).removeprefix("torch."),
        device=str(device),
        rounds=main.rounds,
        train_length=recipe.train.length if main.trains else 0,
        parts=_parts(recipe, shape, runs, memory),
        stages=_stages(recipe, shape, runs),
        rate=product_rate(device, shape.computed, largest.inputs, largest.outputs) if probe and available else None,
        capacity=memory,
    )


@dataclass(frozen=True)
class _Shape:
    """All that the formulae need to know of a model. ``heads``: width of all attention heads of a block together, 0
    where there is no attention; ``computed``: dtype of training's products."""

    device: torch.device
    dtype: torch.dtype
    computed: torch.dtype
    weight_bytes: int
    blocks: int
    hidden: int
    heads: int
    head: int
    vocabulary: int
    linears: list[LinearShape]
    pruned: list[LinearShape]

    @classmethod
    def of(cls, model: nn.Module, recipe: Recipe, device: torch.device) -> _Shape:
        blocks = find_blocks(model)
        config = model.config.get_text_config()
        every, pruned = (
            [LinearShape(linear.in_features, linear.out_features) for linear in blocks.linears(targets).values()]
            for targets in (None, recipe.prune.targets)
        )
        if not pruned:
            raise RecipeError(f"prune.targets: {recipe.prune.targets!r} matches no linear of {recipe.model!r}")
        head = model.get_output_embeddings()
        embedding = model.get_input_embeddings().weight
        hidden = _number(config, "hidden_size") or embedding.shape[-1]
        precision = recipe.train.precision if recipe.train is not None else "float32"
        return cls(
            device=device,
            dtype=model.dtype,
            computed=_training_dtype(precision, device) or model.dtype,
            weight_bytes=sum(p.nbytes for p in model.parameters()),
            blocks=len(blocks),
            hidden=hidden,
            heads=_attention_width(config, blocks.modules, hidden),
            head=0 if head is None else head.weight.numel(),
            vocabulary=_number(config, "vocab_size") or embedding.shape[0],
            linears=every,
            pruned=pruned,
        )

    @property
    def widest(self) -> int:
        return max(w.numel for w in self.pruned)


def _number(config, name: str) -> int | None:
    """A positive integer of a configuration; None where it has none, or a different one for each layer."""
    try:
        value = getattr(config, name, None)
    except Exception:  # transformers' own for what differs between layers
        return None
    return value if isinstance(value, int) and value > 0 else None


def _attention_width(config, blocks: nn.ModuleList, hidden: int) -> int:
    """From the configuration; where heads differ between layers, the widest of the modules' own."""
    count = _number(config, "num_attention_heads")
    if count is None:
        return 0
    sizes = [size for module in blocks.modules() if isinstance(size := getattr(module, "head_dim", None), int)]
    return count * (_number(config, "head_dim") or max(sizes, default=0) or hidden // count)


class _Run:
    """One method of the recipe: its rounds, as ``losa.run.methods`` makes them, and what it does."""

    def __init__(self, recipe: Recipe, method: str):
        self.method = method
        self.dynamic = method == "losa"
        self.trains = method != "prune_only"
        self.similarity = self.dynamic and compares_samples(recipe.allocation.rates)
        train = recipe.train
        sequences = 0
        if self.trains and train is not None and train.max_tokens is not None:
            sequences = train.max_tokens // train.length
        rounds = recipe.rounds if self.dynamic else recipe.rounds.model_copy(update={"schedule": "oneshot"})
        share = train.round_share if train is not None else 1.0
        self.rounds = make_schedule(rounds, recipe.allocation, recipe.prune.final_sparsity, sequences, share)
        if not self.dynamic:
            self.rounds = [replace(r, mean_rank=recipe.lora.rank) for r in self.rounds]


def _parts(recipe: Recipe, shape: _Shape, runs: list[_Run], memory: dict[str, int]) -> list[Part]:
    train, calibration = recipe.train, recipe.calibration
    pruner = get_pruner(recipe.prune)
    on_gpu = shape.device.type != "cpu"
    size = shape.dtype.itemsize
    place = "device" if on_gpu else "host"
    parts: list[Part] = []

    def add(phase: str, where: str, what: str, amount: float, how: str) -> None:
        parts.append(Part(phase, where, what, int(amount), how))

    prunable = sum(w.numel for w in shape.pruned)
    rank = max(r.mean_rank for run in runs for r in run.rounds)
    adapters = sum(rank * (w.inputs + w.outputs) for w in shape.pruned)
    add("throughout", place, "weights", shape.weight_bytes, f"parameters x {size} bytes")
    add("throughout", place, "masks", sum(w.outputs * -(-w.inputs // 8) for w in shape.pruned), "1 bit a weight")
    add("throughout", place, "adapters", 4 * adapters, f"rank (in + out) x 4 bytes, mean rank {rank}")
    if pruner.updates_weight:
        add("throughout", place, "new weights", prunable * size, "the pruner changes weights; the dense ones stay")
        if on_gpu:
            add("pruning", "host", "dense weights", prunable * size, "for the dense stream of later rounds")
    if on_gpu:
        add("loading", "host", "weights, before they move", shape.weight_bytes, f"parameters x {size} bytes")

    streams = 2 if any(run.dynamic for run in runs) else 1
    hidden = calibration.samples * calibration.length * shape.hidden * size
    how = "samples x length x hidden" + (", the dense and the sparse stream" if streams == 2 else "")
    # What is free on the device when the streams begin, as far as it is known.
    free = memory.get("device", 0) - sum(part.size for part in parts if part.place == "device")
    waits = "device" if on_gpu and fits_on_device(hidden, free - (streams - 1) * hidden) else "host"
    # Pinned memory comes in powers of two.
    held = 1 << (hidden - 1).bit_length() if on_gpu and waits == "host" else hidden
    add("pruning", waits, "hidden states", streams * held, how)
    if any(run.similarity for run in runs):
        samples = min(calibration.cka_samples, calibration.samples)
        add("pruning", place, "Grams", 4 * shape.blocks * samples**2, "blocks x samples^2 x 4 bytes")
    batch = min(calibration.batch_size, calibration.samples) * calibration.length
    widest = max(max(w.inputs, w.outputs) for w in shape.linears)
    add("pruning", place, "one batch in a block", 3 * batch * widest * size, "3 x batch x length x widest side")
    for memory_of in pruner.memory(_pruning_shape(recipe, shape)):
        add("pruning", place, memory_of.what, memory_of.size, memory_of.how)

    if train is not None and any(run.trains for run in runs):
        tokens, size = train.batch_size * train.length, shape.computed.itemsize
        add("training", place, "gradients", 4 * adapters, "as the adapters")
        add("training", place, "optimiser", 2 * 4 * adapters, "AdamW: two fp32 moments a parameter")
        sides = sum(w.inputs + w.outputs for w in shape.linears)
        kept, how = sides, "tokens x (in + out) of every linear: x once, and as much as y for the rest of a block"
        if train.activation_checkpointing:
            kept = shape.blocks * shape.hidden + sides / shape.blocks
            how = "tokens x (hidden a block + one whole block)"
        add("training", place, "activations", tokens * kept * size, how)
        chunk = CHUNK_BYTES.get(shape.device.type, CHUNK_BYTES["cuda"])
        rows = min(tokens, max(1, chunk // (4 * max(1, shape.vocabulary))))
        wide = 4 if size == 4 else 4 + size
        logits = rows * shape.vocabulary * wide + 2 * tokens * shape.hidden * size
        if shape.computed != shape.dtype:
            logits += shape.head * size
        add("training", place, "loss", logits, "a chunk of logits; the last hidden states and their gradient")
        add("training", place, "one linear's product", 2 * 4 * shape.widest, "M (W + s B A) and dY^T x of the largest")

    if not pruner.updates_weight:  # there they take the place of the new weights
        add("export", place, "merged weights", prunable * shape.dtype.itemsize, "beside the dense ones")
    add("export", "host", "written model, read back", shape.weight_bytes, "to check it against the one in memory")
    if on_gpu:
        add("export", "host", "model in memory, moved", shape.weight_bytes, "while the other one is on the device")
    return parts


def _stages(recipe: Recipe, shape: _Shape, runs: list[_Run]) -> list[Stage]:
    calibration, train, evaluation = recipe.calibration, recipe.train, recipe.evaluate
    pruner = get_pruner(recipe.prune)
    every, prunable = (sum(w.numel for w in linears) for linears in (shape.linears, shape.pruned))

    def forward(length: int) -> float:
        # A causal token attends to half of the window on average: q k^T and p v.
        return 2.0 * every + 2.0 * length * shape.heads * shape.blocks

    stages: list[Stage] = []
    windows = None
    if evaluation is not None and evaluation.max_windows is not None:
        windows = evaluation.max_windows * evaluation.length * (forward(evaluation.length) + 2.0 * shape.head)
        stages.append(Stage("dense: evaluation", windows))
    for run in runs:
        batch = min(calibration.batch_size, calibration.samples)
        # Each stream records one whole forward pass of a batch before it starts.
        stream = calibration.samples + batch
        samples = stream + (calibration.samples if pruner.statistic is not None else 0)
        samples += stream if run.dynamic else 0
        samples += min(calibration.cka_samples, calibration.samples) + batch if run.similarity else 0
        work = samples * calibration.length * forward(calibration.length)
        work += pruner.flops(_pruning_shape(recipe, shape))
        stages.append(Stage(f"{run.method}: calibration and pruning", len(run.rounds) * work))
        if run.trains and train is not None:
            per_token = 6.0 * prunable + 4.0 * (every - prunable) + 4.0 * shape.head
            per_token += 3 * (forward(train.length) - 2.0 * every)
            per_token += forward(train.length) if train.activation_checkpointing else 0
            tokens = sum(r.sequences for r in run.rounds) * train.length
            if tokens:
                stages.append(Stage(f"{run.method}: training", tokens * per_token))
            else:
                stages.append(Stage(f"{run.method}: training, each million tokens", 1e6 * per_token, counted=False))
        if windows is not None:
            times = 1 + (run.method == "lora")
            times += len(run.rounds) if evaluation.each_round and len(run.rounds) > 1 else 0
            stages.append(Stage(f"{run.method}: evaluation", times * windows))
    return stages


def _pruning_shape(recipe: Recipe, shape: _Shape) -> PruningShape:
    tokens = recipe.calibration.samples * recipe.calibration.length
    return PruningShape(shape.pruned, shape.blocks, tokens, on_gpu=shape.device.type != "cpu")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"device: {str(error).splitlines()[0]}") from error


def _training_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """autocast_dtype, and for a GPU that is not here what today's GPUs answer."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return None if precision == "float32" else torch.bfloat16
    return autocast_dtype(precision, device)


def _skeleton(recipe: Recipe) -> nn.Module:
    """The model on the meta device, in the dtype that the run would load."""
    from transformers import AutoConfig, AutoModelForCausalLM

    source, gguf_file = locate_model(recipe.model, recipe.gguf_file)
    refuse_other_kinds(recipe.model, source, gguf_file)
    extra = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=recipe.trust_remote_code, **extra)
        stored = config.get_text_config().dtype if gguf_file is None else None
        dtype = getattr(torch, recipe.dtype) if recipe.dtype != "auto" else stored or torch.float32
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=recipe.trust_remote_code)
    except Exception as error:  # transformers raises errors of many kinds
        raise ModelError(f"model {recipe.model!r}: {explain_failure(source, error)}") from error
