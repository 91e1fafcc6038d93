"""The formulas of *Hierarchically Robust Representation Learning* (Qian, Hu, Li, CVPR 2020), and its rival's.

Concepts are groups of classes; q are their weights, a point of the simplex. Equations and theorems are the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nestling.errors import UsageError, listed


def project_onto_simplex(v: Tensor) -> Tensor:
    """The point of the simplex, of numbers of at least 0 that sum to 1, that is nearest to ``v`` (Duchi et al. 2008).

    Parameters
    ----------
    v: (k,) or (…, k), projected along the last dimension.

    Returns
    -------
    ``v``-shaped. ``UsageError`` for an empty dimension, and on the CPU for numbers that are not finite; elsewhere,
    where looking would stall the device, these come out as NaN.
    """
    if v.ndim < 1 or v.shape[-1] < 1:
        raise UsageError(f"expected a vector (k,) of at least one number, got {tuple(v.shape)}")
    if v.device.type == "cpu" and not torch.isfinite(v).all():
        raise UsageError(f"expected finite numbers to project on the simplex, got {v.min().item()} to {v.max().item()}")
    return projected(v)


def projected(v: Tensor) -> Tensor:
    """``project_onto_simplex`` of (…, k) without a look at the numbers: NaN and infinities come out as NaN."""
    # The threshold lies within 1 of the largest number: what is farther below is 0, and would only cost digits.
    shifted = (v - v.amax(-1, keepdim=True)).clamp_min(-1)
    ordered = shifted.sort(-1, descending=True).values
    count = torch.arange(1, v.shape[-1] + 1, device=v.device, dtype=v.dtype)
    excess = ordered.cumsum(-1) - 1
    support = (ordered * count > excess).sum(-1, keepdim=True).clamp_min(1)
    threshold = excess.gather(-1, support - 1) / support
    return (shifted - threshold).clamp_min(0)


def concept_gradient(
    q: Tensor, sums: Tensor, size: Tensor | float, counts: Tensor, prior: Tensor, strength: float
) -> Tensor:
    """The gradient of Equation 4 in q that a random mini-batch gives, unbiased.

    Parameters
    ----------
    q, prior: (k,) q and q_0; counts: (k,) N_k, whose sum is N.
    sums: (k,) of the losses of the mini-batch's rows of each concept, 0 for a concept without rows there.
    size: m, the rows of the mini-batch.

    Returns
    -------
    (k,): (N / N_k) * sums_k / m - strength * (q_k - q_0k), also where no row of the batch is of concept k.
    """
    return counts.sum() / counts * sums / size - strength * (q - prior)


def concept_weights_step(
    q: Tensor,
    losses: Tensor,
    concepts: Tensor,
    counts: Tensor,
    prior: Tensor,
    step_size: Tensor | float,
    strength: float,
) -> Tensor:
    """One step of weighted gradient ascent on q, and the projection back onto the simplex: Equation 6.

    Parameters
    ----------
    q, prior: (k,) weights of the concepts and q_0; counts: (k,) N_k, the training rows of each.
    losses: (m,) of the rows of a random mini-batch; concepts: (m,) int64 in [0, k), their concepts.
    step_size: eta of this step, see ``concept_step_size``; strength: lambda.

    Returns
    -------
    (k,), at least 0, with sum 1. ``UsageError`` for other shapes and, on the CPU, for a concept without rows, and for
    one out of range.
    """
    shape = q.shape
    if q.ndim != 1 or counts.shape != shape or prior.shape != shape:
        raise UsageError(
            f"expected q, counts and prior (k,), got {tuple(shape)}, {tuple(counts.shape)} and {tuple(prior.shape)}"
        )
    if losses.ndim != 1 or len(losses) == 0 or concepts.shape != losses.shape:
        raise UsageError(
            f"expected losses and concepts (m,) of at least one row, got {tuple(losses.shape)} and "
            f"{tuple(concepts.shape)}"
        )
    check_concepts(concepts, counts)
    sums = torch.zeros_like(q).index_add(0, concepts, losses.detach().to(q.dtype))
    gradient = concept_gradient(q, sums, len(losses), counts.to(q.dtype), prior, strength)
    return project_onto_simplex(q + step_size * gradient)


def check_concepts(concepts: Tensor, counts: Tensor) -> None:
    """Raise UsageError, on the CPU, for concepts (m,) that are not in [0, k), and for one without ``counts`` (k,)."""
    if counts.device.type == "cpu" and not bool((counts > 0).all()):
        empty = torch.nonzero(counts <= 0).flatten().tolist()
        raise UsageError(f"expected a training row of every concept, got none of {listed(empty)}: leave it out")
    if concepts.device.type == "cpu" and not 0 <= int(concepts.min()) <= int(concepts.max()) < len(counts):
        raise UsageError(
            f"expected concepts in [0, {len(counts)}), got {int(concepts.min())} to {int(concepts.max())}: "
            "drop the rows whose concept is not known, or name it"
        )


def group_dro_step(q: Tensor, losses: Tensor, eta: float) -> Tensor:
    """The rival's step: exponentiated gradient, q_k proportional to q_k * exp(eta * loss_k).

    ``q``: (k,) on the simplex; ``losses``: (k,) estimates of the mean loss of each concept. Returns (k,) with sum 1.
    Source: Sagawa et al., *Distributionally Robust Neural Networks for Group Shifts*, ICLR 2020, Algorithm 1.
    """
    return (q.log() + eta * losses.detach()).softmax(-1)


def concept_step_size(step: Tensor | int, strength: float, s: Tensor | int, c: Tensor | float) -> Tensor:
    """eta of step t = 1, 2, …: 1 / (c * lambda * t) up to t = s, then 1 / (lambda * t) (Algorithm 1)."""
    t = torch.as_tensor(step)
    return 1 / (strength * t * torch.where(t <= s, c, 1.0))


def slow_start_gain(s: float, mu: float, strength: float) -> float:
    """h(s) = mu * sqrt(log(s) / (2 lambda)) - sqrt(s * lambda), whose square is Theorem 3's beta (Figure 2)."""
    return mu * math.sqrt(math.log(s) / (2 * strength)) - math.sqrt(s * strength)


def slow_start_factor(s: float, mu: float, strength: float) -> float:
    """c = (mu / lambda) * sqrt(log(s) / (2 s)) of Theorem 3, which asks that it be above 1."""
    return mu / strength * math.sqrt(math.log(s) / (2 * s))


def regret_bound(steps: int, mu: float, strength: float, s: float = 1) -> float:
    """Theorem 3's right-hand side: the average regret of q after T steps, the first s of them slow by its own c.

    Where that c is not above 1, beta is 0, as under the conventional step size.
    """
    beta = slow_start_gain(s, mu, strength) ** 2 if slow_start_factor(s, mu, strength) > 1 else 0.0
    return (mu**2 / (2 * strength) * (math.log(steps) + 1) - beta) / steps


def slow_start(steps: int, mu: float, strength: float) -> tuple[int, float]:
    """(s, c) for T steps: s where h is largest on [2, min(T / 10, 10,000)], c of Theorem 3, and at least 1."""
    best = max(range(2, max(2, min(steps // 10, 10_000)) + 1), key=lambda s: slow_start_gain(s, mu, strength))
    return best, max(slow_start_factor(best, mu, strength), 1.0)


def adversarial_direction(loss: Tensor, inputs: Tensor) -> Tensor:
    """z of Theorem 2: the gradient of the loss with respect to each input, divided by its Frobenius norm.

    Parameters
    ----------
    loss: a scalar made of ``inputs``; where rows do not touch each other its scale per row does not matter.
    inputs: (b, …) that require a gradient.

    Returns
    -------
    ``inputs``-shaped, of norm 1 per row, 0 where the gradient is 0; detached.
    """
    return _unit(_gradient(loss, inputs))


def adversarial_step(loss: Tensor, inputs: Tensor, smoothness: float) -> Tensor:
    """tau_i z_i with Theorem 2's tau = <gradient, z> / (3 L_x ||z||^2): along z the gradient's norm over 3 L_x.

    ``loss``: the *sum* of the rows' losses; ``smoothness``: L_x. Returns ``inputs``-shaped, detached.
    """
    return _gradient(loss, inputs) / (3 * smoothness)


def tightening(product: Tensor, norm: Tensor, transport: float, smoothness: float) -> Tensor:
    """alpha of Theorem 2, from <gradient, z> (b,) and ||z|| (b,): by how much augmentation tightens Theorem 1's bound.

    ``transport``: lambda_w, above ``smoothness``, L_x.
    """
    return transport / (transport - smoothness) * product**2 / (6 * smoothness * norm**2)


def worst_concept_accuracy(
    answers: dict[str, Tensor], labels: Tensor, levels: tuple[str, ...], concepts: Tensor
) -> float:
    """The accuracy of the concept that fares worst, over the concepts of the rows given; for ``Select``.

    A millionth of the mean over concepts is added: where two epochs fail on a concept altogether, the better one is
    kept. Each row counts at its own finest level, so that no concept is left out for being known coarsely alone.

    Parameters
    ----------
    answers: probabilities (n, width) of each level; labels: (n, len(levels)) int64, the training columns of
        ``Taxonomy.columns``, in which a ragged leaf goes on to the finest level; -1 = not labelled.
    concepts: (n,) int64, of which concept each row is; -1 = of none, and does not count.
    """
    decided = {level: p.argmax(1) for level, p in answers.items()}
    right, judged = right_at_finest(decided, labels, levels)
    known = (judged >= 0) & (concepts >= 0)
    if not known.any():
        return 0.0
    _, place = concepts[known].unique(return_inverse=True)
    rows = torch.bincount(place)
    accuracy = torch.zeros(len(rows), device=rows.device).index_add(0, place, right[known].float()) / rows
    return float(accuracy.min()) + 1e-6 * float(accuracy.mean())


def right_at_finest(decided: Mapping[str, Tensor], labels: Tensor, levels: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Whether each row is decided rightly at the finest level, of those decided, at which it is labelled.

    Parameters
    ----------
    decided: (n,) int64 columns of each level; labels: (n, len(levels)) int64 columns, -1 = not labelled.

    Returns
    -------
    (n,) bool, and (n,) int64 the number of that level, -1 where there is none.
    """
    right = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    judged = torch.full_like(labels[:, 0], -1)
    for number, level in enumerate(levels):
        if level in decided:
            target = labels[:, number]
            right = torch.where(target >= 0, decided[level] == target, right)
            judged = judged.masked_fill(target >= 0, number)
    return right, judged


def _gradient(loss: Tensor, inputs: Tensor) -> Tensor:
    if loss.ndim or not inputs.requires_grad:
        raise UsageError(
            f"expected a scalar loss, and inputs that require a gradient; got a loss of shape {tuple(loss.shape)} and "
            f"inputs that {'do' if inputs.requires_grad else 'do not'}"
        )
    (gradient,) = torch.autograd.grad(loss, inputs)
    return gradient


def _unit(gradient: Tensor) -> Tensor:
    shape = (-1, *(1,) * (gradient.ndim - 1))
    # By the largest number first: squares of a confident row's gradient would vanish in float32.
    largest = gradient.abs().flatten(1).amax(1).view(shape)
    scaled = gradient / largest.masked_fill(largest == 0, 1)
    norm = scaled.flatten(1).norm(dim=1).view(shape)
    return scaled / norm.masked_fill(norm == 0, 1)
