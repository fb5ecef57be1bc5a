"""Points Megatron's global parallel state at one module's groups.

Upstream code that takes no process groups (``get_batch``'s ``broadcast_data``, a script's
``model_provider``, some layers) reads ``megatron.core.parallel_state``. Outside the scope these
globals stay unset, so that a stray reader fails loudly instead of using another module's group.
They are set as globals, not as context variables: autograd's device thread sees only globals.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import GlobalMemoryBuffer

from megatron_mosaic.host.groups import StageGroup

GROUP_GLOBALS: dict[str, str] = {
    "_TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "_PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "_MODEL_PARALLEL_GROUP": "mp",
    "_EMBEDDING_GROUP": "embd",
    "_POSITION_EMBEDDING_GROUP": "pos_embd",
    "_CONTEXT_PARALLEL_GROUP": "cp",
    "_TENSOR_AND_CONTEXT_PARALLEL_GROUP": "tp_cp",
    "_TENSOR_AND_DATA_PARALLEL_GROUP": "tp_dp_cp",
    "_TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": "tp_dp_cp",
    "_DATA_PARALLEL_GROUP": "dp",
    "_DATA_PARALLEL_GROUP_WITH_CP": "dp_cp",
    "_DATA_PARALLEL_GROUP_WITH_GTP_REMAT": "dp",
    "_DATA_PARALLEL_GROUP_WITH_CP_WITH_GTP_REMAT": "dp_cp",
    "_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP": "intra_dp_cp",
    "_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP_WITH_GTP_REMAT": "intra_dp_cp",
    "_INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "intra_dist_opt",
    "_GTP_WEIGHT_REMAT_GROUP": "gtp_remat",
    "_EXPERT_GTP_WEIGHT_REMAT_GROUP": "expt_gtp_remat",
    "_EXPERT_MODEL_PARALLEL_GROUP": "ep",
    "_EXPERT_TENSOR_PARALLEL_GROUP": "expt_tp",
    "_EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "tp_ep",
    "_EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP": "tp_ep_pp",
    "_EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP_WITH_EGTP": "tp_ep_pp",
    "_EXPERT_DATA_PARALLEL_GROUP": "expt_dp",
    "_EXPERT_DATA_PARALLEL_GROUP_WITH_GTP_REMAT": "expt_dp",
}

RANK_GLOBALS: dict[str, str] = {
    "_TENSOR_MODEL_PARALLEL_GLOBAL_RANKS": "tp",
    "_PIPELINE_GLOBAL_RANKS": "pp",
    "_MODEL_PARALLEL_GLOBAL_RANKS": "mp",
    "_CONTEXT_PARALLEL_GLOBAL_RANKS": "cp",
    "_DATA_PARALLEL_GLOBAL_RANKS": "dp",
    "_DATA_PARALLEL_GLOBAL_RANKS_WITH_CP": "dp_cp",
    "_EMBEDDING_GLOBAL_RANKS": "embd",
    "_POSITION_EMBEDDING_GLOBAL_RANKS": "pos_embd",
}


class ParallelStateScope:
    """Globals of one module, ready to be set around its tasks.

    Args:
        collection: The module's groups.
        memory_buffer: Scratch memory of its own. Megatron has one for the process, which only
            modules that run one after the other can share; None leaves it at that.
    """

    def __init__(
        self, collection: ProcessGroupCollection, *, memory_buffer: GlobalMemoryBuffer | None = None
    ) -> None:
        self._values: dict[str, object] = {
            name: getattr(collection, field) for name, field in GROUP_GLOBALS.items()
        }
        for name, field in RANK_GLOBALS.items():
            group = getattr(collection, field)
            self._values[name] = None if group is None else _ranks_of(group)
        stage: Any = collection.pp
        if isinstance(stage, StageGroup):
            # No process group knows this rank as a stage of its own: Megatron asks here first.
            self._values["_MPU_PIPELINE_MODEL_PARALLEL_RANK"] = stage.rank()
            self._values["_MPU_PIPELINE_MODEL_PARALLEL_WORLD_SIZE"] = stage.size()
        if memory_buffer is not None:
            self._values["_GLOBAL_MEMORY_BUFFER"] = memory_buffer

    @contextmanager
    def active(self) -> Iterator[None]:
        """Sets the globals, and puts the former ones back at the end."""
        former = {name: getattr(parallel_state, name) for name in self._values}
        vars(parallel_state).update(self._values)
        try:
            yield
        finally:
            vars(parallel_state).update(former)


def _ranks_of(group: Any) -> list[int]:
    if isinstance(group, StageGroup):
        return list(group.ranks)
    return dist.get_process_group_ranks(group)
