"""What goes wrong, by whose hand: the plan, the layout it describes, or the environment."""


class PlanError(ValueError):
    """A plan file cannot be read or asks for something that does not exist."""


class LayoutError(ValueError):
    """Parallel sizes, ranks or token counts contradict each other."""


class HostError(RuntimeError):
    """The environment (Megatron, torch, devices, launcher) cannot do what the plan needs."""
