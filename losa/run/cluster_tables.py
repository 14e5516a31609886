"""A plan for a cluster as tables: memory by phase, rounds, work, and bytes that GPUs take in."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from losa.run.cluster import Cluster
from losa.run.estimate_cluster import ClusterEstimate
from losa.run.estimate_tables import ALL_EXPERTS, add_row, plain_frame, size_text, time_text
from losa.run.holding import PHASES


def cluster_tables(estimate: ClusterEstimate) -> list[Table]:
    """Memory by phase, rounds, work, and what GPUs take in."""
    return [_memory_table(estimate), _rounds_table(estimate), _work_table(estimate), _wire_table(estimate)]


def _memory_table(estimate: ClusterEstimate) -> Table:
    shape, cluster = estimate.planned.shape, estimate.cluster
    dtype = str(shape.dtype).removeprefix("torch.")
    title = (
        f"{estimate.planned.recipe.model}: {estimate.parameters:,} parameters ({dtype}), {shape.prunable:,} prunable "
        f"in {shape.blocks} blocks\n{_count(cluster.gpus, 'GPU')} of {size_text(cluster.memory)} in "
        f"{_count(cluster.machines, 'machine')}: {_held(estimate)}"
    )
    table = plain_frame(title, "\n".join(_verdicts(estimate)))
    for column in ("phase", "where", "what", "size", "counted as"):
        table.add_column(column, justify="right" if column == "size" else "left")
    device, machine = estimate.device(), estimate.machine()
    for phase in PHASES:
        for holding in (h for h in estimate.holdings if h.phase == phase):
            where = "GPU" if holding.place == "device" else "host"
            add_row(table, phase, where, holding.what, size_text(holding.size), holding.how)
        if phase in device:
            verdict = f"throughout + {phase}: {estimate.verdict(device[phase], cluster.memory)}"
            add_row(table, phase, "GPU", "all together", size_text(device[phase]), verdict)
            processes = f"of {_count(cluster.fullest, 'process', 'processes')}"
            if cluster.host_memory is not None:
                processes += f": {estimate.verdict(machine[phase], cluster.host_memory)}"
            if machine[phase]:
                add_row(table, phase, "machine", "host memory", size_text(machine[phase]), processes)
    return table


def _held(estimate: ClusterEstimate) -> str:
    placement, asked = estimate.placement, estimate.planned.recipe.distributed.mode
    return f"{placement.text} ({f'auto: {placement.mode}' if asked == 'auto' else placement.mode})"


def _verdicts(estimate: ClusterEstimate) -> Iterator[str]:
    memory, host = size_text(estimate.cluster.memory), estimate.cluster.host_memory
    yield "An estimate of what losa itself holds, of the process that holds most. Nothing of it was measured."
    yield f'"fits": with a fifth more, for the allocator, CUDA and data, it is no more than {memory}.'
    if host is None:
        yield "Host memory is not judged: --host-memory says how much a machine has."
    else:
        yield f"A machine has {size_text(host)} of host memory."
    if not estimate.planned.shape.work.routed:
        yield ALL_EXPERTS
    if not estimate.fits:
        for change, need in estimate.remedies:
            yield f"It fits with {change} ({size_text(need)} with a fifth more)."
        if not estimate.remedies:
            yield "No setting and no 16 times as many GPUs make it fit."


def _rounds_table(estimate: ClusterEstimate) -> Table:
    own = estimate.planned.rounds[estimate.planned.recipe.method]
    length = estimate.planned.train_length
    open_end = not any(r.sequences for r in own)
    caption = "train.max_tokens is not set: the data's amount decides." if open_end and length else None
    table = plain_frame("rounds", caption)
    for column in ("round", "sparsity", "mean rank", "sequences", "tokens", "pruning", "training", "evaluation"):
        table.add_column(column, justify="right")
    for r in own:
        amounts = ("-", "-") if open_end else (f"{r.sequences:,}", f"{r.sequences * length:,}")
        times = ("-" if seconds is None else time_text(seconds) for seconds in estimate.round_seconds(r))
        add_row(table, str(r.index), f"{100 * r.sparsity:.1f} %", str(r.mean_rank), *amounts, *times)
    return table


def _work_table(estimate: ClusterEstimate) -> Table:
    cluster = estimate.cluster
    table = plain_frame(
        "work of the GPU that has most",
        f"Assumed, not measured: {_assumed(cluster)}. Matrix products, and then the wire, without any overlap.",
    )
    for column in ("what", "FLOP", "products", "taken in", "wire", "together"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for stage, traffic in estimate.stages:
        wire = sum(map(cluster.seconds, traffic))
        taken = sum(t.received + t.from_host for t in traffic)
        times = (time_text(stage.flops / cluster.rate), size_text(taken), time_text(wire))
        add_row(table, stage.what, f"{stage.flops:.2e}", *times, time_text(estimate.seconds(stage, traffic)))
    every = sum(estimate.seconds(stage, traffic) for stage, traffic in estimate.stages if stage.counted)
    add_row(table, "all counted", "", "", "", "", time_text(every))
    return table


def _wire_table(estimate: ClusterEstimate) -> Table:
    table = plain_frame("bytes that one GPU takes in", None)
    for column in ("stage", "what", "from GPUs", "by network", "from host", "counted as"):
        table.add_column(column, justify="left" if column in ("stage", "what", "counted as") else "right")
    for stage, traffic in estimate.stages:
        for t in traffic:
            sizes = (size_text(size) if size else "-" for size in (t.received, t.network, t.from_host))
            add_row(table, stage.what, t.what, *sizes, t.how)
    return table


def _assumed(cluster: Cluster) -> str:
    default = Cluster(1)
    rate, network = (
        f"{cluster.rate / 1e12:.0f} TFLOP/s a GPU",
        f"{cluster.between / 1e9:g} GB/s by a GPU's network card",
    )
    if cluster.rate == default.rate:
        rate += " (0.4 of an H100's 989 for dense bf16, by its data sheet)"
    if cluster.between == default.between:
        network += " (400 Gb/s)"
    return (
        f"{rate}; {network}; {cluster.inside / 1e9:g} GB/s from GPUs of its machine (NVLink 4); "
        f"{cluster.host_link / 1e9:g} GB/s from host memory (PCIe 5 x16)"
    )


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
