"""The arms: what each changes in the same two recipes."""

from __future__ import annotations

from dataclasses import dataclass

from visper.config import load_run

PT, IFT = "study/pt", "study/ift"
NOTHING, PUBLISHED, FEEDING, SHUFFLED = "nothing", "published", "feature feeding", "shuffled targets"


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        pt, ift: its recipes.
        fed: its projector reads the teachers' tokens, too.
        equal_compute: pre-trains for as many steps as cost what the published method's cost.
        more: pre-trains on more scenes.
    """

    name: str
    pt: str = PT
    ift: str = IFT
    fed: bool = False
    equal_compute: bool = False
    more: bool = False

    @property
    def supervised(self) -> str | None:
        """The recipe with embedding losses, whose weight is chosen."""
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
"""In the order in which a seed's runs are made: the first of them answer the main question."""
