"""Puts the ranks' shards together and compares two runs tensor by tensor."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mosaic.rehearsal.record import Record, Shard

GRADIENT_BOUND = 1e-5  # ||dg|| / ||g||
WEIGHT_BOUND = 1e-5  # ||dw|| / ||w||
NEGLIGIBLE = 1e-6  # of the global gradient norm: below it, rounding is all there is


@dataclass
class Whole:
    """A run with whole tensors, as one process would hold them."""

    losses: list[dict[str, list[float]]]
    evaluations: list[dict[str, list[float]]]
    gradients: list[dict[str, np.ndarray]]
    weights: list[dict[str, np.ndarray]]


def whole(records: Sequence[Record]) -> Whole:
    """Joins what the ranks of a run recorded; replicas must agree."""
    for record in records[1:]:
        assert record.losses == records[0].losses, "ranks report unlike losses"
        assert record.evaluations == records[0].evaluations, "ranks report unlike evaluations"
    steps = len(records[0].gradients)
    return Whole(
        losses=records[0].losses,
        evaluations=records[0].evaluations,
        gradients=[_join([record.gradients[step] for record in records]) for step in range(steps)],
        weights=[_join([record.weights[step] for record in records]) for step in range(steps + 1)],
    )


def _join(parts: Sequence[dict[str, Shard]]) -> dict[str, np.ndarray]:
    names = {name for part in parts for name in part}
    return {name: _join_tensor([part[name] for part in parts if name in part]) for name in names}


def _join_tensor(shards: Sequence[Shard]) -> np.ndarray:
    by_tp: dict[int, list[Shard]] = {}
    for shard in shards:
        by_tp.setdefault(shard.tp, []).append(shard)
    pieces = []
    for tp in sorted(by_tp):
        replicas = by_tp[tp]
        if replicas[0].summed:
            pieces.append(sum(shard.values for shard in replicas))
            continue
        for shard in replicas[1:]:
            np.testing.assert_array_equal(shard.values, replicas[0].values, "replicas differ")
        pieces.append(replicas[0].values)
    dim, stride = shards[0].dim, shards[0].stride
    if dim < 0:
        for piece in pieces[1:]:
            np.testing.assert_allclose(piece, pieces[0], rtol=1e-5, atol=1e-7)
        return pieces[0]
    # Shard t of a tensor split with stride s holds pieces t, t + tp, ... of its tp * s pieces.
    halves = [np.split(piece, stride, axis=dim) for piece in pieces]
    return np.concatenate([half[k] for k in range(stride) for half in halves], axis=dim)


@dataclass
class Comparison:
    """How far a run is from the reference.

    Args:
        failures: One line for each tensor, loss or step beyond its bound.
        negligible: Tensors whose gradient is rounding noise, compared absolutely.
        worst_gradient: Largest relative difference of a gradient that is not negligible.
        worst_weight: Largest relative difference of a weight that is not exempt.
    """

    failures: list[str]
    negligible: list[str]
    worst_gradient: float = 0.0
    worst_weight: float = 0.0


def compare(run: Whole, reference: Whole, *, adam: bool) -> Comparison:
    """Compares losses, gradients of every step, and weights after every step."""
    result = Comparison(failures=[], negligible=[])
    _compare_losses(run, reference, result)
    for step, (own, other) in enumerate(zip(run.gradients, reference.gradients, strict=True)):
        _compare_gradients(step, own, other, result)
    for step, (own, other) in enumerate(zip(run.weights, reference.weights, strict=True)):
        for name in _common(f"weights {step}", own, other, result):
            # Adam turns the sign of rounding noise into whole steps of the learning rate.
            if adam and name in result.negligible:
                continue
            distance = _relative(own[name], other[name])
            result.worst_weight = max(result.worst_weight, distance)
            if not distance <= WEIGHT_BOUND:
                result.failures.append(f"weight {name} before step {step}: {distance:.1e}")
    return result


def _compare_losses(run: Whole, reference: Whole, result: Comparison) -> None:
    for kind in ("losses", "evaluations"):
        assert getattr(reference, kind), f"the reference has no {kind}"
        for step, (own, other) in enumerate(
            zip(getattr(run, kind), getattr(reference, kind), strict=True)
        ):
            if set(own) != set(other):
                result.failures.append(f"{kind} {step}: {sorted(own)} is not {sorted(other)}")
                continue
            for key in own:
                if not np.allclose(own[key], other[key], rtol=1e-6, atol=0):
                    result.failures.append(f"{kind} {step} {key}: {own[key]} not {other[key]}")


def _compare_gradients(
    step: int, own: dict[str, np.ndarray], other: dict[str, np.ndarray], result: Comparison
) -> None:
    total = np.sqrt(sum(np.square(gradient, dtype=np.float64).sum() for gradient in other.values()))
    for name in _common(f"gradients {step}", own, other, result):
        if np.linalg.norm(other[name]) < NEGLIGIBLE * total:
            if name not in result.negligible:
                result.negligible.append(name)
            if not np.linalg.norm(own[name] - other[name]) <= NEGLIGIBLE * total:
                result.failures.append(f"gradient {name} in step {step}: not negligible")
            continue
        distance = _relative(own[name], other[name])
        result.worst_gradient = max(result.worst_gradient, distance)
        if not distance <= GRADIENT_BOUND:
            result.failures.append(f"gradient {name} in step {step}: {distance:.1e}")


def _common(
    what: str, own: dict[str, np.ndarray], other: dict[str, np.ndarray], result: Comparison
) -> list[str]:
    names = {_untied(name, other) for name in own}
    if names != set(other):
        result.failures.append(f"{what}: tensors {sorted(names ^ set(other))} are on one side only")
    return sorted(set(own) & set(other))


def _untied(name: str, reference: dict[str, np.ndarray]) -> str:
    """With tied embeddings the last stage holds a copy, which one process does not."""
    copy, embedding = "language_model.output_layer.weight", "language_model.embedding"
    if name == copy and copy not in reference:
        return f"{embedding}.word_embeddings.weight"
    return name


def _relative(own: np.ndarray, other: np.ndarray) -> float:
    scale = float(np.linalg.norm(other))
    return float(np.linalg.norm(own - other)) / scale if scale else float(np.abs(own).max())
