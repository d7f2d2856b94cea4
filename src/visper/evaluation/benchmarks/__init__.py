"""The paper's benchmarks: one file and one entry of ``BENCHMARKS`` each."""

from visper.common.errors import ConfigError
from visper.evaluation.benchmarks import cv_bench, mmstar, ok_vqa, realworldqa
from visper.evaluation.benchmarks.base import Benchmark

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("cv-bench", 128, "CV-Bench", cv_bench.rows, cv_bench.read, cv_bench.mark, cv_bench.columns),
        Benchmark("mmstar", 128, "MMStar", mmstar.rows, mmstar.read, mmstar.mark),
        Benchmark("realworldqa", 16, "RWQA", realworldqa.rows, realworldqa.read, realworldqa.mark),
        Benchmark("ok-vqa", 32, "OK-VQA", ok_vqa.rows, ok_vqa.read, ok_vqa.mark),
    )
}
"""Benchmarks by the name that `visper data prepare` takes."""
ALL = "all"


def find_benchmarks(name: str) -> list[Benchmark]:
    """The benchmark of that name, or all.

    Raises:
        ConfigError: unknown name.
    """
    if name == ALL:
        return list(BENCHMARKS.values())
    if name not in BENCHMARKS:
        raise ConfigError(f"no benchmark '{name}': choose one of {', '.join(BENCHMARKS)} or {ALL}")
    return [BENCHMARKS[name]]
