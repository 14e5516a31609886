"""Statistics of inputs: what direct computation gives, shared where inputs are, flat where no token was seen."""

from __future__ import annotations

import pytest
import torch

from losa.algorithm.statistics import (
    Hessian,
    InputNorms,
    Statistic,
    collect,
    get_statistic,
    register_statistic,
)
from losa.algorithm.stream import BlockStream
from losa.errors import ModelError, NumericsError
from losa.model.blocks import find_blocks, find_linears
from tests.helpers.tiny import tiny_llama

IDS = torch.arange(6 * 16).reshape(6, 16) % 90


def all_by_one(groups):
    return {name: 0 for group in groups for name in group}


def test_collectors_equal_direct_statistics_and_share_inputs():
    model = tiny_llama()
    blocks = find_blocks(model)
    linears = find_linears(blocks.modules[0])
    inputs: dict[str, list] = {n: [] for n in linears}
    handles = [
        m.register_forward_pre_hook(lambda _m, a, n=n: inputs[n].append(a[0].flatten(0, 1).double()))
        for n, m in linears.items()
    ]
    with torch.no_grad():
        stream = BlockStream(model, blocks, IDS, 4)
        for statistic in (InputNorms, Hessian):
            for values in inputs.values():
                values.clear()
            found = collect(
                linears, statistic, blocks.names[0], lambda: stream.position, lambda: list(stream.run(0)), all_by_one
            )
            results = found.statistics
            assert found.owners == dict.fromkeys(linears, 0) and list(results) == list(linears)
            assert found.tokens == dict.fromkeys(linears, IDS.numel())
            for n in linears:
                x = torch.cat(inputs[n])
                expected = x.norm(dim=0) if statistic is InputNorms else x.T @ x
                error = (results[n].double() - expected).abs().max()
                assert error <= len(x) * torch.finfo(torch.float32).eps * expected.abs().max()
            assert results["self_attn.q_proj"] is results["self_attn.v_proj"]
            assert results["mlp.gate_proj"] is results["mlp.up_proj"]
            assert results["mlp.gate_proj"] is not results["self_attn.q_proj"]
    for handle in handles:
        handle.remove()


def test_non_finite_input_names_block_linear_and_sample():
    model = tiny_llama()
    blocks = find_blocks(model)
    linears = find_linears(blocks.modules[0])
    with torch.no_grad():
        stream = BlockStream(model, blocks, IDS, 2)
        stream.hidden[1][0, 3, 5] = float("nan")
        with pytest.raises(NumericsError, match=r"model\.layers\.0\.self_attn\.q_proj.*samples 2\.\.3"):
            collect(
                linears,
                InputNorms,
                "model.layers.0",
                lambda: stream.position,
                lambda: list(stream.run(0)),
                all_by_one,
            )


@pytest.mark.parametrize("statistic", [InputNorms, Hessian])
def test_linears_that_saw_no_token_share_a_flat_statistic(statistic):
    """Experts that no router chose: called with no tokens, or never."""
    linears = {name: torch.nn.Linear(width, 4) for name, width in {"a": 8, "b": 8, "c": 8, "d": 6}.items()}

    def run():
        linears["a"](torch.randn(3, 8))
        linears["b"](torch.randn(0, 8))

    found = collect(linears, statistic, "block", lambda: "sample 0", run, all_by_one)
    results = found.statistics
    assert found.tokens == {"a": 3, "b": 0, "c": 0, "d": 0}
    assert list(results) == list(linears) and results["b"] is results["c"] is not results["a"]
    for name, width in (("c", 8), ("d", 6)):
        expected = torch.ones(width) if statistic is InputNorms else torch.eye(width)
        assert torch.equal(results[name], expected)


def test_inputs_that_are_shared_in_some_batches_only_are_refused():
    linears = {name: torch.nn.Linear(4, 4) for name in ("a", "b")}

    def run():
        shared = torch.randn(2, 4)
        linears["a"](shared)
        linears["b"](shared)
        linears["b"](torch.randn(2, 4))

    with pytest.raises(ModelError, match="block.b: shares its input with a in some batches only"):
        collect(linears, InputNorms, "block", lambda: "sample 0", run, all_by_one)


class Sum(Statistic):
    """Input columns added up."""

    def __init__(self, in_features, device):
        self.total = torch.zeros(in_features, device=device)

    def update(self, x):
        self.total += x.sum(0)
        return self.total

    def result(self):
        return self.total

    @staticmethod
    def flat(in_features, device):
        return torch.zeros(in_features, device=device)


def test_registered_by_name(own_names):
    assert register_statistic("sum")(Sum) is Sum is get_statistic("sum") is register_statistic("sum")(Sum)
    with pytest.raises(ValueError, match="statistic 'hessian': already registered as Hessian"):
        register_statistic("hessian")(Sum)
    with pytest.raises(ValueError, match="'other': expected a subclass of Statistic or GradientStatistic, got "):
        register_statistic("other")(object)
    with pytest.raises(
        ValueError,
        match="unknown 'some'; expected one of gradient_norms, .*, hessian, input_norms, sum$",
    ):
        get_statistic("some")
