"""Says of a result that Megatron rejects, such as a loss that is not a number, what computed it.

Megatron checks losses and gradients itself, runs a step again to see whether the result repeats,
saves and ends all ranks. Under a plan its words, rank and step, say too little: a rank has tasks of
several modules and microbatches.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.training.global_vars import get_args


@contextmanager
def results_of(what: object) -> Iterator[None]:
    """Adds to the message of every check in its scope what is being computed.

    Args:
        what: A task, or the gradients of a module; the same when the step runs again, since
            Megatron knows a check by its message.
    """
    machine: Any = get_rerun_state_machine()
    before = machine.validate_result

    def validate_result(
        result: Any, rejection_func: Any, message: str, *rest: Any, **options: Any
    ) -> None:
        # Megatron's own count of steps is one ahead in this message.
        step = getattr(get_args(), "curr_iteration", -1) + 1
        before(result, rejection_func, f"{message}, in {what} of step {step}", *rest, **options)

    machine.validate_result = validate_result
    try:
        yield
    finally:
        machine.validate_result = before
