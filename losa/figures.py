"""Pictures of a run: PNG for people, CSV with the same numbers for everything else."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from losa.record import RunRecord

# Okabe and Ito's palette: told apart by colour-blind readers and in print.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")


def write_figures(record: RunRecord, directory: Path) -> list[Path]:
    """Write every figure that the record has numbers for; the paths written, PNG and CSV.

    sparsity: rate per block and round; ranks: rank per block and round; errors: reconstruction error per block and
    round; cka: similarity between blocks, first and last round; perplexity: over rounds, with the baselines.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rounds = record.rounds
    written: list[Path] = []
    if not rounds:
        return written
    labels = [f"round {r.index}" for r in rounds]
    per_block = {
        "sparsity": ("Sparsity per block", "pruned weights (%)", [[100 * s for s in r.sparsity] for r in rounds]),
        "ranks": ("Adapter rank per block", "rank", [r.ranks for r in rounds]),
        "errors": ("Reconstruction error per block", "relative error E", [r.errors for r in rounds]),
    }
    for name, (title, unit, series) in per_block.items():
        if all(series) and not (name == "ranks" and record.method == "prune_only"):
            columns = dict(zip(labels, series, strict=True))
            written += _block_figure(directory / name, title, unit, columns, logarithmic=name == "errors")
    similarities = [(r.index, r.similarity) for r in rounds if r.similarity is not None]
    if similarities:
        written += _cka_figure(directory / "cka", [similarities[0], similarities[-1]][: len(similarities)])
    if any(r.perplexity is not None for r in rounds):
        written += _perplexity_figure(directory / "perplexity", record)
    return written


def _plot(width: float = 7.0, height: float = 3.8, columns: int = 1):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
    return figure, axes[0]


def _save(figure, path: Path) -> Path:
    from matplotlib import pyplot as plt

    target = path.with_suffix(".png")
    figure.savefig(target, dpi=150)
    plt.close(figure)
    return target


def _write_csv(path: Path, header: Sequence[str], rows) -> Path:
    target = path.with_suffix(".csv")
    with target.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return target


def _block_figure(path: Path, title: str, unit: str, columns: dict[str, list], logarithmic: bool) -> list[Path]:
    figure, (axis,) = _plot()
    blocks = range(len(next(iter(columns.values()))))
    for position, (label, values) in enumerate(columns.items()):
        last = position == len(columns) - 1
        axis.step(
            blocks,
            values,
            where="mid",
            label=label,
            color=COLOURS[position % len(COLOURS)],
            linewidth=2.2 if last else 1.2,
            alpha=1 if last else 0.75,
        )
    axis.set(title=title, xlabel="decoder block", ylabel=unit)
    if logarithmic:
        axis.set_yscale("log")
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(
        frameon=False, ncols=min(len(columns), 5), fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.16)
    )
    rows = [[block, *(values[block] for values in columns.values())] for block in blocks]
    return [_save(figure, path), _write_csv(path, ["block", *columns], rows)]


def _cka_figure(path: Path, matrices: list[tuple[int, list[list[float]]]]) -> list[Path]:
    figure, axes = _plot(width=4.2 * len(matrices) + 0.8, columns=len(matrices))
    rows = []
    for axis, (index, matrix) in zip(axes, matrices, strict=True):
        image = axis.imshow(matrix, vmin=0, vmax=1, cmap="viridis", origin="lower", interpolation="nearest")
        axis.set(title=f"CKA before round {index}", xlabel="decoder block", ylabel="decoder block")
        rows += [[index, i, j, value] for i, line in enumerate(matrix) for j, value in enumerate(line)]
    figure.colorbar(image, ax=list(axes), label="similarity of block outputs", shrink=0.9)
    return [_save(figure, path), _write_csv(path, ["round", "block_i", "block_j", "cka"], rows)]


def _perplexity_figure(path: Path, record: RunRecord) -> list[Path]:
    figure, (axis,) = _plot()
    rounds = [r for r in record.rounds if r.perplexity is not None]
    axis.plot(
        [100 * r.target_sparsity for r in rounds],
        [r.perplexity for r in rounds],
        marker="o",
        color=COLOURS[0],
        label=f"{record.method}, after each round",
    )
    styles = ("--", ":", "-.", (0, (1, 1)), (0, (5, 1)))
    others = [r for r in record.results if r.method != record.method and r.perplexity is not None]
    for position, result in enumerate(others):
        value = result.perplexity_unmerged or result.perplexity
        name = result.method.replace("_", " ") + (" (not merged)" if result.perplexity_unmerged else "")
        colour, style = COLOURS[(position + 1) % len(COLOURS)], styles[position % len(styles)]
        axis.axhline(value, linestyle=style, color=colour, label=name)
    axis.set(title="Perplexity over rounds", xlabel="target sparsity of the round (%)", ylabel="perplexity")
    axis.set_yscale("log")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    rows = [[r.index, r.target_sparsity, r.perplexity] for r in rounds]
    return [_save(figure, path), _write_csv(path, ["round", "target_sparsity", "perplexity"], rows)]
