"""Patterns of layers as Megatron's arguments write them."""

import ast
from collections.abc import Mapping

from megatron_mosaic.errors import LayoutError, PlanError
from megatron_mosaic.fields import show


def layer_flags(
    given: Mapping[str, str | None], name: str, count: int, *, every_last: bool
) -> list[bool]:
    """Reads which layers a frequency or a list such as ``([0]*3+[1]*58)`` means.

    Args:
        given: Arguments by name.
        name: Of the argument; without it every layer is meant.
        count: Layers.
        every_last: What a number ``n`` says: the first of every ``n`` layers is meant (experts),
            or all but the last of them (windows, linear attention).

    Raises:
        PlanError: It is neither a number nor such a list.
        LayoutError: The list is not as long as the model.
    """
    value = given.get(name)
    if value is None:
        return [True] * count
    try:
        parsed = _evaluate(ast.parse(value.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError):
        raise PlanError(
            f"{name}={show(value)} must be a number or a list; write such as ([0]*3+[1]*58)"
        ) from None
    if isinstance(parsed, int):
        if parsed < 1:
            raise PlanError(f"{name}={parsed} must be >= 1; write 1 for every layer")
        return [(i % parsed == 0) if every_last else bool((i + 1) % parsed) for i in range(count)]
    if len(parsed) != count:
        raise LayoutError(
            f"{name}: length={len(parsed)} must be --num-layers={count}; mend one of the two"
        )
    return [bool(flag) for flag in parsed]


def _evaluate(node: ast.expr) -> int | list[int]:
    """Computes sums and products of numbers and lists; anything else is no pattern."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int) and abs(node.value) < 10_000:
        return node.value
    if isinstance(node, ast.List):
        return [entry for it in node.elts if isinstance(entry := _evaluate(it), int)]
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left), _evaluate(node.right)
        if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
            return left + right
        if isinstance(node.op, ast.Mult) and isinstance(left, list) and isinstance(right, int):
            if len(left) * right > 10_000:
                raise ValueError("too long")
            return left * right
    raise ValueError("no pattern")


def hybrid_pattern(name: str, pattern: str, *, known: str) -> tuple[str, int]:
    """Reads a hybrid pattern such as ``M-M*|M-M*/M*``.

    Returns:
        A letter for each layer, and how many levels of multi-token prediction follow them.

    Raises:
        PlanError: A letter has no meaning.
    """
    main, *levels = pattern.split("/")
    letters = main.replace("|", "")
    for letter in letters:
        if letter not in known:
            raise PlanError(
                f"{name}: layer={show(letter)} must be one of {' '.join(known)}; "
                f"write a model file by hand"
            )
    return letters, len(levels)


def window(name: str, value: str) -> int | None:
    """Reads how many keys a query sees with a window such as ``(127,0)``; -1 has no end."""
    try:
        before, after = (int(part) for part in value.strip("()").split(","))
    except ValueError:
        raise PlanError(f"{name}={show(value)} must be two numbers; write (127,0)") from None
    return None if before < 0 or after < 0 else before + after + 1
