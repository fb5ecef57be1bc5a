"""Finds the best plan for a model on a cluster, and says why."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mosaic.errors import PlanError

if TYPE_CHECKING:
    from megatron_mosaic.layout.plan import Plan
    from megatron_mosaic.planner.explanation import Explanation
    from megatron_mosaic.planner.problem import Problem
    from megatron_mosaic.planner.simulated import Simulated

EXAMPLE = "megatron-mosaic plan qwen2.5-vl-72b h100 --gpus 128 --global-batch-size 256 -o plan.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("model", nargs="?", help="shipped model, or a model file")
    parser.add_argument(
        "--from",
        dest="former",
        type=Path,
        metavar="PLAN",
        help="plan anew for --gpus what this plan is for: its model, cluster and batch, unless "
        "they are given",
    )
    parser.add_argument("cluster", nargs="?", help="shipped cluster, or a cluster file")
    parser.add_argument("--gpus", type=int, help="GPUs of the run; default: all of the cluster")
    parser.add_argument("--global-batch-size", type=int, help="samples of a step")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="fix a field, such as language.tensor_model_parallel_size=8 or micro_batch_size=1",
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        default=20.0,
        metavar="S",
        help="search at most so long, then take the best so far; default: 20",
    )
    parser.add_argument("--top", type=int, default=3, help="plans to show; default: 3")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("-o", "--output", type=Path, metavar="PLAN", help="write the plan file")


def run(args: argparse.Namespace) -> None:
    """Plans and prints; without a model or a former plan, says what there is."""
    if args.model is None and args.former is None:
        print(_shipped())
        return
    from megatron_mosaic.planner.explanation import as_document, explain
    from megatron_mosaic.planner.planner import make_plan

    former = None if args.former is None else _fill_from_former(args)
    answer = make_plan(
        _problem(args), top=_at_least_one("top", args.top), time_limit_s=args.time_limit
    )
    plan = _with_given(answer.plan(), args)
    changed = () if former is None else _changes(former, plan, answer.problem, args)
    explanation = explain(answer)
    if args.json:
        document = as_document(explanation) | ({"changes": list(changed)} if changed else {})
        print(json.dumps(document, indent=1))
    else:
        print("\n".join((_text(explanation), *(("", *changed) if changed else ()))))
    if args.output is not None:
        plan.write(args.output)
        if not args.json:
            print(f"\nwritten to {args.output}")


def _fill_from_former(args: argparse.Namespace) -> "Plan":
    """Takes from a former plan what is not given; returns that plan."""
    from megatron_mosaic.layout.plan import Plan
    from megatron_mosaic.planner.replan import former_cluster, former_model

    if args.gpus is None:
        raise PlanError(f"plan: --gpus must be given with --from {args.former}; add what is left")
    former, where = Plan.load(args.former), str(args.former)
    args.model = args.model or former_model(former, where=where)
    args.cluster = args.cluster or former_cluster(former, where=where)
    args.global_batch_size = args.global_batch_size or former.global_batch_size
    return former


def _with_given(plan: "Plan", args: argparse.Namespace) -> "Plan":
    """Notes in a plan what it was made from, by name."""
    from megatron_mosaic.planner.replan import GIVEN, given_inputs

    given = given_inputs(model=args.model, cluster=args.cluster, pins=args.set)
    return replace(plan, inputs={**(plan.inputs or {}), GIVEN: given})


def _changes(
    former: "Plan", plan: "Plan", problem: "Problem", args: argparse.Namespace
) -> tuple[str, ...]:
    from megatron_mosaic.planner.replan import changes

    head = f"In place of {args.former}:"
    return (head, *changes(former, plan, model=problem.model, pins=args.set))


def _shipped() -> str:
    from megatron_mosaic.cluster.shipped import shipped_clusters
    from megatron_mosaic.model.shipped import shipped_models

    return "\n".join(
        (
            f"models:   {', '.join(shipped_models())}",
            f"clusters: {', '.join(shipped_clusters())}",
            f"example:  {EXAMPLE}",
        )
    )


def _problem(args: argparse.Namespace) -> "Problem":
    from megatron_mosaic.cluster.shipped import cluster_of_size
    from megatron_mosaic.model.shipped import load_model
    from megatron_mosaic.planner.problem import Problem, read_pins

    if args.cluster is None:
        raise PlanError(f"plan: cluster must be given; write for example '{EXAMPLE}'")
    if args.global_batch_size is None:
        raise PlanError("plan: --global-batch-size must be given; add samples of a step")
    model = load_model(args.model)
    cluster = cluster_of_size(args.cluster, num_gpus=args.gpus)
    return Problem(
        model=model,
        cluster=cluster,
        num_gpus=cluster.num_gpus if args.gpus is None else args.gpus,
        global_batch_size=args.global_batch_size,
        pins=read_pins(_pins(args.set), model=model),
    )


def _pins(written: Sequence[str]) -> dict[str, str]:
    pins = {}
    for text in written:
        field, equals, value = text.partition("=")
        if not equals or not value:
            raise PlanError(f"set: {text} must be a field and its value; write FIELD=VALUE")
        pins[field] = value
    return pins


def _at_least_one(field: str, value: int) -> int:
    if value < 1:
        raise PlanError(f"plan: {field}={value} must be >= 1; give the number of plans to show")
    return value


def _text(explanation: "Explanation") -> str:
    from megatron_mosaic.planner.explanation import robustness

    answer = explanation.answer
    entries = [(str(place), entry) for place, entry in enumerate(answer.best, 1)]
    if answer.baseline is not None:
        entries.append(("homogeneous", answer.baseline))
    problem, found = answer.problem, answer.found
    bound = "this is the optimum of the space"
    if found.gap:
        bound = f"the time limit ended the search, at most {found.gap:.1%} from the optimum"
    lines = [
        f"{problem.model.name} on {problem.num_gpus} GPUs of {problem.cluster.name}, "
        f"{problem.global_batch_size} samples a step",
        f"{found.num_language} layouts of language compared, {found.num_estimates} plans "
        f"estimated; under the schedules of the search none takes less than {found.bound_s:.4g} s: "
        f"{bound}",
        "",
        _steps(entries),
        "",
        _layouts(entries),
        "",
        _memory(entries),
        "",
        *explanation.sentences,
        "",
        *robustness(explanation),
    ]
    return "\n".join(lines)


def _steps(entries: "Sequence[tuple[str, Simulated]]") -> str:
    unequal = any(entry.step.breakdown.imbalance_s for _, entry in entries)
    heads = ("communication", "bubble", "sync", "optimizer", "GiB")
    rows: list[Sequence[str]] = [
        ("plan", "step s", "compute", *(("imbalance",) if unequal else ()), *heads)
    ]
    for label, entry in entries:
        breakdown = entry.step.breakdown
        times = (
            entry.step_s,
            breakdown.compute_s,
            *((breakdown.imbalance_s,) if unequal else ()),
            breakdown.communication_s,
            breakdown.bubble_s,
            breakdown.sync_s,
            breakdown.optimizer_s,
        )
        peak = f"{entry.step.peak_bytes / 2**30:.1f}"
        rows.append((label, *(f"{seconds:.4f}" for seconds in times), peak))
    return columns(rows)


def _layouts(entries: "Sequence[tuple[str, Simulated]]") -> str:
    from megatron_mosaic.planner.explanation import modules_text

    rows: list[Sequence[str]] = [("plan", "placement", "schedule", "module", "sizes")]
    for label, entry in entries:
        candidate = entry.candidate
        schedule = f"{candidate.kind} mbs {candidate.micro_batch_size}"
        if candidate.kind in ("colocated", "bubble_fill", "concurrent"):
            schedule += f" group {candidate.encoder_group}"
        schedule += " ahead" if candidate.ahead else ""
        start = (label, candidate.placement, schedule)
        for name, text in modules_text(entry).items():
            rows.append((*start, name, text))
            start = ("", "", "")
    return columns(rows)


def _memory(entries: "Sequence[tuple[str, Simulated]]") -> str:
    """Memory of the choice by term; of equal kinds of ranks the first."""
    from megatron_mosaic.planner.explanation import hosted_text

    memory = entries[0][1].step.memory
    rows: list[Sequence[str]] = [("rank of", *next(iter(memory.values())), "GiB")]
    seen = set()
    for hosted, terms in memory.items():
        shown = tuple(f"{held / 2**30:.2f}" for held in (*terms.values(), sum(terms.values())))
        if shown not in seen:
            rows.append((hosted_text(hosted), *shown))
        seen.add(shown)
    return columns(rows)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a table."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
