"""The model card of a finished folder: base models, training, scores, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from visper.common.cache import key
from visper.common.errors import ConfigError
from visper.common.files import read_json_object, write_text
from visper.common.manifest import model_digest
from visper.config import Run, VlmStudent, load_run
from visper.model.revisions import HUB_ID

CARD = "README.md"
MARK = "\n<!-- written by visper {key}: an edited card is uploaded as it is -->\n"
"""The last line of a card; the key of the text before it shows whether somebody has edited the card."""
NEEDS_PACKAGE = """
## Loading

The image encoder ({backbone}) gives a feature map, which stock LLaVA cannot read. Loading needs the package that
registers its tower, `pip install 'visper-lm{extra}'`, imported before transformers loads:

```python
import visper.model  # registers the image encoder's tower
from transformers import AutoProcessor, LlavaForConditionalGeneration

model = LlavaForConditionalGeneration.from_pretrained("this folder")
processor = AutoProcessor.from_pretrained("this folder")
```
"""
STOCK = """
## Loading

```python
from transformers import pipeline

answer = pipeline("image-text-to-text", model="this folder")
content = [{"type": "image", "url": "image.png"}, {"type": "text", "text": "What is this?"}]
print(answer(text=[{"role": "user", "content": content}], max_new_tokens=64, return_full_text=False))
```
"""


def write_card(folder: Path, license: str = "other", to: Path | None = None) -> None:
    """Writes the ``README.md`` of a model folder, from its config.json, its run.yaml and the scores found.

    Without a run.yaml, the card says that the base is not known. Scores are those that `visper evaluate` wrote into
    ``answers/``, in the folder or beside it, for these weights and all questions of a benchmark.

    Args:
        license: the hub's name of the license.
        to: the folder to write into; default: the model's.
    """
    stages = list(_stages(folder))
    config = read_json_object(folder / "config.json")
    parts = _parts(stages)
    header: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "license": license}
    if license == "other":
        header["license_name"] = "see-the-base-models"
    hub = [name for name in parts.values() if _on_hub(name)]
    if hub:
        header["base_model"] = hub
    header["tags"] = ["visper-lm", str(config["model_type"])]
    title = stages[0].name if stages else "Model"
    lines = ["---", yaml.safe_dump(header, sort_keys=False).rstrip(), "---", f"# {title}"]
    lines += ["", "Trained with [VisPer](https://pypi.org/project/visper-lm/).", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_shown(value)} |" for name, value in parts.items()]
    lines += [f"| {stage.stage} | {_described(stage)} |" for stage in reversed(stages)]
    lines += _scores(folder)
    lines += ["", "Weights derive from the base models and the data above: their licenses apply."]
    text = "\n".join(lines) + "\n" + _loading(config)
    write_text((to or folder) / CARD, text + MARK.format(key=key(text)))


def is_edited(card: Path) -> bool:
    """Whether a card is another text than ``write_card`` wrote, of whatever version."""
    text = card.read_text(encoding="utf-8", errors="replace")
    start = text.rfind(MARK.partition("{")[0])
    return start < 0 or text[start:] != MARK.format(key=key(text[:start]))


def _stages(folder: Path) -> Iterator[Run]:
    """The run of a model folder, then the runs it started from, as long as their folders exist."""
    file, seen = folder / "run.yaml", set[Path]()
    while file.is_file() and file not in seen:
        seen.add(file)
        try:
            run = load_run(file)
        except ConfigError:  # written by another version; the card is then shorter
            return
        yield run
        file = Path(run.start_from or "") / "run.yaml"


def _parts(stages: list[Run]) -> dict[str, str]:
    if not stages:
        return {"base": "not known: the folder has no run.yaml"}
    first = stages[-1]
    if first.student is None:
        return {"starts from": str(first.start_from)}
    if isinstance(first.student, VlmStudent):
        return {"base": first.student.vlm}
    return {"LLM": first.student.llm, "image encoder": first.student.encoder}


def _described(run: Run) -> str:
    sets = ", ".join(_shown(source.place) for source in run.data.sources)
    text = f"{sets}; global batch {run.optimization.global_batch}, learning rate {run.optimization.lr:g}"
    if run.optimization.max_steps:
        text += f", {run.optimization.max_steps} steps"
    if run.lora is not None:
        text += f"; LoRA of rank {run.lora.rank}, merged"
    if run.distillation is not None:
        text += "; embedding losses: " + ", ".join(
            f"{name} ({_shown(task.target.model or task.target.kind)}) at {task.at}"
            for name, task in run.distillation.tasks.items()
        )
    return text


def _scores(folder: Path) -> list[str]:
    """Rows of the complete benchmarks of exactly these weights; of several results of a benchmark, the newest."""
    found = [*folder.glob("answers/*.scores.json"), *folder.parent.glob("answers/*.scores.json")]
    digest = model_digest(folder) if found else None
    rows = {}
    for file in sorted(found, key=lambda file: (file.stat().st_mtime_ns, file.name)):
        for benchmark, result in json.loads(file.read_text(encoding="utf-8")).items():
            if result.get("model_digest") != digest or result["asked"] != result["of"]:
                continue  # of an earlier model in this folder, or of a part of the questions
            for column, score in result["scores"].items():
                shown, low, high = (100 * share for share in (score["score"], *score["interval"]))
                rows[benchmark, column] = (
                    f"| {benchmark}: {column} | {shown:.1f} ({low:.1f} to {high:.1f}) | {score['questions']} |"
                )
    if not rows:
        return ["", "Not evaluated on public benchmarks."]
    head = ["| `visper evaluate`, paper's protocol | % (95 % interval) | questions |", "|---|---|---|"]
    return ["", *head, *(rows[name] for name in sorted(rows))]


def _loading(config: dict[str, Any]) -> str:
    backbone = config.get("vision_config", {}).get("backbone_config")
    if backbone is None:
        return STOCK
    name = backbone.get("architecture", backbone["model_type"])
    return NEEDS_PACKAGE.format(backbone=name, extra="[timm]" if backbone["model_type"] == "timm_wrapper" else "")


def _on_hub(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _shown(name: str) -> str:
    """A hub id or the name of a data set unchanged; only the last part of a path, to publish no local folders."""
    return name if _on_hub(name) else Path(name).name
