"""Makes a script's data set provider one that reads by module."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.training.global_vars import get_args
from megatron.training.utils import print_rank_0

from megatron_mosaic.errors import HostError
from megatron_mosaic.host.data.facts import FactsLayout, SampleFacts, documents_of
from megatron_mosaic.host.data.items import ItemDeal, StepOwners, deal_step, item_deals
from megatron_mosaic.host.data.loaders import LoaderSource
from megatron_mosaic.host.data.position import PlacedReader, Position, find_position
from megatron_mosaic.host.data.reader import StepReader, StepSource
from megatron_mosaic.host.data.replica import as_replica
from megatron_mosaic.host.data.samples import SampleSource, reads_items
from megatron_mosaic.host.data.shares import StepShares, step_shares
from megatron_mosaic.host.data.unreadable import Allowance
from megatron_mosaic.host.families.family import ModuleBoundary
from megatron_mosaic.host.groups import lone_collection
from megatron_mosaic.host.runtime import Runtime
from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.schedule.build import build_schedule

DatasetProvider = Callable[..., tuple[Any, Any, Any]]


@dataclass(frozen=True, kw_only=True)
class ReadingByModule:
    """Stands for a script's provider; gives iterators over this rank's share of each step.

    The script's provider is called on every rank, also on idle ones. If it returns data sets,
    which map their files without reading them, once: ranks take the samples of their tasks by
    index. If it returns loaders, once for each language replica whose samples the rank reads,
    with ``parallel_state`` telling that replica's data-parallel rank.

    Args:
        provider: The script's.
        runtime: This rank's.
    """

    provider: DatasetProvider
    runtime: Runtime
    is_distributed: bool = True

    def __call__(self, num_samples: list[int]) -> tuple[Any, Any, Any]:
        """Builds iterators of training, validation and test steps; None where there is no data.

        Raises:
            HostError: There are several validation sets, or loaders cannot be resumed.
        """
        args = get_args()
        args.dataloader_type = "external"
        shares = [
            self._shares(args.global_batch_size, training=True),
            *[self._shares(args.eval_global_batch_size, training=False)] * 2,
        ]
        replicas = sorted({each for share in shares for each in share.replicas_read()}) or [0]
        built = {replicas[0]: self._build(replicas[0], num_samples)}
        if not all(each is None or _is_map_style(each) for each in built[replicas[0]]):
            built |= {replica: self._build(replica, num_samples) for replica in replicas[1:]}
        consumed = (args.consumed_train_samples, args.consumed_valid_samples, 0)
        train, valid, test = (
            self._reader(
                {replica: sets[which] for replica, sets in built.items()},
                shares[which],
                first=consumed[which],
                training=which == 0,
            )
            for which in range(3)
        )
        return train, valid, test

    def _build(self, replica: int, num_samples: list[int]) -> tuple[Any, ...]:
        replicas = self.runtime.plan.language.data_parallel_size
        lone = lone_collection(self.runtime.alone)
        with as_replica(replica, num_replicas=replicas, lone=lone):
            return tuple(_only(each) for each in self.provider(num_samples))

    def _shares(self, samples: int, *, training: bool) -> StepShares:
        args, plan = get_args(), self.runtime.plan
        per_microbatch = args.micro_batch_size * plan.language.data_parallel_size
        schedule = build_schedule(
            plan, num_microbatches=samples // per_microbatch, forward_only=not training
        )
        return step_shares(
            schedule,
            self.runtime.hosted,
            language=plan.language,
            samples_per_replica=args.micro_batch_size,
        )

    def _reader(
        self, data: Mapping[int, Any], shares: StepShares, *, first: int, training: bool
    ) -> StepReader | None:
        any_replica = next(iter(data.values()))
        if any_replica is None:
            return None
        expected: Sequence[SampleFacts] | None = None
        layout = self._facts_layout()
        args = get_args()
        if _is_map_style(any_replica):
            source: StepSource = SampleSource(
                any_replica,
                shares=shares,
                boundaries=self._boundaries(),
                first_sample=first,
                num_workers=args.num_workers,
                allowance=Allowance(args.mosaic_max_unreadable_samples, rank=self.runtime.rank),
                ignores_signal=args.exit_signal if args.exit_signal_handler else None,
            )
        else:
            # Loaders of evaluation begin anew with the run, as without a plan.
            position = Position()
            if training:
                position = find_position(args, num_replicas=shares.language_replicas, layout=layout)
            expected = position.expected
            source = self._loader_source(data, shares, position=position, training=training)
        return PlacedReader(
            source,
            first_sample=first,
            num_samples=shares.num_samples,
            layout=layout,
            group=self.runtime.data_group,
            expected=expected,
            hands_ahead=training and bool(build_schedule(self.runtime.plan).ahead),
            deal=self._deal(shares, any_replica, training=training),
        )

    def _deal(
        self, shares: StepShares, data: Any, *, training: bool
    ) -> Callable[[Sequence[SampleFacts]], StepOwners] | None:
        """Returns what deals the items of a step; None if the plan asks for none of that."""
        runtime = self.runtime
        schedule = build_schedule(
            runtime.plan, num_microbatches=shares.num_microbatches, forward_only=not training
        )
        costs = {name: facts.item_cost for name, facts in runtime.row_facts.items()}
        deals = item_deals(runtime.plan, schedule, costs)
        if not deals:
            return None
        if training and not reads_items(data):
            _tell_of_dropped_items(data, deals)
        return partial(deal_step, deals, microbatch_size=shares.microbatch_size)

    def _loader_source(
        self, data: Mapping[int, Any], shares: StepShares, *, position: Position, training: bool
    ) -> LoaderSource:
        saves = training and bool(getattr(get_args(), "dataloader_save", None))
        return LoaderSource(
            {replica: data[replica] for replica in shares.replicas_read()},
            shares=shares,
            boundaries=self._boundaries(),
            skipped=position.skipped,
            saved_replica=self._saved_replica() if saves else None,
        )

    def _saved_replica(self) -> int | None:
        """Language replica for which this rank saves the loader's state: as its first rank."""
        groups = self.runtime.hosted.get(LANGUAGE)
        return groups.position.dp if groups is not None and groups.is_first_of_replica else None

    def _boundaries(self) -> Mapping[str, ModuleBoundary]:
        return {name: runner.boundary for name, runner in self.runtime.modules.items()}

    def _facts_layout(self) -> FactsLayout:
        runtime = self.runtime
        return FactsLayout(
            sources=tuple(sorted({source for source, _ in runtime.plan.edges})),
            item_rows={
                source: runtime.row_facts[source].item.rows
                for source, destination in runtime.plan.edges
                if runtime.row_facts[destination].keeps_parts
            },
            sequence_length=runtime.row_facts[LANGUAGE].sequence_length,
            documents=documents_of(runtime.plan.language.attention),
        )


def _is_map_style(data: Any) -> bool:
    """Whether samples can be read by index: torch gives iterable data sets the method too."""
    by_index = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    return by_index and not isinstance(data, torch.utils.data.IterableDataset)


def _tell_of_dropped_items(data: Any, deals: Mapping[str, ItemDeal]) -> None:
    several = [name for name, deal in deals.items() if deal.cost.item_rows is not None]
    if several:
        print_rank_0(
            f"mosaic: ranks of {', '.join(several)} decode whole samples and drop the items of "
            f"other ranks; a data set with read_items(index, items) would decode no others, but "
            f"{type(data).__name__} has none"
        )


def _only(data: Any) -> Any:
    """Takes validation data out of the list in which scripts may give it.

    Raises:
        HostError: There are several.
    """
    if not isinstance(data, list):
        return data
    if len(data) != 1:
        raise HostError(
            f"data: validation sets={len(data)} must be 1 under a plan; blend them into one"
        )
    return data[0]
