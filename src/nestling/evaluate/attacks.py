"""Attacks on images by the gradient of a classifier: FGSM, DeepFool, and the saliency map (JSMA).

A classifier is a function from pixels in [0, 1] (b, c, h, w) to logits (b, width); its own normalisation, and which of
several heads answers, are its business. Every attack treats each row by itself, goes on with those alone that are not
flipped yet, and gives pixels in [0, 1]. Agreement with foolbox and the Adversarial Robustness Toolbox is tested.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.errors import UsageError

Classify = Callable[[Tensor], Tensor]

STEPS = 50
"""Of DeepFool, at most."""
FRACTION = 0.145
"""Of an image's numbers that the saliency map may change, at most: Upsilon of Papernot et al., Section V."""
LADDER = tuple(float(rung) for rung in torch.logspace(-3, 0, 73, dtype=torch.float64))
"""Strengths at which FGSM is tried: each a tenth above the one before, up to the whole range of a pixel."""
HALVINGS = 5
"""Of the last step of the ladder, so that a strength is known to a third of a per cent."""
SMALLEST = 1e-8
"""Beside a norm that is divided by."""


@dataclass(frozen=True, eq=False)
class Attacked:
    """What an attack made of some rows."""

    pixels: Tensor
    """(b, c, h, w) in [0, 1]."""
    strength: Tensor
    """(b,): how far the attack went, in the attack's own measure; 0 for a row that is as it was."""
    flipped: Tensor
    """(b,) bool: whether the classifier's answer is no longer the label; so is one that was wrong from the start."""


def fgsm(classify: Classify, pixels: Tensor, labels: Tensor, epsilon: float) -> Attacked:
    """The fast gradient sign method: every number moves by ``epsilon`` along the sign of the loss's gradient.

    Parameters
    ----------
    pixels: (b, c, h, w) in [0, 1]; labels: (b,) columns of the classifier.
    epsilon: in [0, 1], of the range of a pixel; the strength of every row.

    Source: Goodfellow, Shlens, Szegedy, *Explaining and Harnessing Adversarial Examples*, ICLR 2015, Section 4.
    """
    moved = step(pixels, loss_signs(classify, pixels, labels), epsilon)
    return Attacked(moved, torch.full_like(pixels[:, 0, 0, 0], epsilon), answers(classify, moved) != labels)


def fgsm_until_flip(classify: Classify, pixels: Tensor, labels: Tensor) -> Attacked:
    """FGSM whose epsilon rises for each row until its answer is wrong: *Nested Learning*, Table 3.

    The strength is the epsilon of the first flip on ``LADDER``, made finer by ``HALVINGS``; 0 where the answer is wrong
    from the start. A row that no epsilon flips stays at the largest.
    """
    signs = loss_signs(classify, pixels, labels)
    strength = torch.zeros_like(pixels[:, 0, 0, 0])
    low = strength.clone()

    def still_right(rows: Tensor) -> Tensor:
        moved = step(pixels[rows], signs[rows], strength[rows])
        return answers(classify, moved) == labels[rows]

    every = torch.arange(len(pixels), device=pixels.device)
    started = right = every[still_right(every)]
    for rung in LADDER:
        if not len(right):
            break
        low[right], strength[right] = strength[right], rung
        right = right[still_right(right)]
    flipped = torch.ones_like(labels, dtype=torch.bool).index_fill(0, right, False)
    narrowed = started[flipped[started]]
    high = strength.clone()
    for _ in range(HALVINGS if len(narrowed) else 0):
        strength[narrowed] = (low[narrowed] + high[narrowed]) / 2
        above = still_right(narrowed)
        low[narrowed[above]] = strength[narrowed[above]]
        high[narrowed[~above]] = strength[narrowed[~above]]
    strength[narrowed] = high[narrowed]
    return Attacked(step(pixels, signs, strength), strength, flipped)


def deepfool(
    classify: Classify,
    pixels: Tensor,
    labels: Tensor,
    steps: int = STEPS,
    overshoot: float = 0.02,
    candidates: int = 10,
) -> Attacked:
    """DeepFool: steps to the nearest boundary of the classifier made linear, until the answer is wrong.

    Parameters
    ----------
    pixels: (b, c, h, w) in [0, 1]; labels: (b,) columns of the classifier.
    overshoot: the share by which the way is made longer, to be across the boundary.
    candidates: of the most probable classes at the start, whose boundaries are looked at.

    The strength is the Euclidean length of the way, in pixels' units. Source: Moosavi-Dezfooli, Fawzi, Frossard,
    *DeepFool*, CVPR 2016, Algorithm 2.
    """
    with torch.no_grad():
        order = classify(pixels).argsort(1, descending=True)[:, :candidates]
    found, way = pixels.clone(), torch.zeros_like(pixels)
    right = torch.arange(len(pixels), device=pixels.device)
    for _ in range(steps):
        right = right[answers(classify, found[right]) == labels[right]]
        if not len(right):
            break
        gaps, slopes = boundaries(classify, found[right], order[right])
        norms = slopes.flatten(2).norm(dim=2) + SMALLEST
        distances = gaps.abs() / norms
        nearest = distances.argmin(0)
        each = torch.arange(len(right), device=pixels.device)
        # The constant takes the row across where it stands on the boundary already.
        lengths = (distances[nearest, each] + 1e-4) / norms[nearest, each]
        way[right] += lengths[:, None, None, None] * slopes[nearest, each]
        found[right] = (pixels[right] + (1 + overshoot) * way[right]).clamp(0, 1)
    return Attacked(found, (found - pixels).flatten(1).norm(dim=1), answers(classify, found) != labels)


def boundaries(classify: Classify, pixels: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """By how much each class of ``order`` (b, k) is above the first one, (k - 1, b), and its slopes in the pixels."""
    pixels = pixels.detach().requires_grad_()
    with torch.enable_grad():
        ordered = attackable(classify(pixels)).gather(1, order)
        gaps = (ordered[:, 1:] - ordered[:, :1]).T
        last = len(gaps) - 1
        slopes = [torch.autograd.grad(gap.sum(), pixels, retain_graph=k < last)[0] for k, gap in enumerate(gaps)]
    return gaps.detach(), torch.stack(slopes)


def saliency_map(
    classify: Classify,
    pixels: Tensor,
    labels: Tensor,
    fraction: float = FRACTION,
    theta: float = 1.0,
    targets: Tensor | None = None,
) -> Attacked:
    """The saliency map attack: two numbers of the image at a time are raised, those that favour a target most.

    Parameters
    ----------
    pixels: (b, c, h, w) in [0, 1]; labels: (b,) columns of the classifier.
    fraction: of an image's numbers that may be changed, at most.
    theta: by how much a number is raised; 1 takes it to white at once, as in the paper.
    targets: (b,) columns that the answer is drawn to, and the attack goes on until it is there. Without them it is
        drawn to the most probable other class, and the attack ends as soon as the answer is wrong.

    The strength is the share of the image's numbers that were changed. Source: Papernot et al., *The Limitations of
    Deep Learning in Adversarial Settings*, EuroS&P 2016, Algorithms 2 and 3: the pair p, q of greatest
    -(a_p + a_q)(b_p + b_q), a being the derivatives of the target's probability and b those of all others' sum. As
    probabilities sum to 1, b = -a: the pair is that of the two greatest derivatives, as they stay under a logarithm.
    """
    shape, numbers = pixels.shape, pixels[0].numel() if len(pixels) else 1
    found = pixels.flatten(1).clone()
    changed = torch.zeros_like(found, dtype=torch.bool)
    goals = runners_up(classify, pixels, labels) if targets is None else targets
    rows = torch.arange(len(pixels), device=pixels.device)
    while len(rows):
        logits, slopes = target_slopes(classify, found[rows].view(-1, *shape[1:]), goals[rows])
        answer = logits.argmax(1)
        going = (answer == labels[rows]) if targets is None else (answer != goals[rows])
        slopes = slopes.flatten(1).masked_fill(found[rows] >= 1, -torch.inf)
        gain, pair = slopes.topk(min(2, numbers))
        count = changed[rows].scatter(1, pair, True).sum(1)
        going &= (gain.sum(1) > 0) & (count <= fraction * numbers)
        rows, pair = rows[going], pair[going]
        changed[rows[:, None], pair] = True
        found[rows[:, None], pair] = (found[rows[:, None], pair] + theta).clamp(max=1)
    found = found.view(shape)
    return Attacked(found, changed.float().mean(1), answers(classify, found) != labels)


def target_slopes(classify: Classify, pixels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The logits (b, width), and the slopes of the targets' log probabilities in the pixels (b, c, h, w)."""
    pixels = pixels.detach().requires_grad_()
    with torch.enable_grad():
        logits = attackable(classify(pixels))
        (slopes,) = torch.autograd.grad(-F.cross_entropy(logits.float(), targets, reduction="sum"), pixels)
    return logits.detach(), slopes


def loss_signs(classify: Classify, pixels: Tensor, labels: Tensor) -> Tensor:
    """The sign of the gradient of each row's cross-entropy in its pixels."""
    return -target_slopes(classify, pixels, labels)[1].sign()


@torch.no_grad()
def runners_up(classify: Classify, pixels: Tensor, labels: Tensor) -> Tensor:
    """(b,): the most probable class but the label."""
    return classify(pixels).scatter(1, labels[:, None], -torch.inf).argmax(1)


def step(pixels: Tensor, signs: Tensor, epsilon: Tensor | float) -> Tensor:
    """Pixels moved by ``epsilon``, one for all rows or (b,), and kept in their range."""
    size = epsilon[:, None, None, None] if isinstance(epsilon, Tensor) else epsilon
    return (pixels + size * signs).clamp(0, 1)


@torch.no_grad()
def answers(classify: Classify, pixels: Tensor) -> Tensor:
    """(b,): the most probable column."""
    return classify(pixels).argmax(1)


def attackable(logits: Tensor) -> Tensor:
    """The logits; UsageError where no gradient leads from them to the pixels, as behind features that are detached."""
    if not logits.requires_grad:
        raise UsageError(
            "this model's classifier passes no gradient to the image, so that no attack by gradients can be aimed at it"
        )
    return logits
