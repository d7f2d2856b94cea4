"""Published scores of other models, in percent."""

from __future__ import annotations

COLUMNS = ("Count", "Depth", "Relation", "Distance", "MMStar", "RWQA", "OK-VQA")
"""Columns of the paper's table (arXiv 2412.09585), in its order. Its average is their mean, in one row 0.7 off."""
AVERAGE = "average"

_PAPER = {
    "LLaVA, Phi-3 ViT-L": (52.4, 67.2, 75.2, 56.3, None, 36.5, 57.1, 56.7, 57.3),
    "OLA-VLM, Phi-3 ViT-L": (52.4, 68.7, 76.0, 56.7, 62.5, 36.0, 58.0, 56.4, 57.7),
    "LLaVA, Phi-3 ConvNeXt-XXL": (51.8, 70.8, 74.0, 55.3, None, 36.4, 58.0, 55.9, 57.4),
    "OLA-VLM, Phi-3 ConvNeXt-XXL": (49.4, 72.5, 77.2, 60.3, 63.9, 38.4, 58.4, 56.5, 58.9),
    "LLaVA, Llama-3 ViT-L": (50.4, 73.3, 64.9, 48.7, None, 38.8, 57.8, 56.9, 55.1),
    "OLA-VLM, Llama-3 ViT-L": (51.3, 74.2, 69.4, 54.3, 61.4, 39.5, 57.9, 56.6, 57.6),
    "LLaVA, Llama-3 ConvNeXt-XXL": (54.1, 62.8, 69.5, 49.8, None, 37.4, 57.5, 56.3, 55.3),
    "OLA-VLM, Llama-3 ConvNeXt-XXL": (57.4, 71.5, 66.8, 52.8, 61.5, 38.5, 55.0, 59.0, 57.3),
    "OLA-VLM, Llama-3 ConvNeXt-XXL, VPT": (60.0, 75.0, 70.8, 55.2, 64.6, 40.6, 62.9, 61.1, None),
}
_ORDER = (*COLUMNS[:4], "CV-Bench", *COLUMNS[4:], AVERAGE)
PAPER = {name: dict(zip(_ORDER, values, strict=True)) for name, values in _PAPER.items()}
YARDSTICKS: dict[str, dict[str, float]] = {
    "Qwen2.5-VL-7B (2026)": {"CV-Bench": 79.95},
    "CoVT-7B (2026)": {"CV-Bench": 80.0},
    "LLaVA-OneVision-1.5-8B (2026)": {"CV-Bench": 80.8},
}
"""Reported by others, with prompts and readers of their own."""
