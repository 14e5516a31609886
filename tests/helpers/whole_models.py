"""One architecture through everything that losa does with a model, and what came of it, in words."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from transformers import AutoTokenizer

from losa.data.tokens import calibration_tokens
from losa.errors import LosaError
from losa.inference.generation import generate
from losa.model.blocks import find_blocks
from losa.model.wrapping import matrix_weights
from losa.packed.directory import load, pack_directory, unpack_directory
from losa.recipe.reading import parse_recipe
from losa.record import RunRecord
from losa.run.estimate import estimate
from losa.run.pipeline import run_recipe
from losa_kernels.tensors import as_bits
from tests.helpers.architectures import auto_class_of, model_of
from tests.helpers.book import check_mask, wanda_by_the_book
from tests.helpers.exports import all_matrices, tensors_of
from tests.helpers.runs import settings
from tests.helpers.tiny import tiny_tokenizer

OK = "ok"
# In the order of the table; "loop" is what decodes the packed model.
COLUMNS = ("plan", "prune", "share", "block by block", "2:4", "train", "pack", "loop")
TEXT = "The quick brown fox jumps over the lazy dog; a sparse model decodes faster than a dense one. "
NEW = 24  # tokens: longer than any window of these models


@dataclass
class Model:
    """One architecture on disk, and what its steps leave for later ones."""

    name: str
    folder: Path
    results: dict[str, str] = field(default_factory=dict)
    records: dict[str, RunRecord] = field(default_factory=dict)
    loop: str = ""

    def recipe(self, output: str, **sections):
        base = {"method": "prune_only", "evaluate": None, "prune": {"sparsity": 0.5, "partly": True}}
        return parse_recipe(settings(self.folder, self.folder / output, **base | sections))

    def run(self, output: str, **sections) -> RunRecord:
        return run_recipe(self.recipe(output, **sections), console=Console(file=io.StringIO()))

    def pruned(self, output: str = "pruned"):
        return auto_class_of(self.name).from_pretrained(self.folder / output).eval()

    def tensors(self, output: str) -> dict[str, torch.Tensor]:
        return tensors_of(self.folder / output)


def check_model(name: str, folder: Path) -> dict[str, str]:
    """What came of every column: "ok" or a figure, the sentence of a refusal, or "FAULT" and what happened. A step that
    needs what a refused one would have left has no result ("-")."""
    folder.mkdir(parents=True, exist_ok=True)
    model_of(name).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text("\n".join(f"{i}: {TEXT}" for i in range(60)))
    model = Model(name, folder)
    for column in COLUMNS:
        model.results[column] = _outcome(model, column)
    return model.results


def _outcome(model: Model, column: str) -> str:
    step, needs = STEPS[column]
    if any(model.results[other] != OK for other in needs):
        return "-"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return step(model)
    except LosaError as error:
        return f"refused: {error}".replace(f"{model.folder}/", "")
    except Exception as error:  # of any kind: that is what is looked for
        return f"FAULT {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def _plan(model: Model) -> str:
    found = estimate(model.recipe("plan"), probe=False)
    whole = model_of(model.name)
    assert found.parameters == sum(p.numel() for p in whole.parameters())
    return OK


def _prune(model: Model) -> str:
    """Wanda, every mask by the book."""
    record = model.records["prune"] = model.run("pruned")
    dense, after = model_of(model.name), model.pruned()
    # Some architectures have a class of tokenizers of their own, which splits text in another way.
    tokenizer = AutoTokenizer.from_pretrained(model.folder / "model")
    ids = calibration_tokens(model.recipe("pruned").calibration.data, tokenizer, 4, 32, 0)
    leave = tuple(all_matrices(dense).keys() - record.masks.keys())
    batch_size = model.recipe("pruned").calibration.batch_size
    scores = wanda_by_the_book(dense, find_blocks(dense), ids, 0.5, leave, batch_size)
    weights = all_matrices(after)
    assert record.masks.keys() <= scores.keys(), f"not by the book: {sorted(record.masks.keys() - scores.keys())[0]}"
    for name in record.masks:
        check_mask(weights[name] != 0, scores[name], 0.5)
    return OK


def _share(model: Model) -> str:
    """Of the weights in matrices of the blocks, those that have a mask."""
    record = model.records["prune"]
    masked = sum(math.prod(mask.shape) for mask in record.masks.values())
    whole = model_of(model.name)
    assert masked + record.unmasked == matrix_weights(whole)
    share = masked / (masked + record.unmasked)
    return f"{share:.1%}" if share >= 0.99 else f"{share:.1%}; dense: {', '.join(_dense(whole, record))}"


def _dense(whole: nn.Module, record: RunRecord) -> list[str]:
    """Matrices of the blocks without a mask, by their names within a block, each name once."""
    found = {}
    blocks = find_blocks(whole)
    for name, module in blocks.modules.named_modules(prefix=blocks.prefix):
        if any(re.match(rf"{re.escape(name)}(\.\d+\.|$)", mask) for mask in record.masks):
            continue
        inside = name.removeprefix(f"{blocks.prefix}.").partition(".")[2]
        for tensor, weight in module.named_parameters(recurse=False):
            if weight.ndim > 1:
                own = inside if tensor == "weight" else f"{inside}.{tensor}"
                found[re.sub(r"\.\d+(?=\.)", "", own)] = None
    return list(found)


def _block_by_block(model: Model) -> str:
    model.run("offloaded", offload="disk")
    found, expected = model.tensors("offloaded"), model.tensors("pruned")
    assert found.keys() == expected.keys()
    differ = [name for name, tensor in expected.items() if not torch.equal(as_bits(found[name]), as_bits(tensor))]
    assert not differ, f"other bits in {differ[0]} (of {len(differ)})"
    return OK


def _two_of_four(model: Model) -> str:
    record = model.run("nm", prune={"pruner": "sparsegpt", "pattern": "2:4", "partly": True, "on_singular": "wanda"})
    weights = all_matrices(model.pruned("nm"))
    for name in record.masks:
        kept = (weights[name] != 0).reshape(-1, 4).sum(1)
        assert int(kept.max()) <= 2, name
    return OK


def _train(model: Model) -> str:
    """Two rounds; the merged model is the one that was trained."""
    data = str(model.folder / "text.txt")
    record = model.run("trained", method="losa", evaluate={"data": data, "length": 64, "max_windows": 4})
    dense, trained = (result.perplexity for result in record.results)
    assert dense is not None and trained is not None and math.isfinite(trained)
    kept = sum(mask.kept for mask in record.masks.values())
    assert kept <= 0.52 * sum(math.prod(mask.shape) for mask in record.masks.values())
    assert abs(record.rounds[-1].perplexity / trained - 1) < 1e-3, "merging changed the function"
    return OK


def _pack(model: Model) -> str:
    """Greedy tokens of the packed model are those of transformers on the dense export, and the way back is exact."""
    pack_directory(model.folder / "pruned", model.folder / "packed", min_sparsity=0.0)
    unpack_directory(model.folder / "packed", model.folder / "unpacked")
    back, dense = model.tensors("unpacked"), model.tensors("pruned")
    assert all(torch.equal(back[name], tensor) for name, tensor in dense.items())
    packed, tokenizer = load(model.folder / "packed")
    ids = torch.tensor([tokenizer(TEXT[:20])["input_ids"]])
    dense_model = model.pruned()
    dense_model.generation_config.eos_token_id = None
    try:
        expected = dense_model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :].tolist()
    except Exception as error:  # of any kind: it is the model's own code
        with torch.no_grad():
            found, logits = (each(ids, use_cache=False).logits for each in (packed, dense_model))
        assert (found - logits).abs().max() <= 64 * torch.finfo(logits.dtype).eps * logits.abs().max(), "other logits"
        return f"refused: transformers cannot generate with this model: {str(error).splitlines()[0]}"
    made = generate(packed, tokenizer, TEXT[:20], max_new_tokens=NEW, stop_at_eos=False)
    model.loop = "losa's" if made.fallback is None else "transformers"
    assert made.tokens == expected, "other tokens than the dense export's"
    return OK


def _loop(model: Model) -> str:
    return model.loop


STEPS: dict[str, tuple[Callable[[Model], str], tuple[str, ...]]] = {
    "plan": (_plan, ()),
    "prune": (_prune, ()),
    "share": (_share, ("prune",)),
    "block by block": (_block_by_block, ("prune",)),
    "2:4": (_two_of_four, ()),
    "train": (_train, ()),
    "pack": (_pack, ("prune",)),
    "loop": (_loop, ("pack",)),
}
