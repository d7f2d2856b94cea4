"""The arms of the study, each of which changes one thing in the same two recipes, and its sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from visper.config import load_run

PT, IFT = "study/pt", "study/ift"
NOTHING, PUBLISHED, FEEDING, SHUFFLED = "nothing", "published", "feature feeding", "shuffled targets"


@dataclass(frozen=True)
class Arm:
    """One training condition.

    Attributes:
        pt, ift: names of its recipes.
        fed: the projector also reads the teachers' tokens.
        equal_compute: pre-train for as many steps as the published method's processor time buys.
        more: pre-train on more scenes.
    """

    name: str
    pt: str = PT
    ift: str = IFT
    fed: bool = False
    equal_compute: bool = False
    more: bool = False

    @property
    def supervised(self) -> str | None:
        """The recipe with embedding losses, or None. Their weight is chosen among ``run.WEIGHTS``."""
        return next((recipe for recipe in (self.pt, self.ift) if load_run(recipe).distillation), None)

    @property
    def own_pt(self) -> bool:
        """Whether its pre-training differs from that of the arm without supervision."""
        return self.pt != PT or self.equal_compute or self.fed


ARMS = {
    arm.name: arm
    for arm in (
        Arm(NOTHING),
        Arm(PUBLISHED, pt="study/pt-published"),
        Arm("image tokens in PT", pt="study/pt-image-tokens"),
        Arm(FEEDING, fed=True),
        Arm(SHUFFLED, pt="study/pt-shuffled"),
        Arm("image tokens in IFT", ift="study/ift-image-tokens"),
        Arm("equal compute", equal_compute=True),
        Arm("more data, equal compute", equal_compute=True, more=True),
        Arm("own features in IFT", ift="study/ift-own-features"),
        Arm("gram in IFT", ift="study/ift-gram"),
    )
}
"""In the order in which they run for each seed; the first ones answer the main question."""


@dataclass(frozen=True)
class Size:
    """Sizes of a study.

    Attributes:
        scenes: scenes to pre-train on.
        more: the same for the arm with more data.
        held_out: scenes that no arm trains on.
        per_kind: held-out questions of each kind.
        start_steps: steps of the student that all arms start from.
        pt_steps: steps of pre-training.
        labels: number of questions to fine-tune on -> steps.
        chosen_at: the number of labels at which weights are compared.
        judged: held-out scenes on which predictions are compared with the teachers.
        probed: number of seeds whose pre-trained models are probed.
        probe_steps: steps of such a probe.
        margin: least gain in accuracy (0 to 1) of feature feeding over no supervision; below it the setting can
            show nothing.
    """

    scenes: int
    more: int
    held_out: int
    per_kind: int
    start_steps: int
    pt_steps: int
    labels: Mapping[int, int]
    chosen_at: int
    judged: int
    probed: int
    probe_steps: int
    margin: float


FULL = Size(4000, 8000, 600, 250, 1000, 400, {250: 60, 1000: 120, 4000: 180, 16000: 300}, 1000, 150, 3, 500, 0.05)
FAST = Size(60, 80, 60, 4, 4, 4, {20: 2, 40: 3}, 20, 8, 1, 2, -1.0)
