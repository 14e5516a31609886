"""Pictures of a run: PNG for people, CSV with the record's own numbers for everything else."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

from losa.errors import OutputError, reason
from losa.recipe.methods import method_label
from losa.record import MethodResult, RoundRecord, RunRecord
from losa.storage.files import write_bytes, write_text

# Okabe and Ito's palette: told apart by colour-blind readers and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9")
STYLES = ("--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)))
# Ordered values: light to dark in any print, the same for colour-blind readers.
ORDERED = "viridis"
ANNOTATED_BLOCKS = 48
ERRORS = {
    "relative": "relative error E (per-channel)",
    "frobenius": "error E (Frobenius norm)",
}


def write_figures(record: RunRecord, directory: Path) -> list[Path]:
    """Write every figure that the record has numbers for.

    sparsity: share of pruned weights per block and round; ranks: adapter rank per block and round; errors:
    reconstruction error per block and round; cka: similarity between block outputs, first and last round; perplexity:
    after each round, beside the other methods; methods: the final perplexity of each.

    Returns:
        the paths written, PNG and CSV.

    Raises:
        OutputError: the directory cannot be written.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {directory}: {reason(error)}") from error
    rounds = record.rounds
    written: list[Path] = []
    finals = _final_perplexities(record)
    if len(finals) > 1:
        written += _methods(directory / "methods", record, finals)
    if not rounds:
        return written
    written += _sparsity(directory / "sparsity", rounds)
    if record.ranked:
        written += _ranks(directory / "ranks", rounds)
    if any(r.errors for r in rounds):
        kind = record.recipe.get("allocation", {}).get("error", "relative")
        written += _errors(directory / "errors", [r for r in rounds if r.errors], ERRORS.get(kind, "error E"))
    with_similarity = [r for r in rounds if r.similarity]
    if with_similarity:
        written += _cka(directory / "cka", with_similarity)
    if any(r.perplexity is not None for r in rounds):
        written += _perplexity(directory / "perplexity", record, finals)
    return written


def _figure(width: float = 7.0, height: float = 3.8, columns: int = 1):
    """Without pyplot: drawing a report must not change the caller's backend or open figures."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
    return figure, axes


def _whole_ticks(*axes, most: int = 12) -> None:
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.set_major_locator(MaxNLocator(nbins=most, integer=True, min_n_ticks=1))


def _save(figure, path: Path, header: Sequence[str], rows) -> list[Path]:
    # Appended, not replaced: a name may hold a dot.
    picture, table = path.with_name(f"{path.name}.png"), path.with_name(f"{path.name}.csv")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_bytes(picture, buffer.getvalue())
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(table, text.getvalue())
    return [picture, table]


def _by_block(rounds: list[RoundRecord], series: list[list]) -> tuple[list[str], list[list]]:
    """CSV header and rows: a row per block, a column per round."""
    header = ["block", *(f"round {r.index}" for r in rounds)]
    return header, [[block, *values] for block, values in enumerate(zip(*series, strict=True))]


def _round_label(r: RoundRecord) -> str:
    return f"round {r.index}: {100 * r.target_sparsity:.0f} %"


def _lines(axis, rounds: list[RoundRecord], series: list[list[float]]) -> None:
    from matplotlib import colormaps

    count = len(rounds)
    for position, (r, values) in enumerate(zip(rounds, series, strict=True)):
        last = position == count - 1
        # The map's yellow end is too pale for lines.
        colour = colormaps[ORDERED](0.85 * (count - 1 - position) / max(1, count - 1))
        axis.plot(
            range(len(values)),
            values,
            color=colour,
            linewidth=2.2 if last else 1.4,
            marker="o",
            markersize=(4 if last else 2.5) if len(values) <= ANNOTATED_BLOCKS else 0,
            label=_round_label(r),
        )
    axis.grid(axis="y", alpha=0.3)
    axis.set_xlabel("decoder block")
    _whole_ticks(axis.xaxis)
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(
        handles[::-1], labels[::-1], frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5)
    )


def _sparsity(path: Path, rounds: list[RoundRecord]) -> list[Path]:
    figure, (axis,) = _figure(width=8)
    _lines(axis, rounds, [[100 * rate for rate in r.sparsity] for r in rounds])
    axis.set(title="Sparsity per block, after each round", ylabel="pruned weights (%)")
    if axis.get_ylim()[1] - axis.get_ylim()[0] < 5:
        middle = sum(axis.get_ylim()) / 2
        axis.set_ylim(middle - 2.5, middle + 2.5)
    return _save(figure, path, *_by_block(rounds, [r.sparsity for r in rounds]))


def _errors(path: Path, rounds: list[RoundRecord], unit: str) -> list[Path]:
    figure, (axis,) = _figure(width=8)
    errors = [r.errors or [] for r in rounds]
    _lines(axis, rounds, [[value if value > 0 else math.nan for value in line] for line in errors])
    axis.set(title="Reconstruction error of block outputs, after each round's pruning", ylabel=unit)
    if any(value > 0 for line in errors for value in line):
        axis.set_yscale("log")
        _plain_log_ticks(axis.yaxis)
    return _save(figure, path, *_by_block(rounds, errors))


def _plain_log_ticks(axis) -> None:
    """1, 2, 5, 10, ... written out: ranges are often shorter than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    span = high / max(low, 1e-300)
    steps: list[float] = [1, 2, 5]
    if span < 3:
        steps = [1 + 0.5 * i for i in range(18)]
    elif span < 30:
        steps = [1, 1.5, 2, 3, 5, 7]
    elif span > 1e3:
        steps = [1]
    axis.set_major_locator(LogLocator(subs=steps, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_formatter(NullFormatter())


def _ranks(path: Path, rounds: list[RoundRecord]) -> list[Path]:
    blocks = len(rounds[0].ranks)
    width = min(14.0, max(5.0, 1.8 + 0.27 * blocks))
    figure, (axis,) = _figure(width=width, height=1.5 + 0.36 * len(rounds))
    matrix = [r.ranks for r in rounds]
    low, high = min(map(min, matrix)), max(map(max, matrix))
    image = axis.imshow(matrix, aspect="auto", cmap=ORDERED, vmin=low, vmax=max(high, low + 1), interpolation="nearest")
    if blocks <= ANNOTATED_BLOCKS:
        for row, ranks in enumerate(matrix):
            for block, rank in enumerate(ranks):
                bright = rank - low > 0.6 * (high - low)
                axis.text(block, row, rank, ha="center", va="center", size=7, color="black" if bright else "white")
    axis.set(title="Adapter rank per block and round", xlabel="decoder block")
    axis.set_yticks(range(len(rounds)), [f"round {r.index} (mean {sum(r.ranks) / blocks:.1f})" for r in rounds])
    _whole_ticks(axis.xaxis)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axis, label="rank", pad=0.01)
    _whole_ticks(bar.ax.yaxis, most=6)
    return _save(figure, path, *_by_block(rounds, matrix))


def _cka(path: Path, rounds: list[RoundRecord]) -> list[Path]:
    shown = [rounds[0], rounds[-1]] if len(rounds) > 1 else [rounds[0]]
    figure, axes = _figure(width=4.1 * len(shown) + 0.9, height=4.1, columns=len(shown))
    matrices = [r.similarity or [] for r in shown]
    lowest = min(value for matrix in matrices for line in matrix for value in line)
    lowest = max(0.0, min(0.9, math.floor(10 * lowest) / 10))
    for axis, r, matrix in zip(axes, shown, matrices, strict=True):
        image = axis.imshow(matrix, vmin=lowest, vmax=1, cmap=ORDERED, origin="lower", interpolation="nearest")
        axis.set(title=f"before round {r.index}", xlabel="decoder block")
        _whole_ticks(axis.xaxis, axis.yaxis)
    axes[0].set_ylabel("decoder block")
    figure.suptitle("Similarity of block outputs")
    figure.colorbar(image, ax=list(axes), label="linear CKA", shrink=0.85)
    rows = [
        [r.index, i, j, value]
        for r, matrix in zip(shown, matrices, strict=True)
        for i, line in enumerate(matrix)
        for j, value in enumerate(line)
    ]
    return _save(figure, path, ["round", "block_i", "block_j", "cka"], rows)


def _final_perplexities(record: RunRecord) -> list[tuple[MethodResult, float]]:
    """Finite perplexities, the worst first; the unmerged model's where a method has one."""
    found = []
    for r in record.results:
        value = r.perplexity if r.perplexity_unmerged is None else r.perplexity_unmerged
        if value is not None and math.isfinite(value):
            found.append((r, value))
    return sorted(found, key=lambda item: -item[1])


def _methods(path: Path, record: RunRecord, finals: list[tuple[MethodResult, float]]) -> list[Path]:
    figure, (axis,) = _figure(width=8, height=1.1 + 0.4 * len(finals))
    own = [r.method == record.method for r, _ in finals]
    values = [value for _, value in finals]
    colours = [COLOURS[0] if mine else "#888888" for mine in own]
    axis.hlines(range(len(finals)), min(values), values, color=colours, linewidth=2)
    axis.scatter(values, range(len(finals)), color=colours, s=45, zorder=3)
    for row, value in enumerate(values):
        axis.annotate(f"{value:,.4g}", (value, row), (8, 0), textcoords="offset points", va="center", size=9)
    axis.set_yticks(
        range(len(finals)), [f"{method_label(r.method)}, {100 * r.sparsity:.0f} % zeros" for r, _ in finals]
    )
    axis.set(title="Perplexity by method (lower is better)", xlabel=_perplexity_unit(record))
    axis.set_ylim(len(finals) - 0.5, -0.5)
    axis.margins(x=0.12)
    axis.set_xscale("log")
    _plain_log_ticks(axis.xaxis)
    axis.grid(axis="x", alpha=0.3)
    return _save(figure, path, ["method", "sparsity", "perplexity"], [[r.method, r.sparsity, v] for r, v in finals])


def _perplexity(path: Path, record: RunRecord, finals: list[tuple[MethodResult, float]]) -> list[Path]:
    from matplotlib import patheffects

    figure, (axis,) = _figure(width=9)
    rounds = [r for r in record.rounds if r.perplexity is not None]
    own = method_label(record.method)
    axis.plot(
        [r.index for r in rounds],
        [r.perplexity for r in rounds],
        marker="o",
        linewidth=2.2,
        color=COLOURS[0],
        label=f"{own}, after each round",
    )
    halo = [patheffects.withStroke(linewidth=3, foreground="white")]
    for r in rounds:
        if r.perplexity is not None and math.isfinite(r.perplexity):
            where = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center", "zorder": 5}
            text = axis.annotate(f"{r.perplexity:,.4g}", (r.index, r.perplexity), size=8, **where)
            text.set_path_effects(halo)
    others = [(r, value) for r, value in finals if r.method != record.method]
    for position, (other, value) in enumerate(others):
        colour = "black" if other.method == "dense" else COLOURS[1 + position % (len(COLOURS) - 1)]
        label = f"{method_label(other.method)}: {value:,.4g}"
        axis.axhline(value, linestyle=STYLES[position % len(STYLES)], linewidth=1.4, color=colour, label=label)
    axis.set(title="Perplexity over rounds", xlabel="round and its target sparsity", ylabel=_perplexity_unit(record))
    axis.set_xticks([r.index for r in rounds], [f"{r.index}\n{100 * r.target_sparsity:.0f} %" for r in rounds])
    axis.margins(x=0.08, y=0.1)
    axis.set_yscale("log")
    _plain_log_ticks(axis.yaxis)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    rows: list[list] = [[record.method, r.index, r.target_sparsity, r.perplexity] for r in rounds]
    rows += [[other.method, "", other.sparsity, value] for other, value in others]
    return _save(figure, path, ["method", "round", "sparsity", "perplexity"], rows)


def _perplexity_unit(record: RunRecord) -> str:
    length = (record.evaluation or {}).get("length")
    return "perplexity" if length is None else f"perplexity (length {length} tokens)"
