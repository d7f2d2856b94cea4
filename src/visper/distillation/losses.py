"""The embedding losses: smooth-L1 and InfoNCE between predicted and teacher embeddings (arXiv 2412.09585, section 3).

Each returns one number per sample; ``objective.py`` sums and weights them. Samples without a target are never passed in
(in the published code a mask of shape (B, 1, 1) met losses of shape (B) and was broadcast over all pairs).

Shape suffixes: B = samples, P = samples in the pool, N = teacher tokens, E = teacher width.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, smooth_l1_loss

MAX_SCALE = 100.0
"""Largest factor on the cosines, the cap of the trainable logit scale, as in CLIP."""


def smooth_l1_per_sample(predicted_BNE: Tensor, target_BNE: Tensor) -> Tensor:
    """Smooth-L1 distance averaged over tokens and channels, in float32.

    Returns:
        ``[B]``.

    Raises:
        ValueError: the shapes differ.
    """
    if predicted_BNE.shape != target_BNE.shape:
        raise ValueError(
            f"predicted embeddings are {tuple(predicted_BNE.shape)}, the teacher's {tuple(target_BNE.shape)}: "
            "expected one target per image sample, with the tokens and width that the predictor was built for"
        )
    return smooth_l1_loss(predicted_BNE.float(), target_BNE.float(), reduction="none").flatten(1).mean(1)


def info_nce_per_sample(predicted_BNE: Tensor, pool_PNE: Tensor, labels_B: Tensor, logit_scale: Tensor) -> Tensor:
    """InfoNCE: cross-entropy of each sample's own target among all in the pool, in float32 (also under autocast).

    Embeddings are flattened to one vector per sample; logits are cosines times ``min(exp(logit_scale), 100)``.

    Args:
        predicted_BNE: predictions.
        pool_PNE: targets of the whole global batch; they receive no gradient.
        labels_B: for each sample, the row of its own target in the pool.
        logit_scale: trainable, a scalar or one element: the logarithm of the factor.

    Returns:
        ``[B]``.

    Raises:
        ValueError: pool and predictions differ in tokens or width, or there is not one label per sample.
    """
    if predicted_BNE.shape[1:] != pool_PNE.shape[1:] or labels_B.shape != predicted_BNE.shape[:1]:
        raise ValueError(
            f"predicted embeddings are {tuple(predicted_BNE.shape)}, the pool {tuple(pool_PNE.shape)}, the labels "
            f"{tuple(labels_B.shape)}: expected the pool in their tokens and width, one label per sample"
        )
    with torch.autocast(predicted_BNE.device.type, enabled=False):
        predicted = normalize(predicted_BNE.flatten(1).float(), dim=1)
        pool = pool_PNE.detach().flatten(1).float()
        # Divide the products, not the pool: a normalized copy would be saved for the backward pass of every layer.
        cosines_BP = predicted @ pool.T / pool.norm(dim=1).clamp(min=1e-12)
        scale = logit_scale.float().exp().clamp(max=MAX_SCALE)
        return cross_entropy(cosines_BP * scale, labels_B, reduction="none")
