"""The plan for a cluster against numbers counted by hand. Shards: tests/losa/run/test_plan_70b.py."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from losa.algorithm.engine import Engine
from losa.algorithm.stream import BlockStream
from losa.distributed import sharding
from losa.distributed.sharding import make_sharding, shard_module
from losa.errors import RecipeError
from losa.evaluation.perplexity import perplexity
from losa.model.blocks import find_blocks
from losa.model.wrapping import merge_model, wrap_model
from losa.output.tables import plain_text
from losa.recipe.reading import override, parse_recipe
from losa.run.cluster import Cluster, Traffic
from losa.run.cluster_tables import cluster_tables
from losa.run.estimate import estimate
from losa.run.estimate_cluster import _changes, estimate_cluster
from losa.run.planned import MARGIN
from tests.helpers.command_line import succeed
from tests.helpers.tiny import tiny_llama

# tiny_llama, as in tests/losa/run/test_estimate.py; two norms a block and one after the blocks.
IN, OUT = 6 * 32 + 64, 2 * 32 + 2 * 16 + 2 * 64 + 32
BLOCK = 2 * 1024 + 2 * 512 + 3 * 2048
OUTSIDE = 2 * 98 * 32 + 32
WEIGHTS = 4 * (2 * (BLOCK + 64) + OUTSIDE)
ADAPTERS = 4 * 3 * (IN + OUT)  # of a block, mean rank 2 + 1
WHOLE = 4 * (BLOCK + 64) + BLOCK // 8 + ADAPTERS
# As four processes send them: 4 rows of A, which has 3, and 100 of 98 words.
SENT, OUTSIDE_SENT = WHOLE + 4 * IN, 2 * 100 * 32 + 32


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    tiny_llama(layers=2).config.save_pretrained(directory)
    return directory


def recipe(directory, **changes):
    settings = {
        "model": str(directory),
        "output": "out",
        "prune": {"sparsity": 0.5},
        "calibration": {"data": "c.txt", "samples": 5, "length": 16, "cka_samples": 3, "batch_size": 2},
        "train": {"data": "t.txt", "length": 16, "batch_size": 2, "max_tokens": 160, "precision": "float32"},
        "evaluate": {"data": "e.txt", "length": 32, "max_windows": 3},
        "allocation": {"mean_rank": 2, "rank_max": 4},
        "rounds": {"count": 2},
    }
    for key, value in changes.items():
        settings[key] = settings.get(key, {}) | value if isinstance(value, dict) else value
    return parse_recipe(settings)


def plan(directory, gpus=4, memory=1e9, **changes):
    return estimate_cluster(recipe(directory, **changes), Cluster(gpus, per_machine=2, memory=memory))


def traffic(found, stage):
    (every,) = [traffic for s, traffic in found.stages if s.what == stage]
    return {t.what: t for t in every}


def test_whole_models_hold_what_one_process_holds(directory):
    found, alone = plan(directory), estimate(recipe(directory), probe=False)
    assert found.placement.mode == "ddp" and found.fits and not found.remedies
    assert found.size("throughout", "weights") == alone.size("weights") == WEIGHTS
    assert found.size("training", "buckets") == found.size("training", "gradients") == 2 * ADAPTERS
    # Three batches, so that a process has one of them: two samples, each in a dense and a sparse stream.
    assert found.size("pruning", "hidden states") == 2 * 2 * 16 * 32 * 4
    assert alone.size("hidden states") == 2 * 5 * 16 * 32 * 4
    # Each process loads the model on the host.
    assert found.machine()["loading"] == 2 * WEIGHTS and "export" not in found.machine()
    training = traffic(found, "losa: training")
    # Round 1 has 1 sequence and round 2 has 9: steps of 8 sequences.
    assert training["gradients"].received == 3 * 2 * 2 * ADAPTERS * 3 / 4
    assert training.keys() == {"gradients"} and not traffic(found, "losa: evaluation")


def test_gradients_go_to_the_owners_and_need_whole_models(directory):
    prune = {"pruner": "pruner_zero", "regrow": True, "regrow_by": "gradient"}
    pruning = [t for s, every in plan(directory, prune=prune).stages if s.kind == "pruning" for t in every]
    # Of two rounds the pruner's in both, and what weights come back by in the second.
    assert [t.received for t in pruning if t.what == "statistics of gradients"] == [2 * 8 * BLOCK, 8 * BLOCK]
    assert "statistics" not in {t.what for t in pruning}
    small = plan(directory, prune=prune, memory=1e5)
    assert small.placement.mode == "ddp" and not small.fits
    assert not any("fsdp" in text for text, _ in small.remedies)


def test_shards_hold_rows_and_whole_blocks(directory):
    found = plan(directory, distributed={"mode": "fsdp"})
    # Rows of 98 words, 32, 16 and 64 among 4 processes; A has 3 rows, of which a process has 1.
    outside = 2 * 25 * 32 + 8
    assert found.size("throughout", "weights") == 4 * (2 * (BLOCK + 64) // 4 + outside)
    assert found.size("throughout", "masks") == 2 * BLOCK // 8 // 4
    own = 2 * 4 * (IN + 3 * OUT // 4)
    assert found.size("throughout", "adapters") == found.size("training", "gradients") == own
    assert found.size("training", "optimiser") == 2 * own
    assert found.size("training", "state to be written") == 3 * own
    assert found.size("pruning", "one block, whole") == found.size("evaluation", "one block, whole") == WHOLE
    assert found.size("training", "blocks, whole") == WHOLE
    assert found.size("training", "blocks on their way") == 2 * SENT
    assert found.size("training", "gradients of blocks") == 2 * (2 * ADAPTERS + 4 * IN)
    assert found.size("training", "outside of the blocks") == 4 * OUTSIDE
    assert found.size("export", "one block, twice") == 2 * 4 * (BLOCK + 64)
    training = traffic(found, "losa: training")
    # Three steps, each a forward and a backward pass; two rounds, each with a pass before it.
    assert training["blocks"].received == pytest.approx((3 * 2 + 2) * 2 * SENT * 3 / 4)
    assert training["blocks"].network == pytest.approx(8 * 2 * SENT / 2 / 2), "a machine's two cards share a half"
    assert training["outside of the blocks"].received == pytest.approx((3 + 2) * 4 * OUTSIDE_SENT * 3 / 4)
    assert training["gradients"].received == pytest.approx(3 * 2 * (ADAPTERS + 4 * IN) * 3 / 4)
    pruning = traffic(found, "losa: calibration and pruning")
    # Two rounds of two passes; before them a check of three and a batch's pass, after them a merge.
    assert pruning["blocks"].received == pytest.approx((2 * 2 + 3 + 1 + 1) * 2 * SENT * 3 / 4)
    # Two rounds of three streams, and the check.
    assert pruning["outside of the blocks"].received == pytest.approx((2 * 3 + 1) * 4 * OUTSIDE_SENT * 3 / 4)
    assert pruning["adapters"].received == pytest.approx(2 * 2 * (ADAPTERS + 4 * IN) * 3 / 4)
    assert "dense weights" not in pruning
    assert pruning["statistics"].received == 2 * 2 * 4 * IN
    assert pruning["masks"].received == 2 * 2 * BLOCK / 8
    assert pruning["features for CKA"].received == pytest.approx(2 * 2 * (2 * 16 * 32 * 4) * 3 / 4)
    # A batch each, and two tokens more.
    evaluation = traffic(found, "losa: evaluation")
    assert evaluation["blocks"].received == pytest.approx(3 * (1 + 1) * 2 * SENT * 3 / 4)
    assert evaluation["outside of the blocks"].received == pytest.approx(3 * 4 * OUTSIDE_SENT * 3 / 4)


def test_settings_of_shards(directory):
    kept = plan(directory, distributed={"mode": "fsdp", "reshard_after_forward": False})
    resharded = plan(directory, distributed={"mode": "fsdp"})
    assert kept.size("training", "blocks, whole") == 2 * resharded.size("training", "blocks, whole") == 2 * WHOLE
    once, twice = (traffic(each, "losa: training")["blocks"].received for each in (kept, resharded))
    assert twice / once == pytest.approx((3 * 2 + 2) / (3 + 2))
    summed = plan(directory, distributed={"mode": "fsdp"}, train={"gradient_accumulation": 2})
    assert summed.size("training", "gradients, summed") == 2 * ADAPTERS
    checkpoints = plan(directory, distributed={"mode": "fsdp", "activation_checkpointing": True})
    less = checkpoints.size("training", "activations")
    assert less < resharded.size("training", "activations")
    assert less == plan(directory, train={"activation_checkpointing": True}).size("training", "activations")
    without = plan(directory, checkpoint={"asynchronous": False}, distributed={"mode": "fsdp"})
    assert "state to be written" not in {holding.what for holding in without.holdings}


def test_a_teacher_makes_blocks_whole_once_more(directory):
    fsdp = {"mode": "fsdp"}
    changes = {"prune": {"pruner": "sparsegpt"}, "train": {"distill": {}}}
    plain, taught = (plan(directory, distributed=fsdp, **change) for change in ({}, changes))
    before, after = (traffic(found, "losa: training") for found in (plain, taught))
    # Three steps, and once before each of two rounds.
    assert after["blocks"].received / before["blocks"].received == (3 * 3 + 2) / (2 * 3 + 2)
    assert after["dense weights"].received == 3 * 4 * 2 * BLOCK * 3 / 4
    assert taught.size("training", "dense weights of a block") == 4 * BLOCK


def test_copies_of_shards_stay_inside_of_a_machine(directory):
    found = plan(directory, distributed={"mode": "hsdp"})
    assert (found.placement.shard_size, found.placement.copies) == (2, 2)
    training = traffic(found, "losa: training")
    assert training["blocks"].network == training["gradients"].network == 0
    # A has 3 rows, of which a process has 2.
    own = 2 * 4 * (2 * IN + 3 * OUT // 2)
    assert training["gradients of copies"].network == training["gradients of copies"].received == 3 * own
    with pytest.raises(RecipeError, match="divisor of 4 processes, got 3"):
        plan(directory, distributed={"mode": "hsdp", "shard_size": 3})


def test_offloaded_rows_are_in_host_memory(directory):
    found = plan(directory, gpus=1, distributed={"cpu_offload": True})
    places = {(h.phase, h.what): h.place for h in found.holdings}
    for key in (("throughout", "weights"), ("throughout", "adapters"), ("training", "optimiser")):
        assert places[key] == "host"
    assert places["pruning", "one block, whole"] == places["training", "blocks, whole"] == "device"
    assert ("training", "blocks on their way") not in places
    # Pinned: an A of 3 rows takes as much as one of 4, B has 3 columns.
    powers = sum(1 << (4 * 3 * side - 1).bit_length() for side in (*[32] * 6, 64, 32, 32, 16, 16, 64, 64, 32))
    assert found.size("throughout", "adapters") == found.size("training", "gradients") == 2 * powers
    assert found.size("training", "optimiser") == 2 * 2 * ADAPTERS
    evaluation = traffic(found, "losa: evaluation")
    assert evaluation["blocks"].received == 0 and evaluation["blocks"].from_host == 3 * (3 + 1) * 2 * WHOLE
    assert evaluation["outside of the blocks"].from_host == 3 * 4 * OUTSIDE


def test_host_memory_is_judged_where_it_is_known(directory):
    def on_hosts(host_memory, **distributed):
        return estimate_cluster(
            recipe(directory, distributed=distributed), Cluster(4, per_machine=2, memory=1e9, host_memory=host_memory)
        )

    offloaded = on_hosts(None, mode="fsdp", cpu_offload=True)
    needed = MARGIN * max(offloaded.machine().values())
    assert offloaded.fits and on_hosts(needed, mode="fsdp", cpu_offload=True).fits
    less = on_hosts(needed - 1, mode="fsdp", cpu_offload=True)
    assert not less.fits and less.remedies, "other machines hold some of the rows"
    text = plain_text(cluster_tables(less)[0])
    assert "of 2 processes: tight" in text and "It fits with 8 GPUs, fsdp" in text
    assert "Host memory is not judged" in plain_text(cluster_tables(offloaded)[0])
    # Both processes of a machine read the whole model before it moves to a GPU; of shards they read rows.
    whole = on_hosts(None)
    assert whole.placement.mode == "ddp"
    assert on_hosts(MARGIN * max(whole.machine().values()) - 1).placement.mode == "fsdp"


def test_remedies_are_recipes(directory):
    costly = {"reshard_after_forward": False, "activation_checkpointing": False}
    for distributed in ({"mode": "ddp"}, {"mode": "hsdp", "shard_size": 2} | costly, {"mode": "fsdp"} | costly, costly):
        given = recipe(directory, distributed=distributed)
        for text, settings in _changes(given, Cluster(4)).items():
            changed = parse_recipe(override(given.model_dump(), dict(settings))).distributed
            says_mode = "mode: fsdp" in text or given.distributed.mode in ("auto", "fsdp")
            assert says_mode or changed.mode == given.distributed.mode
            assert ("shard_size: null" in text) == (changed.shard_size != given.distributed.shard_size)


@pytest.fixture
def alone():
    """A group of one process."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_a_run_makes_whole_what_is_planned(directory, alone, monkeypatch, pruner):
    """Of a model in shards that one process holds: how often masks of blocks, and embeddings, become whole."""
    changes = {"prune": {"pruner": pruner}, "allocation": {"ranks": "uniform"}, "distributed": {"cpu_offload": True}}
    found = plan(directory, gpus=1, **changes)
    given = found.planned.recipe
    made: dict[str, int] = {}
    real = sharding._wholes

    def counted(tensors):
        for tensor in tensors:
            kind = "masks" if tensor.dtype == torch.uint8 else "words" if len(tensor) == 98 else "others"
            made[kind] = made.get(kind, 0) + tensor.numel() * tensor.element_size()
        return real(tensors)

    def as_planned(stage):
        ours = made.pop("masks") / (2 * BLOCK // 8), made.pop("words") / (4 * 2 * 98 * 32)
        planned = traffic(found, stage)
        times = planned["blocks"].from_host / (2 * WHOLE), planned["outside of the blocks"].from_host / (4 * OUTSIDE)
        return ours == pytest.approx(times)

    monkeypatch.setattr(sharding, "_wholes", counted)
    ids = torch.randint(0, 98, (5, 16), generator=torch.Generator().manual_seed(0))
    model = tiny_llama(layers=2)
    wrap_model(model, rank=1, scaling=2.0)
    shard_module(model, make_sharding(torch.device("cpu")))
    for _ in range(3):
        perplexity(model, ids.flatten().repeat(2), 32, max_windows=3)
    assert as_planned("losa: evaluation")
    calls: dict = {}
    BlockStream(model, find_blocks(model), ids[:1], calls=calls)
    engine = Engine(model, ids, given.prune, given.allocation, given.calibration, calls=calls)
    for each in found.planned.rounds["losa"]:
        engine.run_round(each)
    merge_model(model)
    assert as_planned("losa: calibration and pruning")


def test_sparsegpt_sends_hessians_and_weights(directory):
    found = plan(directory, prune={"pruner": "sparsegpt"}, distributed={"mode": "fsdp"})
    assert found.size("pruning", "dense weights") == found.size("training", "dense weights") == 4 * 2 * BLOCK // 4
    assert found.size("pruning", "new weights of a block") == 4 * BLOCK
    pruning = traffic(found, "losa: calibration and pruning")
    assert pruning["statistics"].received == 2 * 2 * 4 * (6 * 32**2 + 64**2)
    assert pruning["new weights"].received == 2 * 4 * 2 * BLOCK
    dense = pruning["dense weights"]
    assert dense.received == pytest.approx(4 * 2 * BLOCK * 3 / 4), "in the second round"
    assert dense.from_host == 4 * 2 * BLOCK // 4


def test_reconstruction_sends_gradients_each_step(directory):
    found = plan(directory, reconstruct={"steps": 7})
    sent = traffic(found, "losa: calibration and pruning")["gradients of blocks"]
    assert sent.received == pytest.approx(2 * 7 * 2 * (2 * ADAPTERS) * 3 / 4), "two rounds, two blocks"
    assert found.size("reconstruction", "reconstruction of a block") > 4 * ADAPTERS


def test_the_slowest_owner_counts(directory):
    """A block's linears cost 4/3 in^3 + in^2 out: down the most, and with two processes alone against all others."""
    with_gpus = {}
    for gpus in (1, 2, 8):
        (stage,) = [
            stage
            for stage, _ in plan(
                directory, gpus=gpus, method="prune_only", prune={"pruner": "sparsegpt"}, evaluate=None, train=None
            ).stages
        ]
        with_gpus[gpus] = stage.flops
    costs = {(i, o): 4 / 3 * i**3 + i * i * o for i, o in ((32, 32), (32, 16), (32, 64), (64, 32))}
    others = 2 * (costs[32, 32] + costs[32, 16] + costs[32, 64])
    token = 2 * 2 * BLOCK + 2 * 16 * 32 * 2
    hessians = 2 * 2 * (6 * 32**2 + 64**2)
    own = {
        1: 5,
        2: 4,
        8: 2,
    }  # samples, in batches of two, for the stream and for statistics
    for gpus, slowest in ((1, costs[64, 32] + others), (2, max(costs[64, 32], others)), (8, costs[64, 32])):
        # Two samples alone, whole and block by block, and a whole batch come first.
        forward = (2 * own[gpus] + 2 * 2 + 2) * 16 * token
        assert with_gpus[gpus] == pytest.approx(forward + own[gpus] * 16 * hessians + 2 * slowest)


def test_samples_linears_and_windows_are_shared_out(directory):
    work = [{s.what: s.flops for s, _ in plan(directory, gpus=gpus).stages} for gpus in (1, 2, 3)]
    alone = estimate(recipe(directory), probe=False)
    assert work[0] == {stage.what: stage.flops for stage in alone.stages}
    assert [each["losa: evaluation"] / work[2]["losa: evaluation"] for each in work] == [3, 2, 1]
    one_token = work[0]["losa: training"] / 160
    # One process: ten sequences. Two: 1, and 9 in steps of 4: 2 + 2 + 1. Three: 1, and 9 in steps of 6: 2 + 1.
    assert [each["losa: training"] / one_token / 16 for each in work] == [10, 6, 4]


def test_a_plan_that_does_not_fit_names_what_helps(tmp_path):
    tiny_llama(layers=24).config.save_pretrained(tmp_path)
    whole = plan(tmp_path, gpus=2, distributed={"mode": "ddp"})
    peak = max(whole.device().values())
    memory = MARGIN * peak - 1
    assert plan(tmp_path, gpus=2, memory=memory).placement.mode == "fsdp", "auto"
    found = plan(tmp_path, gpus=2, memory=memory, distributed={"mode": "ddp"})
    assert not found.fits
    assert [found.verdict(times * peak, memory) for times in (1, 2)] == ["tight", "does not fit"]
    helps = dict(found.remedies)
    assert all(need <= memory for need in helps.values())
    sharded = plan(tmp_path, gpus=2, distributed={"mode": "fsdp"})
    assert helps["distributed.mode: fsdp"] == MARGIN * max(sharded.device().values())
    kept = plan(tmp_path, gpus=2, distributed={"mode": "fsdp", "reshard_after_forward": False})
    assert kept.size("training", "blocks, whole") == 24 * sharded.size("training", "blocks, whole")
    text = plain_text(cluster_tables(found)[0])
    assert "It fits with distributed.mode: fsdp (" in text and "tight" in text
    hopeless = plan(tmp_path, gpus=2, memory=1000, distributed={"mode": "ddp"})
    assert not hopeless.remedies and "No setting" in plain_text(cluster_tables(hopeless)[0])


def test_changes_that_help_only_together(directory):
    """Long sequences: neither smaller batches nor checkpointing is enough."""
    train = {"length": 512, "batch_size": 8, "max_tokens": None}
    changes = {"train": train, "distributed": {"mode": "fsdp"}}
    small = {"batch_size": 1, "gradient_accumulation": 8, "activation_checkpointing": True}
    both = plan(directory, train=train | small, distributed={"mode": "fsdp"})
    memory = MARGIN * max(both.device().values())
    found = plan(directory, memory=memory, **changes)
    expected = "train.batch_size: 1 with gradient_accumulation: 8 and train.activation_checkpointing: true"
    assert dict(found.remedies)[expected] == memory
    assert not any(text.startswith("train.activation") for text, _ in found.remedies)


def test_bytes_of_collectives():
    cluster = Cluster(8, per_machine=4, between=10, inside=100, host_link=1)
    assert cluster.machines == 2
    gathered = cluster.all_gather("", 800, 8, "")
    assert (gathered.received, gathered.network) == (700, 100), "half of it comes into a machine, by four cards"
    assert cluster.seconds(gathered) == 10
    assert cluster.all_gather("", 800, 4, "").network == 0 and cluster.all_gather("", 800, 1, "").received == 0
    assert cluster.all_reduce("", 800, 8, "") == gathered.times(2)
    assert cluster.broadcast("", 800, 8, "") == Traffic("", 800, 200, "")
    assert cluster.broadcast("", 800, 1, "") == Traffic("", 0, 0, "")
    assert cluster.all_to_all("", 800, 8, "") == Traffic("", 700, 400, "")
    assert cluster.seconds(Traffic("", 0, 0, "", from_host=3)) == 3


def test_tables_say_what_is_assumed(directory):
    found = plan(directory)
    memory, rounds, work, wire = map(plain_text, cluster_tables(found))
    assert all(holding.what in memory and holding.how in memory for holding in found.holdings)
    assert "4 GPUs of 1 GB in 2 machines: each holds the whole model (auto: ddp)" in memory
    assert "Nothing of it was measured" in memory and "throughout + training: fits" in memory
    assert "43.8 %" in rounds and "gradients" in wire
    assert "Assumed, not measured: 396 TFLOP/s" in work and "data sheet" in work
    times = [found.round_seconds(each) for each in found.planned.rounds["losa"]]
    for position, kind in enumerate(("pruning", "training")):
        (total,) = [found.seconds(s, t) for s, t in found.stages if s.kind == kind]
        assert sum(each[position] for each in times) == pytest.approx(total)


def test_the_command(directory, tmp_path):
    (tmp_path / "r.yaml").write_text(recipe(directory).model_dump_json())  # JSON is YAML
    options = ["--gpus", "16", "--memory", "0.001", "--gpus-per-node", "4", "--tflops", "100", "--bandwidth", "25"]
    out = succeed("plan", tmp_path / "r.yaml", *options)
    assert "16 GPUs of 1 MB in 4 machines" in out
    assert "100 TFLOP/s a GPU; 25 GB/s by a GPU's network card; 450 GB/s" in out
