"""Trains every arm with every seed and prints held-out losses with paired differences.

Finished runs are kept: repeat the command to continue after an interruption.

python examples/photographs/compare.py --seeds 0 1 2      (--table: only print what is finished)
"""

import argparse
import hashlib
import json
import math
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from scipy.stats import ttest_1samp
from transformers import TrainerCallback

from visper.common.files import write_text
from visper.config import EVALUATED, load_run
from visper.training import run_stage

RECIPES = Path(__file__).parent
ORDER = (
    ("pt-nothing", "pt-published", "pt-shuffled"),
    ("ift-nothing", "ift-viral", "ift-own", "ift-gram"),
    ("pt-longer",),
)
"""The arms (recipes in this folder) in the order in which they run; each group runs with every seed."""
BEFORE = "pt-nothing"
"""The arm that fine-tuning starts from."""
METHOD, CONTROL = "pt-published", "pt-shuffled"
"""Arms that differ only in the assignment of targets to images. All their held-out values are compared."""


def baseline_of(arm: str) -> str:
    """The arm of the same stage without embedding losses."""
    return f"{arm.split('-')[0]}-nothing"


class Start(TrainerCallback):
    """Records the initial projector and the order of rows, which the arms of a seed must share, and the CPU time."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Records digests of the projector before the first step and of the first epoch's order of rows."""
        projector = {n: p for n, p in kwargs["model"].named_parameters() if "projector" in n and "lora" not in n}
        assert projector, "the student has no projector"
        weights = hashlib.sha256()
        for name in sorted(projector):
            weights.update(projector[name].detach().float().numpy().tobytes())
        loader = kwargs["train_dataloader"]
        order = [row for batch in getattr(loader, "base_dataloader", loader).batch_sampler for row in batch]
        assert order != sorted(order), "the rows are not shuffled, so this is not the order that training uses"
        rows = hashlib.sha256(str(order).encode())
        self.found = {"projector": weights.hexdigest()[:16], "order": rows.hexdigest()[:16]}
        self.began = time.process_time()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Records the CPU seconds of training and of the evaluation after its last step."""
        self.cpu_seconds = time.process_time() - self.began


def measure(arm: str, seed: int, out: Path) -> dict[str, Any]:
    """Trains one arm with one seed, in ``out/runs/seed-N``, and returns its measurements.

    Raises:
        FloatingPointError: a logged value is not finite.
    """
    runs = out / "runs" / f"seed-{seed}"
    changes = [f"seed={seed}", f"output={runs / arm}"]
    if arm.startswith("ift"):
        changes.append(f"start_from={runs / BEFORE}")
    shutil.rmtree(runs / arm, ignore_errors=True)  # an interrupted run
    start = Start()
    run_stage(load_run(RECIPES / f"{arm}.yaml", changes), callbacks=[start])
    lines = [json.loads(line) for line in (runs / arm / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    bad = [(name, line["step"]) for line in lines for name, v in line.items() if not math.isfinite(v)]
    if bad:
        raise FloatingPointError(f"{arm}, seed {seed}: not finite: {bad[:3]}")
    held_out = [line for line in lines if f"{EVALUATED}ntp" in line][-1]
    if arm != BEFORE:
        shutil.rmtree(runs / arm / "model")
    trained = [line for line in lines if "grad_norm" in line]
    return {
        "arm": arm,
        "seed": seed,
        **start.found,
        "cpu_seconds": round(start.cpu_seconds, 1),
        "held_out": {n.removeprefix(EVALUATED): v for n, v in held_out.items() if n.startswith(EVALUATED)},
        "trained": {"steps": lines[-1]["step"], "first_ntp": trained[0]["ntp"], "last_ntp": trained[-1]["ntp"]},
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def require_alike(results: Sequence[Mapping[str, Any]]) -> None:
    """Checks that runs of one seed and stage began with the same weights and saw the same rows.

    Raises:
        ValueError: an arm differs; it is named.
    """
    first: dict[tuple[str, int], Mapping[str, Any]] = {}
    for result in results:
        before = first.setdefault((result["arm"].split("-")[0], result["seed"]), result)
        for what in ("projector", "order"):
            if result[what] != before[what]:
                raise ValueError(f"seed {result['seed']}: {result['arm']} and {before['arm']} differ in {what}")


def difference(arm: Mapping[int, float], baseline: Mapping[int, float]) -> tuple[float, float, float]:
    """Mean of arm minus baseline over their common seeds, with its 95 % t-interval (infinite for one seed)."""
    values = [arm[seed] - baseline[seed] for seed in sorted(arm.keys() & baseline.keys())]
    if len(values) < 2:
        return (values[0] if values else math.nan), -math.inf, math.inf
    low, high = ttest_1samp(values, 0.0).confidence_interval(0.95)
    return statistics.fmean(values), float(low), float(high)


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown tables: each arm's held-out next-token loss, its difference from the baseline, its embedding losses."""
    require_alike(results)
    by_arm = {arm: {r["seed"]: r for r in results if r["arm"] == arm} for group in ORDER for arm in group}
    by_arm = {arm: runs for arm, runs in by_arm.items() if runs}
    ntp = {arm: {seed: one["held_out"]["ntp"] for seed, one in runs.items()} for arm, runs in by_arm.items()}
    lines = ["| arm | steps | CPU-s | held-out next-token loss by seed | mean | minus baseline (95 %) |"]
    lines.append("|" + "---|" * 6)
    for arm, runs in by_arm.items():
        baseline = baseline_of(arm)
        seconds = statistics.fmean(one["cpu_seconds"] for one in runs.values())
        values = ", ".join(f"{ntp[arm][seed]:.3f}" for seed in sorted(runs))
        mean, low, high = difference(ntp[arm], ntp.get(baseline, {}))
        less = "" if arm == baseline else f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
        steps = next(iter(runs.values()))["trained"]["steps"]
        lines.append(
            f"| {arm} | {steps} | {seconds:.0f} | {values} | {statistics.fmean(ntp[arm].values()):.3f} | {less} |"
        )
    lines += ["", "| arm | held-out embedding loss | by seed |", "|---|---|---|"]
    for arm, runs in by_arm.items():
        for term in embedding_terms(runs):
            values = ", ".join(f"{runs[seed]['held_out'][term]:.3f}" for seed in sorted(runs))
            lines.append(f"| {arm} | {term} | {values} |")
    lines += ["", f"| {METHOD} minus {CONTROL} (95 %) | |", "|---|---|"]
    pair = [by_arm.get(arm, {}) for arm in (METHOD, CONTROL)]
    for term in ("ntp", *embedding_terms(pair[0])) if all(pair) else ():
        own, control = ({seed: one["held_out"][term] for seed, one in runs.items()} for runs in pair)
        mean, low, high = difference(own, control)
        lines.append(f"| {term} | {mean:+.3f} ({low:+.3f} to {high:+.3f}) |")
    return "\n".join(lines)


def embedding_terms(runs: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Names of an arm's held-out embedding losses; empty for an arm without them."""
    return [name for name in next(iter(runs.values()), {"held_out": ()})["held_out"] if "/" in name]


def keep(result: Mapping[str, Any], out: Path) -> None:
    """Writes a run's result to a file, complete or not at all."""
    (out / "results").mkdir(parents=True, exist_ok=True)
    write_text(out / "results" / f"{result['arm']}-{result['seed']}.json", json.dumps(result, indent=1) + "\n")


def finished(out: Path) -> list[dict[str, Any]]:
    """The results of all finished runs."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted((out / "results").glob("*.json"))]


def main() -> None:
    """Runs all unfinished arms and seeds and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("comparison"), help="the folder of prepare.py, and of results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="only print the tables of finished runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = [(arm, seed) for group in ORDER for seed in options.seeds for arm in group]
    for arm, seed in () if options.table else runs:
        if (options.out / "results" / f"{arm}-{seed}.json").exists():
            continue
        if arm.startswith("ift") and not (options.out / "runs" / f"seed-{seed}" / BEFORE / "model").exists():
            keep(measure(BEFORE, seed, options.out), options.out)
        keep(measure(arm, seed, options.out), options.out)
        require_alike(finished(options.out))
    print(table(finished(options.out)))


if __name__ == "__main__":
    main()
