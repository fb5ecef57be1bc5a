"""The plan: what runs where and in which order, the only thing that planning hands to running."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args

from megatron_mosaic.errors import LayoutError, PlanError
from megatron_mosaic.fields import nearest, show
from megatron_mosaic.layout.placement import LANGUAGE, ModulePlacement
from megatron_mosaic.layout.plan_file import (
    FORMAT,
    plan_fields,
    read_plan_fields,
    write_plan_fields,
    written_modules,
)
from megatron_mosaic.layout.rules import check_plan
from megatron_mosaic.layout.unsupported import refuse_unsupported

ScheduleKind = Literal[
    "no_pipelining", "1f1b", "interleaved", "colocated", "bubble_fill", "concurrent"
]

# Keys of a schedule beside its kind, and the kinds that know them.
_KINDS_OF_KEY: Mapping[str, tuple[ScheduleKind, ...]] = {
    "encoder_group": ("colocated", "bubble_fill", "concurrent"),
    "max_live": ("bubble_fill", "concurrent"),
    "ahead": ("bubble_fill", "concurrent"),
    "order": ("bubble_fill", "concurrent"),
}

# Keys that came after format 1, at their defaults: without them a plan has the digest that it
# always had.
_LATER_MODULE_DEFAULTS: Mapping[str, Any] = {
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": None,
    "virtual_pipeline_model_parallel_size": 1,
    "attention": None,
    "items": "in_order",
    "share": None,
}
_LATER_SCHEDULE_DEFAULTS: Mapping[str, Any] = {"max_live": None, "ahead": False, "order": None}


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleChoice:
    """Which schedule runs, and its parameters.

    Args:
        kind: ``no_pipelining``; ``1f1b`` with encoders on ranks of their own; ``interleaved``, the
            same with several stages of the language model on a rank; ``colocated`` with encoders
            that may share ranks with the language model; ``bubble_fill`` with encoder tasks in
            the waits of the language model's pipeline; ``concurrent`` with modules that run at
            the same time where they share ranks, each in a lane of its own.
        encoder_group: Microbatches of one encoder task, with the last three kinds; ``None`` is
            the whole batch with ``colocated``, one microbatch with the others.
        max_live: Tasks of an encoder stage whose activations a rank may hold at the same time,
            with the last two kinds; ``None`` is no bound.
        ahead: Encoders with ``trainable: []`` work on the next step's samples, and their rows are
            kept until then, with the last two kinds; the first step also makes its own, the last
            one makes none. Losses and gradients are the same to the bit, with dropout too, and
            nothing of it goes into a checkpoint.
        order: Tasks of each kind of ranks as the planner has put them into the waits, with the
            last two kinds; with lanes, the order in which they are launched; ``None`` is the order
            for forward passes of one unit of time and backward passes of two.

    Raises:
        PlanError: The kind does not exist.
        LayoutError: A number is not positive, or a key is given for another kind.
    """

    kind: ScheduleKind
    encoder_group: int | None = None
    max_live: int | None = None
    ahead: bool = False
    order: tuple[tuple[str, str], ...] | None = None

    def __post_init__(self) -> None:
        kinds = get_args(ScheduleKind)
        if self.kind not in kinds:
            raise PlanError(
                f"schedule: kind={show(self.kind)} must be one of {', '.join(kinds)}; "
                f"{nearest(self.kind, kinds, otherwise='choose one of them')}"
            )
        for key, known in _KINDS_OF_KEY.items():
            value = getattr(self, key)
            if value not in (None, False) and self.kind not in known:
                *others, last = known
                kinds_of_key = f"{', '.join(others)} or {last}"
                raise LayoutError(
                    f"schedule: {key}={show(value)} must go with kind={kinds_of_key}, "
                    f"not {self.kind}; remove the key or change the kind"
                )
        for key, otherwise in (("encoder_group", "the default"), ("max_live", "no bound")):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise LayoutError(
                    f"schedule: {key}={value} must be >= 1; "
                    f"give a positive number, or remove the key for {otherwise}"
                )

    def group_size(self, num_microbatches: int) -> int:
        """Microbatches of one encoder task in a step of ``num_microbatches``."""
        default = num_microbatches if self.kind == "colocated" else 1
        return min(self.encoder_group or default, num_microbatches)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A complete, consistent plan.

    Args:
        world_size: Ranks of the run; ranks without a module stay idle.
        global_batch_size: Samples of one step.
        micro_batch_size: Samples of one microbatch of one replica of the language model.
        modules: Placement of every module by name, kept sorted; ``"language"`` is one of them.
        edges: Pairs of source and destination module: ``[[vision, language]]``;
            ``[language, generator]`` for an output.
        schedule: Order of work.
        predicted: What the planner expects, kept as it is; without influence on running.
        inputs: What the planner was given, kept as it is; without influence on running.

    Raises:
        LayoutError: The parts contradict each other.
        PlanError: The plan needs a feature that this version lacks.
    """

    world_size: int
    global_batch_size: int
    micro_batch_size: int
    modules: Mapping[str, ModulePlacement]
    edges: tuple[tuple[str, str], ...] = ()
    schedule: ScheduleChoice
    predicted: Mapping[str, Any] | None = None
    inputs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        assert all(name == placement.name for name, placement in self.modules.items())
        object.__setattr__(self, "modules", dict(sorted(self.modules.items())))
        check_plan(self)
        refuse_unsupported(self)

    @property
    def language(self) -> ModulePlacement:
        """Placement of the language model."""
        return self.modules["language"]

    @property
    def encoders(self) -> tuple[str, ...]:
        """Sorted names of the modules beside the language model."""
        return tuple(name for name in self.modules if name != "language")

    @property
    def outputs(self) -> tuple[str, ...]:
        """Sorted names of the modules that the language model feeds."""
        return tuple(sorted(end for source, end in self.edges if source == LANGUAGE))

    @property
    def num_microbatches(self) -> int:
        """Microbatches of one step."""
        samples = self.micro_batch_size * self.language.data_parallel_size
        return self.global_batch_size // samples

    def modules_of(self, rank: int) -> tuple[str, ...]:
        """Sorted names of the modules on a rank; none if it is idle."""
        return tuple(name for name, module in self.modules.items() if rank in module.ranks)

    def digest(self) -> str:
        """SHA-256, in hexadecimal, of all that influences the run.

        Spelling, comments, defaults and the planner's own notes do not change it.
        """
        content = asdict(self)
        del content["predicted"], content["inputs"]
        for module in content["modules"].values():
            _leave_out(module, _LATER_MODULE_DEFAULTS)
        _leave_out(content["schedule"], _LATER_SCHEDULE_DEFAULTS)
        canonical = json.dumps({"format": FORMAT, **content}, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads and checks a plan file.

        Raises:
            PlanError: The file is unreadable or not of the form, or needs a later version.
            LayoutError: Its parts contradict each other.
        """
        try:
            source = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise PlanError(
                f"{path}: file must be readable text ({reason}); give the path of a plan file"
            ) from None
        return cls.loads(source, where=str(path))

    @classmethod
    def loads(cls, source: str, where: str) -> Self:
        """Reads and checks the text of a plan file.

        Args:
            source: YAML.
            where: Name of the file in messages.

        Raises:
            PlanError: The text is not of the form, or needs a later version.
            LayoutError: Its parts contradict each other.
        """
        try:
            return cls._of_fields(read_plan_fields(source))
        except (PlanError, LayoutError) as error:
            raise type(error)(f"{where}: {error}") from None

    def with_layout(self, written: Mapping[Any, Any], *, where: str) -> Self:
        """Another layout of the same modules for the same batch, as ``layout_notes`` wrote it.

        Args:
            written: Keys of a plan file.
            where: Name of the keys in messages.

        Raises:
            PlanError: A key is unknown, missing or mistyped.
            LayoutError: The parts contradict each other.
        """
        same = {
            "format": FORMAT,
            "world_size": self.world_size,
            "global_batch_size": self.global_batch_size,
            "edges": [list(edge) for edge in self.edges],
        }
        try:
            return self._of_fields(plan_fields({**same, **written}))
        except (PlanError, LayoutError) as error:
            raise type(error)(f"{where}: {error}") from None

    @classmethod
    def _of_fields(cls, read: Mapping[str, Any]) -> Self:
        return cls(**{**read, "schedule": ScheduleChoice(**read["schedule"])})

    def layout_notes(self) -> dict[str, Any]:
        """The keys of a plan file in which layouts of the same modules and batch differ."""
        return {
            "micro_batch_size": self.micro_batch_size,
            "modules": written_modules(self.modules),
            "schedule": self._written_schedule(),
        }

    def _written_schedule(self) -> dict[str, Any]:
        written = {
            field.name: value
            for field in fields(self.schedule)
            if (value := getattr(self.schedule, field.name)) not in (None, False)
        }
        if self.schedule.order is not None:
            written["order"] = dict(self.schedule.order)
        return written

    def to_yaml(self) -> str:
        """Text of the plan file: ranks as spans, keys with default values left out."""
        written = {
            "world_size": self.world_size,
            "global_batch_size": self.global_batch_size,
            "micro_batch_size": self.micro_batch_size,
            "modules": self.modules,
            "edges": [list(edge) for edge in self.edges] or None,
            "schedule": self._written_schedule(),
            "predicted": self.predicted,
            "inputs": self.inputs,
        }
        return write_plan_fields(
            {key: value for key, value in written.items() if value is not None}
        )

    def write(self, path: str | Path) -> None:
        """Writes the plan file."""
        Path(path).write_text(self.to_yaml(), encoding="utf-8")


def _leave_out(content: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    for key, default in defaults.items():
        if content[key] == default:
            del content[key]


def check_world_size(plan: Plan, launched: int, *, where: str = "plan") -> None:
    """Checks that as many ranks were launched as the plan places.

    Args:
        plan: The plan.
        launched: Ranks of the run.
        where: Name of the plan file in messages.

    Raises:
        LayoutError: The numbers differ.
    """
    if launched != plan.world_size:
        raise LayoutError(
            f"{where}: world_size={plan.world_size} must equal the {launched} launched ranks; "
            f"launch {plan.world_size} ranks or plan for {launched}"
        )
