"""Base class of teachers: a frozen network, its preprocessing, the shape of its targets, and how to draw them.

Teachers are kept outside the student, in a plain ``dict``, so that no state dict, optimizer or gradient includes them.

Shape suffixes: B = samples, N = teacher tokens, E = teacher width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from visper.data.images import rgb_bytes, squashed, stacked

Self = TypeVar("Self", bound="Teacher")


@dataclass(frozen=True)
class TargetSpec:
    """The shape of one target: ``tokens`` x ``width``, and the ``grid`` (rows, columns) the tokens lie on, if any.

    ``own``: the student computes the target itself, one embedding per image token; ``tokens`` is then the number of
    tokens of an ordinary image.
    """

    tokens: int
    width: int
    grid: tuple[int, int] | None = None
    own: bool = False

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.width < 1:
            raise ValueError(f"a target needs at least one token and one channel, found {self.tokens} x {self.width}")
        if self.grid is not None and self.grid[0] * self.grid[1] != self.tokens:
            raise ValueError(
                f"a target of {self.tokens} tokens cannot lie on a grid of {self.grid[0]} x {self.grid[1]}"
            )


@dataclass(frozen=True)
class SquashedImage:
    """Squashes an image ``[3, H, W]`` to ``size``, ``[3, height, width]`` uint8; the teacher normalizes it later.

    A teacher sees all of the image, so the aspect ratio is not kept. The object holds numbers only, so that loader
    workers need not hold the teacher's weights. Channels stay in RGB order (the published code swapped them for the
    depth teacher).
    """

    size: tuple[int, int]
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __call__(self, image: Tensor) -> Tensor:
        return squashed(image, self.size)

    def normalize(self, pixels: Tensor) -> Tensor:
        """``(rgb / 255 - mean) / std`` of uint8 pixels ``[B, 3, h, w]``, in float32 on their device."""
        # Per channel: numbers are kernel arguments, while a tensor of three would be copied to the device first.
        channels = zip(pixels.unbind(1), self.mean, self.std, strict=True)
        return torch.stack([(channel / 255 - mean) / std for channel, mean, std in channels], 1)


class Teacher(nn.Module, ABC):
    """A frozen network whose embedding of an image the student learns to predict.

    A subclass sets ``spec`` and ``preprocess``, defines ``encode``, calls ``self.freeze()`` at the end of its
    ``__init__``, and may override ``decode``.

    Attributes:
        spec: the shape of its targets.
        preprocess: picklable callable, image ``[3, H, W]`` uint8 -> ``[3, h, w]``, run in loader workers. Either a
            ``SquashedImage``, whose output ``see`` and ``forward`` normalize, or one that returns the input of
            ``encode``.
    """

    spec: TargetSpec
    preprocess: Callable[[Tensor], Tensor]

    @classmethod
    def planned_spec(cls, model: str | Path, **options: Any) -> TargetSpec:
        """The ``spec`` that ``cls(model, **options)`` would have. Large teachers override it to load no weights."""
        return cls(model, **options).spec

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Targets ``[B, tokens, width]`` of preprocessed images ``[B, 3, h, w]``."""

    @property
    def draws_images(self) -> bool:
        """Whether ``decode`` draws an image. False for a target of one token, which has no positions to draw."""
        return self.spec.grid is not None and self.spec.tokens > 1

    def decode(self, embedding: Tensor, pixels: Tensor | None = None, reference: Tensor | None = None) -> Tensor:
        """Draws embeddings ``[B, tokens, width]``, the teacher's or predicted, as images ``[B, 3, H, W]`` in 0..1.

        Args:
            embedding: what to draw.
            pixels: the same images, preprocessed, for a teacher that draws from more than the embedding.
            reference: embeddings that determine the colors, such as the teacher's own; default: ``embedding``.

        Raises:
            ValueError: the teacher draws no images.
        """
        if self.spec.grid is None or not self.draws_images:
            raise ValueError(
                f"{type(self).__name__} has a target of {self.spec.tokens} x {self.spec.width} without positions, "
                "which cannot be drawn: show the images with the nearest targets instead"
            )
        return pca_images(embedding, self.spec.grid, reference)

    def see(self, images: Sequence[Image.Image]) -> Tensor:
        """Preprocessed and normalized images ``[B, 3, h, w]`` float32, for ``encode`` and ``decode``."""
        return self._normalized(stacked([self.preprocess(rgb_bytes(image)) for image in images]))

    def _normalized(self, pixels: Tensor) -> Tensor:
        preprocess = getattr(self, "preprocess", None)  # stored targets need none
        if isinstance(preprocess, SquashedImage) and pixels.dtype == torch.uint8:
            return preprocess.normalize(pixels)
        return pixels

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Runs ``encode`` in the teacher's precision without gradients, and checks the shape against ``spec``.

        ``pixels`` are images from ``preprocess`` or ``see``. Targets are returned on their device, where the objective
        needs them.
        """
        pixels = self._normalized(pixels)
        own = chain(self.parameters(), self.buffers())  # quantized weights are integers
        weight = next((tensor for tensor in own if tensor.is_floating_point()), pixels)
        target_BNE = self.encode(pixels.to(weight.device, weight.dtype))
        found, expected = tuple(target_BNE.shape), (len(pixels), self.spec.tokens, self.spec.width)
        if found != expected:
            raise ValueError(
                f"{type(self).__name__} gave targets of shape {found}, but its spec says {expected}: "
                "set the teacher's input size or grid so that they agree"
            )
        return target_BNE.to(pixels.device)

    def freeze(self: Self) -> Self:
        """Puts the teacher in evaluation mode and turns off all gradients."""
        self.requires_grad_(False)
        return self.eval()

    def train(self: Self, mode: bool = True) -> Self:
        """Stays in evaluation mode for any ``mode``: a teacher's dropout and batch statistics never change."""
        return super().train(False)


def pca_images(embedding: Tensor, grid: tuple[int, int], reference: Tensor | None = None) -> Tensor:
    """Three principal components of the tokens as red, green and blue, each stretched to 0..1.

    ``reference`` (default: ``embedding`` itself) determines the components and their range, so that a prediction can be
    drawn in its teacher's colors.

    Args:
        embedding: ``[B, N, E]``.
        grid: rows and columns of the tokens.
        reference: ``[R, N, E]``.

    Returns:
        ``[B, 3, rows, columns]`` in 0..1.
    """
    with torch.autocast(embedding.device.type, enabled=False):
        return _pca_images(embedding.detach().float(), grid, reference)


def _pca_images(values: Tensor, grid: tuple[int, int], reference: Tensor | None) -> Tensor:
    basis_of = values if reference is None else reference.detach().float().to(values.device)
    tokens_RE = basis_of.flatten(0, 1)
    mean_E = tokens_RE.mean(0)
    covariance_EE = (tokens_RE - mean_E).T @ (tokens_RE - mean_E)
    components_EC = torch.linalg.eigh(covariance_EE).eigenvectors[:, -3:].flip(1)
    # An eigenvector's sign is arbitrary: fix it, or colors flip from step to step.
    largest_C = components_EC.gather(0, components_EC.abs().argmax(0, keepdim=True)).sign()
    components_EC = components_EC * largest_C
    colors_BNC = _stretched((values - mean_E) @ components_EC, (tokens_RE - mean_E) @ components_EC)
    if colors_BNC.shape[-1] < 3:
        colors_BNC = colors_BNC[..., :1].expand(-1, -1, 3)
    return colors_BNC.transpose(1, 2).unflatten(2, grid).contiguous()


def _stretched(values: Tensor, reference_RC: Tensor) -> Tensor:
    low, high = reference_RC.amin(0), reference_RC.amax(0)
    return ((values - low) / (high - low).clamp(min=1e-6)).clamp(0.0, 1.0)
