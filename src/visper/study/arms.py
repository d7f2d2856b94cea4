"""The arms of the study: each changes one thing in the same two recipes."""

from __future__ import annotations

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
