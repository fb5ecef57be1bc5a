"""Live progress of a training run: a bar on a terminal, now and then a line elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from examples.digits.training_log import TrainingLog

Follow = Callable[[TrainingLog], None]

_STEPS_PER_LINE = 50


@contextmanager
def following(title: str, *, num_steps: int, console: Console) -> Iterator[Follow]:
    """Shows the progress of a run. Yields what is to be called whenever its log has grown."""
    if console.is_terminal:
        with _bar(title, num_steps=num_steps, console=console) as follow:
            yield follow
    else:
        yield _lines(title, num_steps=num_steps, console=console)


@contextmanager
def _bar(title: str, *, num_steps: int, console: Console) -> Iterator[Follow]:
    columns = (
        TextColumn("{task.description:<15}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[state]:<32}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=num_steps, state="starting")

        def follow(log: TrainingLog) -> None:
            progress.update(task, completed=len(log.losses), state=_state(log, num_steps))

        yield follow


def _lines(title: str, *, num_steps: int, console: Console) -> Follow:
    console.print(f"{title}: starting")

    def follow(log: TrainingLog) -> None:
        step = len(log.losses)
        if step in (1, num_steps) or step % _STEPS_PER_LINE == 0:
            console.print(f"{title}: {_state(log, num_steps)}", soft_wrap=True)

    return follow


def _state(log: TrainingLog, num_steps: int) -> str:
    if log.accuracy is not None:
        return f"held-out accuracy {log.accuracy:.1%}"
    return f"step {len(log.losses)}/{num_steps}, loss {log.losses[-1]:.4f}"
