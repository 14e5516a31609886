"""The plan's numbers against ones counted by hand, and against what a real step keeps."""

from __future__ import annotations

import pytest
import torch

from losa.errors import ModelError, RecipeError
from losa.model.blocks import find_blocks
from losa.model.wrapping import wrap_model
from losa.output.tables import plain_text
from losa.run.estimate import estimate
from losa.run.estimate_tables import estimate_tables
from losa.run.placement import Placement
from losa.run.planned import Planned, needs_whole
from tests.helpers.gguf_files import write_gguf
from tests.helpers.planned_recipe import recipe
from tests.helpers.tiny import tiny_llama

# tiny_llama: 98 words, hidden 32, MLP 64, 4 heads of 8, 2 of them for keys and values. A block's linears (in, out):
# q (32, 32), k (32, 16), v (32, 16), o (32, 32), gate (32, 64), up (32, 64), down (64, 32).
IN_PLUS_OUT = 64 + 48 + 48 + 64 + 96 + 96 + 96
BLOCK = 1024 + 512 + 512 + 1024 + 2048 + 2048 + 2048
EMBEDDING = 98 * 32
PARAMETERS = 2 * BLOCK + 2 * EMBEDDING + 5 * 32


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    """Configuration only: the plan loads no weights."""
    directory = tmp_path_factory.mktemp("model")
    tiny_llama(layers=2).config.save_pretrained(directory)
    return directory


def test_memory_parts_in_fp32_on_the_host(model_directory):
    found = estimate(recipe(model_directory), probe=False)
    assert (found.parameters, found.prunable, found.blocks) == (PARAMETERS, 2 * BLOCK, 2)
    assert (found.dtype, found.device) == ("float32", "cpu")
    adapters = 2 * 3 * IN_PLUS_OUT * 4  # two blocks, mean rank 2 + 1
    assert found.size("weights") == 4 * PARAMETERS
    assert found.size("masks") == 2 * BLOCK / 8
    assert found.size("adapters") == found.size("gradients") == adapters
    assert found.size("optimiser") == 2 * adapters
    assert found.size("hidden states") == 2 * 4 * 16 * 32 * 4
    assert found.size("merged weights of a block") == 4 * BLOCK
    assert found.size("Grams") == 2 * 3 * 3 * 4
    assert found.size("activations") == 32 * 2 * IN_PLUS_OUT * 4
    assert found.size("loss") == 32 * 98 * 4 + 2 * 32 * 32 * 4
    assert {holding.place for holding in found.holdings} == {"host"}
    always = 4 * PARAMETERS + 2 * BLOCK // 8 + adapters
    training = 3 * adapters + found.size("activations") + found.size("loss") + 2 * 4 * 2048
    assert found.peak("host") == (always + training, "training")
    assert found.capacity["host"] > 1e8


def test_memory_parts_of_sparsegpt_in_bf16_on_a_gpu(model_directory):
    changes = {"prune": {"pruner": "sparsegpt"}, "dtype": "bfloat16", "device": "cuda"}
    found = estimate(recipe(model_directory, train={"activation_checkpointing": True}, **changes), probe=False)
    assert found.size("weights") == 2 * PARAMETERS
    assert found.size("dense weights") == 2 * 2 * BLOCK
    assert found.size("Hessians of a block") == 4 * (6 * 32**2 + 64**2)
    assert found.size("factors of a block") == 4 * (6 * 32**2 + 64**2)
    assert found.size("factorising") == 5 * 4 * (6 * 32**2 + 64**2)
    assert found.size("hidden states") == 2 * 4 * 16 * 32 * 2
    assert found.size("activations") == 32 * (2 * 32 + IN_PLUS_OUT) * 2
    places = {holding.what: holding.place for holding in found.holdings}
    assert places["dense weights"] == places["hidden states"] == "host"
    assert places["weights"] == places["Hessians of a block"] == "device"
    assert found.peak("host") == (2 * PARAMETERS, "loading")


LATER = ("calibration", "pruning", "training", "evaluation")
IN_HOST_MEMORY = {(phase, "host") for phase in LATER}


@pytest.mark.parametrize(
    "pruner, compare, on_cpu, on_gpu",
    [
        ("wanda", [], set(), set()),
        # Of each method the merged weights take the place of masks over dense ones.
        ("wanda", ["prune_only"], {("evaluation", "host")}, {("evaluation", "device")}),
        ("sparsegpt", [], IN_HOST_MEMORY, IN_HOST_MEMORY),
        # Dense linears wait for the next method, where new weights are; a copy is in host memory.
        ("sparsegpt", ["prune_only"], {("throughout", "host")}, {("throughout", "device")} | IN_HOST_MEMORY),
    ],
)
def test_where_dense_weights_wait(model_directory, pruner, compare, on_cpu, on_gpu):
    for device, places in (("cpu", on_cpu), ("cuda", on_gpu)):
        given = recipe(model_directory, prune={"pruner": pruner}, compare=compare, device=device)
        held = [h for h in estimate(given, probe=False).holdings if h.what == "dense weights"]
        assert {(h.phase, h.place) for h in held} == places
        assert all(h.size == 4 * 2 * BLOCK for h in held)


def test_a_block_runs_is_pruned_and_reconstructed_one_after_the_other(model_directory):
    def phases(**changes) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for held in estimate(recipe(model_directory, **changes), probe=False).holdings:
            found.setdefault(held.what, set()).add(held.phase)
        return found

    wanda = phases()
    assert wanda["hidden states"] == {"calibration", "pruning"}
    assert wanda["merged weights of a block"] == wanda["one batch in a block"] == wanda["Grams"] == {"calibration"}
    assert wanda["pruning one linear"] == {"pruning"}
    reconstructed = phases(reconstruct={"steps": 2})
    assert reconstructed["hidden states"] == {"calibration", "pruning", "reconstruction"}
    assert reconstructed["reconstruction of a block"] == {"reconstruction"}
    sparsegpt = phases(prune={"pruner": "sparsegpt"})
    assert sparsegpt["Hessians of a block"] == {"calibration", "pruning"}
    assert sparsegpt["factorising one"] == {"pruning"}
    # A pass over the block as it was comes after the first linears are pruned.
    few = phases(prune={"pruner": "sparsegpt"}, calibration={"statistics_gb": 1e-6})
    assert few["merged weights of a block"] == {"calibration", "pruning"}
    assert phases(calibration={"statistics_gb": 1e-6})["merged weights of a block"] == {"calibration"}
    # Gradients come before the first block has run.
    zero = phases(prune={"pruner": "pruner_zero"})
    assert zero["activations for gradients"] == zero["loss for gradients"] == {"gradients"}
    assert zero["statistics of gradients"] == {"gradients", "calibration", "pruning"}


@pytest.mark.parametrize(("missing", "place"), [(1, "host"), (0, "device")])
def test_hidden_states_stay_on_a_gpu_where_they_fit(model_directory, monkeypatch, missing, place):
    """Each stream in a quarter of what is free when it begins; the first one is there when the second one begins."""
    given, hidden = recipe(model_directory, device="cuda"), 4 * 16 * 32 * 4
    always = sum(holding.size for holding in estimate(given, probe=False).holdings if holding.phase == "throughout")
    free = always + hidden + 4 * hidden - missing
    monkeypatch.setattr("losa.run.estimate.capacity", lambda device: {"host": 1 << 40, "device": free})
    found = estimate(given, probe=False)
    assert {holding.what: holding.place for holding in found.holdings}["hidden states"] == place
    assert found.size("hidden states") == 2 * hidden


def test_pinned_hidden_states_take_a_power_of_two(model_directory):
    calibration = {"samples": 3, "cka_samples": 3}
    for device, size in (("cpu", 3 * 16 * 32 * 4), ("cuda", 4 * 16 * 32 * 4)):
        found = estimate(recipe(model_directory, device=device, calibration=calibration), probe=False)
        assert found.size("hidden states") == 2 * size


def test_pruning_alone_has_one_stream_and_no_training(model_directory):
    found = estimate(recipe(model_directory, method="prune_only", train=None), probe=False)
    assert found.size("hidden states") == 4 * 16 * 32 * 4
    assert not {"training"} & {holding.phase for holding in found.holdings}
    assert len(found.rounds) == 1 and found.rounds[0].mean_rank == 3
    (stage,) = found.stages
    # The stream and Wanda's statistics; before them two samples, whole and block by block, and a batch, whole.
    assert stage.flops == (4 + 4 + 2 * 2 + 2) * 16 * (2 * 2 * BLOCK + 2 * 16 * 32 * 2)


def test_gradients_take_a_model_in_fp32_and_a_pass_a_round(model_directory):
    regrow = {"pruner": "pruner_zero", "regrow": True, "regrow_by": "gradient"}
    given = [recipe(model_directory, prune=prune) for prune in ({}, {"pruner": "pruner_zero"}, regrow)]
    plain, zero, both = (estimate(each, probe=False) for each in given)
    assert "statistics of gradients" not in {holding.what for holding in plain.holdings}
    assert (zero.size("statistics of gradients"), both.size("statistics of gradients")) == (8 * BLOCK, 16 * BLOCK)
    assert zero.size("activations for gradients") == 16 * 2 * IN_PLUS_OUT * 4
    work = [next(s.flops for s in found.stages if s.kind == "pruning") for found in (plain, zero, both)]
    forward = 2 * 2 * BLOCK + 2 * 16 * 32 * 2
    # Two rounds of four samples of 16 tokens, in the place of a pass for norms of inputs: forward, backward, dY^T x.
    each = 2 * forward + 2 * 16 * 32 * 2 + 4 * EMBEDDING + 2 * 2 * BLOCK
    assert work[1] - work[0] == 2 * 4 * 16 * (each - forward) and work[2] == work[1]
    alone = recipe(model_directory, prune={"regrow": True, "regrow_by": "gradient"})
    found = next(s.flops for s in estimate(alone, probe=False).stages if s.kind == "pruning")
    assert found - work[0] == 4 * 16 * each, "from the second round on"


def test_rates_are_measured_and_tried(model_directory):
    def pruning(rates, delta=None):
        found = estimate(recipe(model_directory, allocation={"rates": rates, "delta": delta}), probe=False)
        return found, next(stage.flops for stage in found.stages if stage.kind == "pruning")

    sample = 16 * (2 * 2 * BLOCK + 16 * 2 * 32 * 2)
    uniform = pruning("uniform")[1]
    for rates, what, size in (("owl", "scores of a block", 8 * BLOCK), ("cka_normalised", "Grams", 2 * 256**2 * 4)):
        found, work = pruning(rates)
        assert found.size(what) == size and work == uniform + 2 * 3 * sample
    found, work = pruning("atp")
    assert work == uniform + 2 * 6 * 3 * sample + 2 * 5 * 3 * 16 * 2 * EMBEDDING
    trials = "masks to try rates"
    assert found.size(trials) == 2 * BLOCK / 8
    whole_lora = {"method": "lora", "allocation": {"rates": "atp", "ranks": "uniform", "apply_to": "all"}}
    zeros_in_weights = estimate(recipe(model_directory, **whole_lora), probe=False)
    assert zeros_in_weights.size(trials) == 2 * BLOCK / 8 + 2 * BLOCK * 4
    found, work = pruning("atp", 0.1)
    assert work == uniform and trials not in {holding.what for holding in found.holdings}
    found, work = pruning("fisher")
    once = 3 * sample + 16 * (16 * 2 * 32 * 2 + 6 * EMBEDDING)  # a pass draws labels, one goes forward and backward
    assert work == uniform + 3 * once and found.size("squares of a linear")
    assert found.size("activations for gradients") and found.size("loss for gradients")
    assert "statistics of gradients" not in {holding.what for holding in found.holdings}
    rows = "comparing the rows of a linear"
    assert rows not in {holding.what for holding in found.holdings}
    by_rows = estimate(recipe(model_directory, allocation={"rates": "fisher", "per": "row"}), probe=False)
    assert by_rows.size(rows) == 3 * 4 * 64 * 32
    assert needs_whole(recipe(model_directory, allocation={"rates": "fisher"})) == "allocation.rates: fisher"
    assert needs_whole(recipe(model_directory, method="prune_only", allocation={"rates": "fisher"})) is None
    once = [
        recipe(model_directory, method="prune_only", allocation={"rates": "owl", "ranks": "error", "apply_to": whose})
        for whose in ("dynamic", "all")
    ]
    plain, rated = (next(s.flops for s in estimate(one, probe=False).stages if s.kind == "pruning") for one in once)
    assert rated == plain + 3 * sample
    chosen = [(a.rates, a.ranks) for a in (one.allocation_of("prune_only") for one in once)]
    assert chosen == [("uniform", "uniform"), ("owl", "uniform")]


def test_rounds_and_work(model_directory):
    evaluate = {"data": "e.txt", "length": 32, "max_windows": 2}
    changes = {"method": "losa", "compare": ["lora"], "evaluate": evaluate}
    found = estimate(recipe(model_directory, **changes), probe=False)
    assert [(r.sparsity, r.mean_rank, r.sequences) for r in found.rounds] == [(0.4375, 2, 1), (0.5, 3, 9)]
    work = {stage.what: stage.flops for stage in found.stages}
    attention = 2 * 32 * 2  # 2 x heads' width x blocks, for each token and position of its window
    forward = 2 * 2 * BLOCK
    training = 160 * (3 * forward + 4 * EMBEDDING + 3 * 16 * attention)
    assert work["losa: training"] == training
    # A dense adapter takes no dY^T x of the weight's size.
    assert work["lora: training"] == training - 160 * forward
    # Similarity (3), statistics (4), both streams (4). The first method finds out what blocks are called with.
    assert work["losa: calibration and pruning"] == 2 * (3 + 4 + 4 + 4) * 16 * (forward + 16 * attention)
    assert work["lora: calibration and pruning"] == (4 + 4 + 2 * 2 + 2) * 16 * (forward + 16 * attention)
    dropped = estimate(recipe(model_directory, **changes, lora={"dropout": 0.1}), probe=False)
    again = {stage.what: stage.flops for stage in dropped.stages}
    assert again["losa: training"] == training + 160 * 2 * forward and again["lora: training"] == work["lora: training"]
    kept = {"train": {"activation_checkpointing": True}, "lora": {"dropout": 0.1}}
    (recomputed,) = [s for s in estimate(recipe(model_directory, **kept), probe=False).stages if s.kind == "training"]
    assert recomputed.flops == again["losa: training"] + 160 * (2 * forward + 16 * attention)
    evaluation = 64 * (forward + 32 * attention + 2 * EMBEDDING)
    assert work["dense: evaluation"] == evaluation
    assert work["losa: evaluation"] == 3 * evaluation and work["lora: evaluation"] == 2 * evaluation
    assert found.flops == sum(work.values()) and found.seconds is None


@pytest.mark.parametrize("method, rounds, streamed", [("losa", 2, 0), ("sparse_lora", 1, 4)])
def test_reconstruction_of_blocks(model_directory, method, rounds, streamed):
    """Steps on three samples in passes of two; ``streamed``: samples of a dense stream that there was not before."""
    settings = {"method": method, "compare": ["prune_only"], "prune": {"pruner": "sparsegpt"}, "device": "cuda"}
    steps = {"reconstruct": {"steps": 5, "batch_size": 3}}
    plain, ours = (estimate(recipe(model_directory, **settings, **more), probe=False) for more in ({}, steps))
    before, after = ({stage.what: stage.flops for stage in found.stages} for found in (plain, ours))
    forward = 2 * 2 * BLOCK + 16 * 2 * 32 * 2
    work = 3 * 16 * (5 * 3 * forward + forward) + streamed * 16 * forward
    key = f"{method}: calibration and pruning"
    assert after.pop(key) - before.pop(key) == rounds * work
    assert after == before
    rank = 3
    held = 2 * 16 * (4 * IN_PLUS_OUT + 8 * 32) + 5 * 4 * rank * IN_PLUS_OUT + 2 * 4 * 2048
    assert ours.size("reconstruction of a block") == held
    assert ours.size("hidden states") == 2 * 4 * 16 * 32 * 4
    assert ours.size("dense weights") == 4 * 2 * BLOCK
    with pytest.raises(KeyError):
        plain.size("reconstruction of a block")


def test_a_teacher_is_counted(model_directory):
    """Its pass and its logits; softmaxes and hidden states; weights that pruning replaces stay on the device."""
    distill = {"train": {"distill": {"weight": 0.5, "hidden": 0.1}}}
    plain, taught = (estimate(recipe(model_directory, **changes), probe=False) for changes in ({}, distill))
    work, more = ({s.kind: s.flops for s in found.stages} for found in (plain, taught))
    assert more["training"] - work["training"] == 160 * (2 * 2 * BLOCK + 2 * EMBEDDING + 16 * 2 * 32 * 2)
    assert more["pruning"] == work["pruning"]
    assert taught.size("loss") == 5 * 32 * 98 * 4 + (2 + 1 + 3 * 2) * 32 * 32 * 4
    on_device = {(phase, "device") for phase in LATER}
    for changes, places in (
        ({}, set()),
        ({"prune": {"pruner": "sparsegpt"}}, on_device),
        *(({"method": method}, on_device) for method in ("lora", "sora", "adalora")),
        ({"compare": ["lora"]}, on_device),
        ({"prune": {"pruner": "sparsegpt"}, "compare": ["lora"]}, {("throughout", "device")}),
    ):
        found = estimate(recipe(model_directory, device="cuda", **distill, **changes), probe=False)
        assert {(h.phase, h.place) for h in found.holdings if h.what == "dense weights"} == places


def test_all_kept_weights_are_trained(model_directory):
    changes = {"method": "sparse_full", "lora": {"dropout": 0.1}, "compare": ["sparse_lora"]}
    found = estimate(recipe(model_directory, **changes), probe=False)
    assert found.size("adapters") == found.size("gradients") == 4 * 2 * BLOCK
    assert found.size("optimiser") == 2 * 4 * 2 * BLOCK
    work = {stage.what: stage.flops for stage in found.stages}
    # Three products, and none for dropout.
    assert work["sparse_lora: training"] - work["sparse_full: training"] == 160 * 2 * 2 * 2 * BLOCK
    sharded = Planned.of(recipe(model_directory, **changes), tiny_llama(layers=2), torch.device("cpu"), {})
    own = {h.what: h.size for h in sharded.holdings(Placement(2, 2))}
    assert own["adapters"] == own["gradients"] == own["optimiser"] // 2 == 4 * 2 * BLOCK // 2


def test_open_amount_of_data_is_a_rate(model_directory):
    found = estimate(recipe(model_directory, train={"max_tokens": None}), probe=False)
    (stage,) = [stage for stage in found.stages if "training" in stage.what]
    assert not stage.counted and stage.flops > 0
    assert found.flops == sum(s.flops for s in found.stages if s is not stage)
    assert "train.max_tokens is not set" in "".join(map(plain_text, estimate_tables(found)))


def test_targets_narrow_what_is_pruned(model_directory):
    found = estimate(recipe(model_directory, prune={"targets": ["q_proj", "o_proj"]}), probe=False)
    assert found.prunable == 2 * 2 * 1024
    assert found.size("adapters") == 2 * 3 * (64 + 64) * 4
    assert found.size("activations") == 32 * 2 * IN_PLUS_OUT * 4
    with pytest.raises(RecipeError, match="prune.targets: .*no_proj"):
        estimate(recipe(model_directory, prune={"targets": ["no_proj"]}), probe=False)


def test_tied_embeddings_count_once_and_gguf_is_read(tmp_path):
    model = tiny_llama(layers=2, tie_word_embeddings=True)
    write_gguf(tmp_path / "tiny.gguf", model)
    found = estimate(recipe(tmp_path / "tiny.gguf"), probe=False)
    assert found.parameters == PARAMETERS - EMBEDDING == sum(p.numel() for p in model.parameters())
    assert found.dtype == "float32"


def test_activations_are_close_to_what_a_step_keeps(tmp_path):
    model = tiny_llama(layers=2, hidden=128)
    model.config.save_pretrained(tmp_path)
    guess = estimate(recipe(tmp_path, train={"length": 64, "max_tokens": 640}), probe=False).size("activations")
    wrap_model(model, rank=3, scaling=2.0)
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.train().base_model(torch.randint(0, 98, (2, 64)), use_cache=False)[0]
    assert hidden.requires_grad and len(find_blocks(model)) == 2
    kept = sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in weights)
    assert 0.75 * kept < guess < 1.35 * kept


def test_probe_gives_a_time(model_directory):
    found = estimate(recipe(model_directory))
    assert 1e7 < found.rate < 1e16
    assert found.seconds == pytest.approx(found.flops / found.rate)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"model": "/nowhere/model"}, ModelError, "/nowhere/model"),
        ({"model": "package:no_such_package"}, ModelError, "no_such_package"),
        ({"prune": {"pruner": "nothing"}}, RecipeError, "prune.pruner"),
        (
            {"prune": {"pruner": "sparsegpt", "block_size": 10, "sparsity": None, "pattern": "2:4"}},
            RecipeError,
            "block",
        ),
        ({"device": "nonsense"}, RecipeError, "device: .*nonsense"),
    ],
)
def test_refusals(model_directory, changes, error, message):
    with pytest.raises(error, match=message):
        estimate(recipe(**{"model": model_directory} | changes), probe=False)


def test_tables_name_every_part(model_directory):
    found = estimate(recipe(model_directory), probe=False)
    memory, rounds, work = map(plain_text, estimate_tables(found))
    assert all(holding.what in memory and holding.how in memory for holding in found.holdings)
    assert f"{PARAMETERS:,} parameters (float32), {2 * BLOCK:,} prunable in 2 blocks" in memory
    assert "43.8 %" in rounds and "losa: training" in work and "not measured" in work


def test_labels_that_are_drawn_take_softmaxes(model_directory):
    found = estimate(recipe(model_directory, allocation={"rates": "fisher"}), probe=False)
    assert found.size("loss for gradients") == 12 * 98 * 16 + 2 * 16 * 32 * 4


def test_what_is_no_model_is_refused_in_a_sentence(tmp_path, model_directory):
    packed, adapter = tmp_path / "packed", tmp_path / "adapter"
    for directory in (packed, adapter):
        tiny_llama(layers=2).config.save_pretrained(directory)
    (packed / "losa_packed.json").write_text("{}")
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="packed; `losa unpack` it first"):
        estimate(recipe(packed), probe=False)
    with pytest.raises(ModelError, match="adapter"):
        estimate(recipe(adapter), probe=False)
    with pytest.raises(RecipeError, match="device: expected .* got 'meta'"):
        estimate(recipe(model_directory, device="meta"), probe=False)
