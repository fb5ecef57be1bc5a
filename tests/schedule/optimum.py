"""Shortest makespan of few tasks, found by trying all orders."""

from megatron_mosaic.schedule.list_scheduling import Work, best_sequence, tails_s


def shortest_s(work: Work) -> float:
    """Makespan below which no order of the tasks is, to 1e-9.

    Of the tasks that could end first one is picked; it, or one that takes a machine from it and
    can start before it ends, comes next. All that are left run through this tree, unless already
    their longest way, or a machine's work, reaches the shortest makespan found.

    Source:
        Giffler and Thompson, 1960, Operations Research 8(4): active schedules.
    """
    best_s = best_sequence(work, max_lists=1).makespan_s
    tails = tails_s(work)
    before = work.before

    def least_s(ends_s: dict[int, float], free_s: list[float], heads: dict[int, float]) -> float:
        left = [task for task in range(len(before)) if task not in ends_s]
        ways = [heads[task] + tails[task] for task in left if task in heads]
        loads = [
            max(free_s[m], min(heads.get(task, 0.0) for task in own))
            + sum(work.length_s[task] for task in own)
            + min(tails[task] - work.length_s[task] for task in own)
            for m in range(work.num_machines)
            if (own := [task for task in left if m in work.machines[task]])
        ]
        return max([*ends_s.values(), *ways, *loads], default=0.0)

    def search(ends_s: dict[int, float], free_s: list[float]) -> None:
        nonlocal best_s
        heads = {
            task: max(
                [free_s[m] for m in work.machines[task]]
                + [ends_s[other] + lag_s for other, lag_s in before[task]]
            )
            for task in range(len(before))
            if task not in ends_s and all(other in ends_s for other, _ in before[task])
        }
        found_s = least_s(ends_s, free_s, heads)
        if found_s > best_s - 1e-9:
            return
        if not heads:
            best_s = found_s
            return
        first = min(heads, key=lambda task: heads[task] + work.length_s[task])
        until_s = heads[first] + work.length_s[first]
        rivals = [
            task
            for task in heads
            if task == first
            or (set(work.machines[task]) & set(work.machines[first]) and heads[task] < until_s)
        ]
        for task in sorted(rivals, key=lambda task: -tails[task]):
            end_s = heads[task] + work.length_s[task]
            free = [end_s if m in work.machines[task] else t for m, t in enumerate(free_s)]
            search({**ends_s, task: end_s}, free)

    search({}, [0.0] * work.num_machines)
    return best_s
