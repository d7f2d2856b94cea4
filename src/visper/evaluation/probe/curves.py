"""Scores of probes by layer: as JSON, as a table, and as curves of several models in one figure."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

from rich.table import Table

from visper.common.errors import ConfigError
from visper.common.files import atomic_path, write_text
from visper.evaluation.probe.measures import OTHER, OTHER_TARGET, TIES_WRONG, Finding

FORMATS = (".svg", ".png", ".pdf")
COLUMNS = 3
"""Largest number of panels in a row."""
SCORES = "probe.json"
"""File of scores in the output folder of a probe."""


def save_findings(findings: Sequence[Finding], file: Path) -> None:
    """Writes them as a list of the fields of ``Finding``, ``name`` being "task/layer"."""
    write_text(file, json.dumps([asdict(finding) for finding in findings], indent=1))


def add_findings(findings: Sequence[Finding], file: Path) -> None:
    """Adds findings to ``file``, replacing those of the same layer and kind."""
    before = read_findings(file) if file.is_file() else []
    kept = {(finding.name, *finding.kind): finding for finding in (*before, *findings)}
    save_findings(list(kept.values()), file)


def named_apart(places: Sequence[Path]) -> dict[str, Path]:
    """Name in a figure -> path of each probe. A name is the end of the path that tells the probes apart.

    Raises:
        ConfigError: a path is given twice.
    """
    parts = [place.absolute().parts for place in places]
    if len(set(parts)) < len(parts):
        raise ConfigError(f"a probe is named twice: {', '.join(map(str, places))}")
    depth = 1
    while len({own[-depth:] for own in parts}) < len(parts):
        depth += 1
    return {"/".join(own[-depth:]): place for own, place in zip(parts, places, strict=True)}


def read_findings(place: Path) -> list[Finding]:
    """Reads a file of ``save_findings``; ``place`` is the file or the probe's folder.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    file = place / SCORES if place.is_dir() else place
    if not file.is_file():
        raise ConfigError(f"no scores of a probe at '{file}': `visper probe ... --out FOLDER --score ...` writes them")
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        return [Finding(**{**row, "interval": tuple(row["interval"]) if row.get("interval") else None}) for row in rows]
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"'{file}' is cut short or holds no scores of a probe: expected the file that `visper probe ... --out "
            "FOLDER --score ...` writes"
        ) from error


def averaged(seeds: Sequence[Sequence[Finding]]) -> list[Finding]:
    """Means over seeds of values and controls, without intervals and folders, as each seed may have its own."""
    result = []
    for same in zip(*seeds, strict=True):
        controls = {name: statistics.fmean(f.controls[name] for f in same) for name in same[0].controls}
        mean = statistics.fmean(f.value for f in same)
        result.append(replace(same[0], value=mean, controls=controls, interval=None, of=None))
    return result


def titles(findings: Iterable[Finding]) -> dict[tuple[str, str, str | None, int], str]:
    """Kind of finding -> its measure, the end of the folder's path that tells folders apart, the number of images."""
    kinds = list(dict.fromkeys(finding.kind for finding in findings))
    folders = named_apart([Path(of) for of in dict.fromkeys(of for _, _, of, _ in kinds) if of is not None])
    names = {str(place): name for name, place in folders.items()}
    found = {}
    for kind in kinds:
        _, measure, of, images = kind
        found[kind] = measure + (f", {names[of]}" if of is not None else "") + (f" ({images} images)" if images else "")
    return found


def findings_table(findings: Sequence[Finding]) -> Table:
    """One line per layer and measure, with the controls."""
    value = "value (95 %)" if any(finding.interval for finding in findings) else "value"
    table = Table("task/layer", "measure", value, "controls")
    title = titles(findings)
    for finding in findings:
        value = f"{finding.value:.3f}"
        if finding.interval is not None:
            value += " ({:.3f} to {:.3f})".format(*finding.interval)
        table.add_row(finding.name, title[finding.kind], value, finding.controls_text)
    return table


def require_drawable(out: Path) -> None:
    """Checks that ``draw_curves`` can draw into a file.

    Raises:
        ConfigError: matplotlib is not installed, or the file's suffix is not a known format.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError("curves are drawn by matplotlib: pip install 'visper-lm[plots]'")
    if out.suffix not in FORMATS:
        raise ConfigError(f"curves cannot be drawn into '{out}': expected a file in {', '.join(FORMATS)}")


def draw_curves(probes: Mapping[str, Sequence[Finding]], out: Path) -> None:
    """Draws a panel for each task, measure and set of scored images.

    Layers are on the x axis, with a line for each model, its 95 % interval shaded, and dotted lines for the controls.

    Args:
        probes: name of a model -> its findings.

    Raises:
        ConfigError: see ``require_drawable``.
    """
    require_drawable(out)
    from matplotlib.figure import Figure

    panels = titles(f for found in probes.values() for f in found)
    across = 2 if len(panels) == 4 else min(COLUMNS, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(4.2 * across, 3.2 * down + 0.4), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, (kind, title) in zip(axes[: len(panels)], panels.items(), strict=True):
        named: set[str] = set()
        for model, found in probes.items():
            own = sorted((f for f in found if f.kind == kind), key=lambda f: f.layer)
            if not own:
                axis.plot([], [], label=model)  # keeps the model's color and its place in the legend
                continue
            layers = [f.layer for f in own]
            (line,) = axis.plot(layers, [f.value for f in own], marker="o", label=model)
            low, high = zip(*(f.interval or (f.value, f.value) for f in own), strict=True)
            axis.fill_between(layers, low, high, color=line.get_color(), alpha=0.2)
            for control in own[0].controls:
                values = [f.controls[control] for f in own]
                same = control not in (OTHER, OTHER_TARGET, TIES_WRONG)  # for all models, such as the teacher's score
                axis.plot(layers, values, linestyle=":", color="gray" if same else line.get_color(), linewidth=1)
                if control not in named:
                    axis.annotate(control, (layers[0], values[0]), fontsize=7, color="gray", va="bottom")
                named.add(control)
        highers = {f.higher for found in probes.values() for f in found if f.kind == kind}
        better = "higher is better" if highers == {True} else "lower is better"
        axis.set(title=f"{kind[0]}: {title}", xlabel="layer", ylabel=better)
        axis.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    shaded = any(finding.interval for found in probes.values() for finding in found)
    title = "dotted: controls" + (", shaded: 95 % interval over images" if shaded else "")
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), title=title)
    with atomic_path(out) as partial:
        figure.savefig(partial, format=out.suffix.removeprefix("."), dpi=150)
