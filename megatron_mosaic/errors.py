"""What goes wrong, by whose hand: the plan, the layout it describes, or the environment."""


class PlanError(ValueError):
    """A plan file cannot be read or asks for something that does not exist."""


class ScheduleError(PlanError):
    """A schedule cannot run, or does not do what its plan asks for.

    Args:
        message: One line.
        table: The offending rows, drawn.
    """

    def __init__(self, message: str, *, table: str) -> None:
        super().__init__(message)
        self.table = table


class LayoutError(ValueError):
    """Parallel sizes, ranks or token counts contradict each other."""


class HostError(RuntimeError):
    """The environment (Megatron, torch, devices, launcher) cannot do what the plan needs."""
