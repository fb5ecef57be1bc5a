"""What Megatron's multi-module optimizer asks of a layout."""

from collections.abc import ItemsView, Iterator, Mapping
from copy import deepcopy
from typing import cast

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

_FIELD_OF_DIMS: dict[tuple[str, ...], str] = {
    # Upstream tells the replicas of what it saves by this one alone, and context-parallel ranks are
    # replicas too; nothing else asks for it.
    ("dp",): "dp_cp",
    ("dp", "cp"): "dp_cp",
    ("tp",): "tp",
    ("pp",): "pp",
    ("tp", "pp"): "mp",
    ("expt_tp", "ep", "pp"): "tp_ep_pp",
    ("expt_dp",): "expt_dp",
    ("tp", "cp", "dp", "pp"): "intra_dist_opt",
}


class ModuleGrid:
    """Stands where ``get_mimo_optimizer`` expects a ``HyperCommGrid``.

    Upstream's grid knows contiguous ranks only; the optimizer asks it no more than this.

    Args:
        collection: Groups over the stages that train; None where nothing is to be optimized.
    """

    def __init__(self, collection: ProcessGroupCollection | None) -> None:
        self._collection = collection

    def is_current_rank_in_grid(self) -> bool:
        """Whether this rank optimizes the module: something in its stage of it trains.

        Megatron's optimizer of a stage without trainable weights cannot be saved.
        """
        return self._collection is not None

    def get_pg(self, dims: str | list[str], view: str | None = None) -> dist.ProcessGroup | None:
        """Returns the group along some axes, by the axes' names in upstream's grid."""
        assert self._collection is not None
        key = (dims,) if isinstance(dims, str) else tuple(dims)
        return getattr(self._collection, _FIELD_OF_DIMS[key])


class GridMap(dict[str, ModuleGrid]):
    """Modules by name, with equal world collectives on every rank while it is iterated.

    ``get_megatron_optimizer`` gathers objects over the whole world, and ``get_mimo_optimizer``
    calls it once for each module of the rank: ranks with different modules would gather
    different things, or wait forever. For a module that a rank does not host it therefore builds
    the optimizer of an empty model, through the same calls, and forgets it.
    """

    def __init__(
        self,
        grids: Mapping[str, ModuleGrid],
        *,
        optimizer_config: OptimizerConfig,
        ddp_config: DistributedDataParallelConfig,
        alone: ProcessGroupCollection,
    ) -> None:
        super().__init__(grids)
        self._optimizer_config = optimizer_config
        self._ddp_config = ddp_config
        self._alone = alone

    def items(self) -> ItemsView[str, ModuleGrid]:
        """Yields the modules by name, after the collectives of those that are not here."""
        return cast(ItemsView[str, ModuleGrid], self._balanced())

    def _balanced(self) -> Iterator[tuple[str, ModuleGrid]]:
        for name in sorted(self):
            yield name, self[name]
            if not self[name].is_current_rank_in_grid():
                self._build_empty_optimizer()

    def _build_empty_optimizer(self) -> None:
        config = TransformerConfig(num_layers=1, hidden_size=1, num_attention_heads=1)
        empty = DistributedDataParallel(
            config,
            deepcopy(self._ddp_config),
            MegatronModule(config=config),
            pg_collection=self._alone,
        )
        get_megatron_optimizer(
            config=self._optimizer_config,
            model_chunks=[empty],
            pg_collection=self._alone,
            use_gloo_process_groups=False,
        )
