"""The objectives of the other families, as functions of what networks gave. None of them draws anything.

B images    V views    K prototypes    N patches    Q keys in a queue    D width of an embedding
"""

import torch
from torch import Tensor
from torch.nn import functional


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """InfoNCE inside a batch: each view has to find the other view of its image among all other 2B - 1 views.

    Args:
        first: `[B, D]`, embeddings of one view of each image; their length does not matter.
        second: `[B, D]`, of another.
        temperature: Above 0, divides cosines.

    Returns:
        A scalar, the mean over all 2B views.

    Source: Chen et al., SimCLR, arXiv 2002.05709, equation 1.
    """
    rows = functional.normalize(torch.cat([first, second]), dim=1)
    itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    logits = (rows @ rows.T / temperature).masked_fill(itself, float("-inf"))
    partners = torch.arange(len(rows), device=rows.device).roll(len(first))
    return functional.cross_entropy(logits, partners)


def info_nce(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """InfoNCE with a queue: each query has to find its key among it and the keys of earlier batches.

    Args:
        queries: `[B, D]`; their length does not matter.
        keys: `[B, D]`, no gradient flows into them; their length does not matter.
        queue: `[Q, D]`, of length 1.
        temperature: Above 0, divides cosines.

    Returns:
        A scalar, the mean over queries.

    Source: He et al., MoCo, arXiv 1911.05722, equation 1 and algorithm 1.
    """
    queries, keys = functional.normalize(queries, dim=1), functional.normalize(keys.detach(), dim=1)
    logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ queue.T], dim=1) / temperature
    return functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))


def sharpened(logits: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """A teacher's distribution: centred, against one prototype for all, and sharpened, against an even one.

    Args:
        logits: `[..., K]`; no gradient flows back.
        centre: `[K]`, subtracted.
        temperature: Above 0, below the student's.

    Returns:
        `[..., K]`, sums to 1 along the last dimension.

    Source: Caron et al., DINO, arXiv 2104.14294, section 3.1.
    """
    return ((logits.detach() - centre) / temperature).softmax(dim=-1)


def dino_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each view of the student with each other view of the teacher.

    Args:
        student: `[V, B, K]`, logits of all views; the first ones are the teacher's, in its order.
        teacher: `[T, B, K]`, distributions of the T large views.
        temperature: Of the student, above 0.

    Returns:
        A scalar, the mean over images and over the T * (V - 1) pairs of different views.

    Source: DINO, arXiv 2104.14294, equation 3.
    """
    log_probabilities = (student / temperature).log_softmax(dim=-1)
    pairs = -torch.einsum("tbk,vbk->tv", teacher, log_probabilities) / student.shape[1]
    different = ~torch.eye(*pairs.shape, dtype=torch.bool, device=pairs.device)
    return pairs[different].mean()


def ibot_patch_loss(student: Tensor, teacher: Tensor, masked: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of the student, at the patches hidden from it, with the teacher that saw them.

    Args:
        student: `[B, N, K]`, logits of masked images.
        teacher: `[B, N, K]`, distributions of the same views, whole.
        masked: bool `[B, N]`, hidden patches.
        temperature: Of the student, above 0.

    Returns:
        A scalar: the mean over the hidden patches of an image, then over images; one without any counts as 0.

    Source: Zhou et al., iBOT, arXiv 2111.07832, equation 2.
    """
    entropies = -(teacher * (student / temperature).log_softmax(dim=-1)).sum(-1)
    return ((entropies * masked).sum(1) / masked.sum(1).clamp(min=1)).mean()
