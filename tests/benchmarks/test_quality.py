"""The quality benchmark: which runs are made, at which learning rates, and how they are kept and shown."""

from __future__ import annotations

import json
import math
from concurrent.futures import Future
from dataclasses import replace

import pytest

from benchmarks import _harness, _jobs, _store, quality
from benchmarks._harness import Setting, recipe_of
from benchmarks._jobs import (
    ADAPTER_RATES,
    BEST,
    FULL_RATES,
    Budget,
    Job,
    digest,
    finished,
    headline,
    job_of,
    missing,
    rates_to_try,
    ready,
    tuned_rate,
)
from losa.errors import NumericsError, RecipeError
from tests.helpers.tiny import tiny_llama, tiny_tokenizer

SHARED = {"setup": {"model": "tiny"}}


def test_runs_of_the_comparison():
    jobs = quality.final_jobs()
    assert len({job.key for job in jobs}) == len(jobs)
    seeds = {(job.method, job.seed) for job in jobs if (job.pruner, job.sparsity) == ("wanda", 0.7)}
    assert seeds >= {(method, seed) for method in quality.METHODS for seed in range(3)}
    several = {(job.method, job.pruner, job.sparsity) for job in jobs if job.seed == 2 and job.sparsity != 0.7}
    assert several == {("best", "wanda", 0.6), ("best", "wanda", 0.5)}
    assert Job("losa", "alps", seed=2) in jobs and Job("losa", sparsity=0.5, seed=1) not in jobs
    assert (
        Job("losa", "alps", "2:4", 2, "kl", learning_rate=0.01, tuning=True).key == "losa/alps/2:4/seed2/kl/tune-lr0.01"
    )
    assert Job("lora", sparsity=0.5, short=True).key == "lora/wanda/0.50/seed0/short" and Job("dense").key == "dense"
    assert _jobs.digest(Job("dense", sparsity=0.5)) == _jobs.digest(Job("dense")), "one run for all tables"
    tasks = {job.key for job in jobs if job.of_tasks}
    assert tasks == {"dense", *(f"{method}/wanda/0.50/seed0" for method in ("prune_only", "losa", "lora", "best"))}
    assert {each.task_limit for each in _jobs.tuning_of(Job("lora", sparsity=0.5, task_limit=250))} == {0}
    named = [*jobs, Job("losa", "alps", "2:4", 2, "kl", {"train.warmup": 0.2}, 0.01, True), Job("lora", short=True)]
    assert [job_of(job.key, {"learning_rate": 0.01, "overrides": job.overrides}) for job in named] == named
    assert job_of("losa/wanda/all/seed0", {}) is job_of("other", {}) is None


def test_a_run_is_made_again_for_tasks_that_it_lacks():
    job = Job("losa", sparsity=0.5)
    runs = {job.key: {"settings": digest(job), "perplexity": 30.0}}
    assert finished(job, runs) and not finished(replace(job, task_limit=250), runs)
    runs[job.key]["task_limit"] = 250
    assert finished(job, runs) and finished(replace(job, task_limit=250), runs)
    assert not finished(replace(job, task_limit=None), runs) and not quality.stale(runs)


@pytest.mark.parametrize("best", ADAPTER_RATES)
def test_the_search_for_a_rate_finds_a_single_minimum(best):
    found: dict[float, float] = {}
    while rates := rates_to_try(found, ADAPTER_RATES, ADAPTER_RATES[3]):
        found |= {rate: abs(math.log(rate / best)) for rate in rates}
    assert min(found, key=found.__getitem__) == best
    place, tried = ADAPTER_RATES.index(best), sorted(map(ADAPTER_RATES.index, found))
    assert {max(place - 1, 0), min(place + 1, 5)} <= set(tried) and tried == list(range(tried[0], tried[-1] + 1))


def test_rates_come_from_the_nearest_tuning():
    def tuned(job: Job, best: float) -> dict:
        rates = {rate: abs(math.log(rate / best)) for rate in job.rates}
        return {replace(job, learning_rate=rate, tuning=True).key: {"perplexity": 1 + x} for rate, x in rates.items()}

    runs = tuned(Job("losa"), 0.016) | tuned(Job("losa", sparsity=0.5), 0.004) | tuned(Job("sparse_full"), 8e-4)
    assert tuned_rate(Job("losa", "alps", 0.9, 2), runs) == tuned_rate(Job("losa", sparsity="2:8"), runs) == 0.016
    assert (
        tuned_rate(Job("losa", sparsity="2:4"), runs) == 0.004 and tuned_rate(Job("losa", sparsity=0.6), runs) == 0.016
    )
    assert tuned_rate(Job("sparse_full"), runs) == 8e-4 and Job("sparse_full").rates == FULL_RATES
    kl = Job("losa", variant="kl", overrides={"train.warmup": 0.2})
    assert tuned_rate(kl, runs) == 0.016 and tuned_rate(replace(kl, learning_rate=0.5), runs) == 0.5
    assert tuned_rate(kl, runs | tuned(kl, 0.002)) == 0.002
    # The search at another sparsity begins where the first one ended.
    del runs["losa/wanda/0.50/seed0/tune-lr0.004"]
    assert [job.key for job, _ in ready([Job("losa", sparsity=0.5)], runs)] == ["losa/wanda/0.50/seed0/tune-lr0.004"]
    assert headline({"failed": "diverged"}) == math.inf


def ended(value) -> Future:
    future: Future = Future()
    future.set_exception(value) if isinstance(value, Exception) else future.set_result(value)
    return future


def test_missing_runs_are_made_once_after_their_tuning(tmp_path, capsys):
    store, made = _store.Store(tmp_path / "runs.json", "quality"), []
    errors = {"nothing": RecipeError("no such pruner"), "odd": ValueError("odd\nmatrix")}

    def start(job, rate):
        made.append(job.key)
        if job.pruner in errors:
            return ended(errors[job.pruner])
        return ended(
            {"perplexity": abs(math.log(rate / 0.004)) + job.seed, "perplexity_unmerged": None, "seconds": 1.0}
        )

    wanted = [
        Job("prune_only", "nothing"),
        Job("prune_only", "odd"),
        Job("lora"),
        Job("lora", seed=1),
        Job("prune_only"),
    ]
    lines = {
        "prune_only/nothing/0.70/seed0": "losa.errors.RecipeError: no such pruner",
        "prune_only/odd/0.70/seed0": "ValueError: odd\nmatrix",
    }
    assert _store.work(store, SHARED, wanted, start, 2) == store.read()["errors"] == lines
    tuning = [f"lora/wanda/0.70/seed0/tune-lr{rate:g}" for rate in (0.008, 0.004, 0.016, 0.002)]
    assert sorted(made) == sorted([*(job.key for job in wanted), *tuning]) and len(store.read()["runs"]) == 7
    assert max(map(made.index, tuning)) < made.index("lora/wanda/0.70/seed0")
    assert "no such pruner" in capsys.readouterr().out and not list(tmp_path.glob(".*.lock"))
    made.clear()
    errors.clear()
    assert _store.work(store, SHARED, wanted, start, 2) == {} and "errors" not in store.read()
    assert made == ["prune_only/nothing/0.70/seed0", "prune_only/odd/0.70/seed0"]


def test_two_commands_share_a_file(tmp_path, monkeypatch):
    """A run that another command makes is waited for, and neither loses the runs of the other."""
    store, other = (_store.Store(tmp_path / "runs.json", "quality") for _ in range(2))
    claim = other.claim(Job("prune_only"))
    assert claim is not None and store.claim(Job("prune_only")) is None

    def waits(seconds):
        other.merge(SHARED, {Job("prune_only").key: {"perplexity": 2.0}})
        claim.close()

    monkeypatch.setattr(_store.time, "sleep", waits)
    wanted = [Job("prune_only"), Job("prune_only", seed=1)]
    assert _store.work(store, SHARED, wanted, lambda job, rate: ended({"perplexity": 3.0}), 2) == {}
    assert [run["perplexity"] for run in store.read()["runs"].values()] == [2.0, 3.0]
    with pytest.raises(SystemExit, match="another setup .model: 'tiny', now 'large'"):
        store.merge({"setup": {"model": "large"}}, {})


def test_summary_of_a_file(tmp_path, capsys):
    file, run = tmp_path / "quality.json", {"perplexity": 9.0, "perplexity_unmerged": None, "seconds": 1.0}
    runs = {f"best/wanda/0.70/seed{seed}": run | {"perplexity": 80.0 + seed} for seed in (10, 2, 0)}
    runs["lora/sparsegpt/0.50/seed0"] = run | {"perplexity": 35.5, "perplexity_unmerged": 38.25}
    for other in (
        "dense",
        "losa/wanda/2:4/seed0",
        "losa/wanda/0.70/seed0/no_rates",
        "losa/wanda/0.70/seed0/tune-lr0.01",
    ):
        runs[other] = run
    runs["losa/wanda/0.80/seed0"] = {"failed": "diverged"}
    file.write_text(_store.as_text({"setup": {}, "runs": runs}))
    assert quality.main(["--summary", str(file)]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "best/wanda/0.70": [80.0, 82.0, 90.0],
        "lora/sparsegpt/0.50": [38.25],
        "lora_masked/sparsegpt/0.50": [35.5],
    }
    assert json.loads(file.read_text())["runs"] == runs
    assert quality.main(["--out", str(file), "--table"]) == 0
    printed = capsys.readouterr().out
    assert "| wanda | 0.70 | best | 84.0 (80.0..90.0) |" in printed and "| losa no_rates | 9.0 |" in printed
    assert "tune" not in printed and "| lora_masked | 35.5 |" in printed
    with pytest.raises(SystemExit, match="No such file"):
        quality.main(["--summary", str(tmp_path / "other.json")])


def test_runs_of_another_recipe_count_nowhere(tmp_path, monkeypatch, capsys):
    """A changed best recipe, other overrides and another tuned rate make a run stale; it is made anew once."""
    file = tmp_path / "runs.json"
    monkeypatch.setattr(_jobs, "BEST_RECIPE", tmp_path / "best.yaml")
    _jobs.BEST_RECIPE.write_text("method: losa\ntrain: {norms: false, learning_rate: 1}\n")

    def made(job: Job, rate: float, perplexity: float) -> dict:
        row = {"perplexity": perplexity, "learning_rate": rate, "settings": digest(job), "seconds": 1.0}
        return {job.key: row | ({"overrides": job.overrides} if job.overrides else {})}

    def tuned(job: Job, best: float) -> dict:
        tries = [replace(job, learning_rate=best * factor, tuning=True) for factor in (0.5, 1, 2)]
        return {
            k: v for each in tries for k, v in made(each, each.learning_rate, 1 + (each.learning_rate != best)).items()
        }

    runs = tuned(Job(BEST), 0.008) | made(Job(BEST), 0.008, 80.0) | made(Job(BEST, seed=1), 0.008, 82.0)
    runs |= tuned(Job("losa"), 0.016) | made(Job("losa"), 0.004, 90.0) | made(Job("losa", seed=1), 0.016, 94.0)
    assert _jobs.stale(runs) == ["losa/wanda/0.70/seed0"] and not missing([Job(BEST), Job("losa", seed=1)], runs)
    variant = Job("losa", variant="kl", overrides={"train.warmup": 0.3})
    assert missing([variant], runs | made(replace(variant, overrides={"train.warmup": 0.2}), 0.016, 1.0)) == [
        variant.key
    ]
    file.write_text(_store.as_text({"setup": SHARED["setup"], "runs": runs}))
    assert quality.main(["--summary", str(file)]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"best/wanda/0.70": [80.0, 82.0], "losa/wanda/0.70": [94.0]}
    assert printed.err == "quality: stale, of other settings than today's: losa/wanda/0.70/seed0\n"
    assert quality.main(["--out", str(file), "--table", "--tuning"]) == 0
    assert "| best | wanda | 0.70 | seed0 | 0.004: 2.0, 0.008: 1.0, 0.016: 2.0 | 0.008 |" in capsys.readouterr().out
    # Data, budget and learning rate of the best recipe are not its own.
    _jobs.BEST_RECIPE.write_text("method: losa\ntrain: {norms: 0.1, learning_rate: 2}\n")
    assert sum(key.startswith("best/") for key in _jobs.stale(runs)) == 5
    store, started = _store.Store(file, "quality"), []

    def start(job, rate):
        started.append(job.key)
        return ended(made(job, rate, abs(math.log(rate / 0.008)))[job.key])

    wanted = [Job("losa"), Job(BEST)]
    args = ["--data", str(tmp_path), "--out", str(file), "--dry-run", "--method", "losa", "--method", "best"]
    assert quality.main(args) == 0
    names = ["losa/wanda/0.70/seed0 (stale)", "best/wanda/0.70/seed0/tune", "best/wanda/0.70/seed0 (stale)"]
    assert capsys.readouterr().out.split("\n")[:3] == names
    assert _store.work(store, SHARED, wanted, start, 1) == {}
    assert started[0] == "losa/wanda/0.70/seed0" and started[-1] == "best/wanda/0.70/seed0" and len(started) == 5
    assert _jobs.stale(store.read()["runs"]) == ["best/wanda/0.70/seed1"]
    # A tuning that is asked for is made though the final run is finished.
    assert missing([replace(variant, tuning=True)], runs | made(variant, 0.016, 1.0)) == [f"{variant.key}/tune"]


def test_options_choose_runs(tmp_path, capsys):
    args = ["--data", str(tmp_path), "--out", str(tmp_path / "new.json"), "--dry-run"]
    chosen = ["--method", "losa", "--method", "lora", "--sparsity", "2:4", "--seed", "1", "--only", "losa"]
    assert quality.main([*args, *chosen, "--variant", "mixed", "--set", "prune.mixed=true", "--rate", "0.01"]) == 0
    assert capsys.readouterr().out == "losa/wanda/2:4/seed1/mixed/lr0.01\n"
    for wrong in (
        ["--sparsity", "0.655"],
        ["--variant", "x"],
        ["--set", "prune.mixed=true"],
        ["--set", "a", "--variant", "x"],
    ):
        with pytest.raises(SystemExit):
            quality.main([*args, *wrong])


SETTING = Setting("model", None, Budget(tokens=640, short_tokens=192, length=32, samples=2, windows=4, window=32))


def test_recipes_of_runs(tmp_path, monkeypatch):
    setting = replace(SETTING, data=tmp_path)
    plain = recipe_of(Job("losa", sparsity="2:4", seed=3, overrides={"prune.mixed": True}), 0.01, setting)
    assert plain.prune.mixed and plain.prune.pattern == "2:4" and plain.seed == 3 and plain.train.max_tokens == 640
    assert plain.train.warmup == 0.1 and plain.train.batch_size == 1 and plain.train.learning_rate == 0.01
    tuning = recipe_of(Job("lora", tuning=True), 0.01, setting)
    assert tuning.train.max_tokens == 192 and tuning.evaluate.data.path != plain.evaluate.data.path
    # Of the best recipe the method's settings count, and neither data nor budget.
    text = "method: sparse_lora\nallocation: {mean_rank: 9}\nlora: {rank: 5}\noutput: x\n"
    text += "calibration: {data: y, samples: 99, length: 99, cka_samples: 16}\n"
    text += "train: {data: y, length: 99, learning_rate: 7, warmup: 0.4, max_tokens: 1}\nprune: {sparsity: 0.1}\n"
    (tmp_path / "best.yaml").write_text(text)
    monkeypatch.setattr(_jobs, "BEST_RECIPE", tmp_path / "best.yaml")
    best = recipe_of(Job(BEST, "sparsegpt", 0.6), 0.01, setting)
    assert (best.method, best.lora.rank, best.allocation.mean_rank, best.train.warmup) == ("sparse_lora", 5, 9, 0.4)
    assert best.prune == recipe_of(Job("losa", "sparsegpt", 0.6), 0.01, setting).prune
    assert best.calibration.cka_samples == best.calibration.samples == 2 and plain.calibration.cka_samples == 2
    more = recipe_of(Job(BEST), 0.01, replace(setting, budget=replace(setting.budget, samples=40))).calibration
    assert (more.samples, more.cka_samples, more.length) == (40, 16, 32), "of these samples, what the recipe compares"
    same = {"data", "length", "batch_size", "max_tokens", "learning_rate", "train_on", "precision"}
    assert all(getattr(best.train, key) == getattr(plain.train, key) for key in same)
    with pytest.raises(RecipeError, match="losa/wanda/0.70/seed0/odd.*\n.*train.nothing"):
        recipe_of(Job("losa", variant="odd", overrides={"train.nothing": 1}), 0.01, setting)


@pytest.fixture
def tiny_setting(tmp_path):
    tiny_llama(layers=2).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [json.dumps({"text": f"{i} red and green and blue {i * i} " * 9}) for i in range(40)]
    for name in (*_harness.TRAINING, "calib/c4_calib.jsonl", _harness.REPORTED, _harness.HELD_OUT):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("\n".join(rows))
    return replace(SETTING, model=str(tmp_path / "model"), data=tmp_path)


def test_a_run_of_a_method_that_cannot_be_merged(tiny_setting, monkeypatch, capsys):
    row = _harness.run_job(Job("lora", sparsity=0.5), 0.01, tiny_setting)
    assert row["train_tokens"] == 640 and row["parameters_trained"] > 0 and row["rounds"][0]["train_steps"] == 20
    assert (
        row["perplexity"] != row["perplexity_unmerged"]
        and row["held_out"] > 0
        and row["held_out_merged"] not in (0, row["held_out"])
        and row["settings"] == digest(Job("lora", sparsity=0.5))
    )
    assert row["cpu_seconds"] > 0
    assert row["peak_bytes"] > 2**20 and row["seconds"] > 0 and json.loads(json.dumps(row)) == row
    monkeypatch.setattr(_harness, "commit", lambda: "abc")
    dense = _harness.run_job(Job("dense"), 0.01, tiny_setting)
    assert set(dense) == {"settings", "method", "perplexity", "held_out", "threads", "peak_bytes", "commit"}
    assert dense["commit"] == "abc" and "held_out_merged" not in dense

    def diverges(self):
        raise NumericsError("loss: not finite")

    monkeypatch.setattr(_harness.MethodRun, "run", diverges)
    assert _harness.run_job(Job("lora"), 0.01, tiny_setting)["failed"] == "loss: not finite"
