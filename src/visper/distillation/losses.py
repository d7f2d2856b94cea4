"""Losses between predicted and target embeddings.

Each returns one number per sample, in float32; ``objective.py`` sums and weights them. Samples without a target are
never passed in (the published code broadcasts a mask of shape (B, 1, 1) against losses of shape (B), over all pairs).
A loss is a function ``(predicted, target, mask)`` here and an entry of ``config.kinds.LOSSES``; only ``info_nce``
compares with other samples.

Sources: smooth-L1 and InfoNCE arXiv 2412.09585, section 3; cosine 2509.07979 and 2510.12276; Gram 2512.06281, after
2508.10104.

Shape suffixes: B = samples, P = samples in the pool, N = tokens, E = width.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, mse_loss, normalize, smooth_l1_loss

from visper.common.errors import ConfigError
from visper.common.importing import import_named
from visper.config.kinds import loss_place

MAX_SCALE = 100.0
"""Cap of the factor on the cosines, exp(logit scale), as in CLIP."""

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Predicted and target ``[B, N, E]``, mask ``[B, N]`` (True where a token counts; None: all do) -> ``[B]``."""


def loss_named(kind: str) -> Loss:
    """The function of a kind of loss.

    Raises:
        ValueError: the kind is unknown, or its function cannot be imported or is none.
    """
    try:
        found: Loss = import_named(loss_place(kind))
    except (ImportError, ConfigError) as error:
        raise ConfigError(f"loss '{kind}' cannot be loaded: {error}") from error
    if not callable(found):
        raise ConfigError(f"loss '{kind}' is no function: expected one of (predicted, target, mask)")
    return found


def smooth_l1(predicted_BNE: Tensor, target_BNE: Tensor, mask_BN: Tensor | None = None) -> Tensor:
    """Smooth-L1 distance averaged over tokens and channels."""
    return _averaged(smooth_l1_loss(*_paired(predicted_BNE, target_BNE), reduction="none"), mask_BN)


def mse(predicted_BNE: Tensor, target_BNE: Tensor, mask_BN: Tensor | None = None) -> Tensor:
    """Squared distance averaged over tokens and channels."""
    return _averaged(mse_loss(*_paired(predicted_BNE, target_BNE), reduction="none"), mask_BN)


def cosine(predicted_BNE: Tensor, target_BNE: Tensor, mask_BN: Tensor | None = None) -> Tensor:
    """1 - cosine similarity of each token's two embeddings, averaged over tokens."""
    similarity_BN = cosine_similarity(*_paired(predicted_BNE, target_BNE), dim=-1)
    return _averaged((1.0 - similarity_BN)[..., None], mask_BN)


def gram(predicted_BNE: Tensor, target_BNE: Tensor, mask_BN: Tensor | None = None) -> Tensor:
    """Squared distance of the two Gram matrices (cosines between an image's own tokens), averaged over their pairs.

    Only similarities between parts of an image are compared, so predicted and target may differ in width.
    """
    if predicted_BNE.shape[:2] != target_BNE.shape[:2]:
        _paired(predicted_BNE, target_BNE)
    predicted, target = (normalize(values.float(), dim=-1) for values in (predicted_BNE, target_BNE.detach()))
    with torch.autocast(predicted.device.type, enabled=False):
        off_BNN = (predicted @ predicted.mT - target @ target.mT).square()
    if mask_BN is None:
        return off_BNN.flatten(1).mean(1)
    pairs_BNN = (mask_BN[:, :, None] & mask_BN[:, None, :]).float()
    return (off_BNN * pairs_BNN).flatten(1).sum(1) / pairs_BNN.flatten(1).sum(1).clamp(min=1)


def info_nce(
    predicted_BNE: Tensor,
    pool_PNE: Tensor,
    labels_B: Tensor,
    logit_scale: Tensor,
    mask_BN: Tensor | None = None,
    same_BP: Tensor | None = None,
) -> Tensor:
    """InfoNCE: cross-entropy of each sample's own target among all in the pool, in float32 even under autocast.

    Embeddings are flattened to one vector per sample; logits are cosines times ``min(exp(logit_scale), 100)``.

    Args:
        pool_PNE: targets of the whole global batch; they receive no gradient.
        labels_B: for each sample, the row of its own target in the pool.
        logit_scale: trainable logarithm of the factor; a scalar or one element.
        mask_BN: True where a token counts.
        same_BP: True where a pool target is of the sample's own image; other copies of it do not count as negatives.

    Raises:
        ValueError: pool and predictions differ in tokens or width, or there is not one label per sample.
    """
    if predicted_BNE.shape[1:] != pool_PNE.shape[1:] or labels_B.shape != predicted_BNE.shape[:1]:
        raise ValueError(
            f"predicted embeddings are {tuple(predicted_BNE.shape)}, the pool {tuple(pool_PNE.shape)}, the labels "
            f"{tuple(labels_B.shape)}: expected a pool of the same tokens and width, and one label per sample"
        )
    with torch.autocast(predicted_BNE.device.type, enabled=False):
        pool = pool_PNE.detach().flatten(1).float()
        # Divide the products, not the pool: a normalized copy would be saved for the backward pass of every layer.
        if mask_BN is None:
            predicted = normalize(predicted_BNE.flatten(1).float(), dim=1)
            cosines_BP = predicted @ pool.T / pool.norm(dim=1).clamp(min=1e-12)
        else:
            seen = mask_BN.float()
            predicted = normalize((predicted_BNE.float() * seen[..., None]).flatten(1), dim=1)
            norms_BP = (seen @ pool_PNE.detach().float().square().sum(-1).T).sqrt()
            cosines_BP = predicted @ pool.T / norms_BP.clamp(min=1e-12)
        scale = logit_scale.float().exp().clamp(max=MAX_SCALE)
        logits_BP = cosines_BP * scale
        if same_BP is not None:
            copies_BP = same_BP.scatter(1, labels_B[:, None], False)
            logits_BP = logits_BP.masked_fill(copies_BP, float("-inf"))
        return cross_entropy(logits_BP, labels_B, reduction="none")


def _paired(predicted_BNE: Tensor, target_BNE: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32, the target detached.

    Raises:
        ValueError: the shapes differ.
    """
    if predicted_BNE.shape != target_BNE.shape:
        raise ValueError(
            f"predicted embeddings are {tuple(predicted_BNE.shape)}, the targets {tuple(target_BNE.shape)}: "
            "expected one target per image, with the tokens and width that the head was built for"
        )
    return predicted_BNE.float(), target_BNE.detach().float()


def _averaged(values_BNE: Tensor, mask_BN: Tensor | None) -> Tensor:
    if mask_BN is None:
        return values_BNE.flatten(1).mean(1)
    seen = mask_BN.float()
    return (values_BNE.mean(-1) * seen).sum(1) / seen.sum(1).clamp(min=1)
