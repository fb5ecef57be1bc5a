from types import SimpleNamespace

from megatron_mosaic.layout.placement import ModulePlacement
from tests.ranks import run_ranks

# Four stages on a pipeline of ranks 5 and 4, in two replicas: stage s of replica 1 (ranks 7, 6).
PLACEMENT = ModulePlacement(
    name="language",
    ranks=(5, 7, 4, 6),
    data_parallel_size=2,
    pipeline_model_parallel_size=2,
    virtual_pipeline_model_parallel_size=2,
)


def _stages(rank, host):
    from megatron_mosaic.host.groups import ModuleGroups

    groups = ModuleGroups(
        placement=PLACEMENT,
        position=PLACEMENT.coordinates(host),
        expert_position=PLACEMENT.expert_coordinates(host),
        collection=SimpleNamespace(pp="group of the pipeline's ranks", tp="tp"),
    )
    return [
        (
            each.stage,
            each.is_first_stage,
            each.is_last_stage,
            each.collection.pp.rank(),
            each.collection.pp.ranks,
            each.collection.tp,
        )
        for each in groups.of_stages()
    ]


def test_stages_of_a_rank_see_a_pipeline_of_all_stages():
    # Stage s lies on pipeline place s % 2.
    pipeline = (7, 6, 7, 6)

    assert run_ranks(_stages, 1, 7)[0] == [
        (0, True, False, 0, pipeline, "tp"),
        (2, False, False, 2, pipeline, "tp"),
    ]
    assert run_ranks(_stages, 1, 6)[0] == [
        (1, False, False, 1, pipeline, "tp"),
        (3, False, True, 3, pipeline, "tp"),
    ]


def _first_of_replicas(rank, placement):
    from megatron_mosaic.host.groups import ModuleGroups

    groups = {
        host: ModuleGroups(
            placement=placement,
            position=placement.coordinates(host),
            expert_position=placement.expert_coordinates(host),
            collection=SimpleNamespace(),
        )
        for host in placement.ranks
    }
    return [host for host, own in groups.items() if own.is_first_of_replica]


def test_one_rank_of_each_replica_saves_its_loader():
    # tp-cp-dp-pp, fastest first: replicas are {0, 1, 2, 3, 8, ...} and {4, 5, 6, 7, 12, ...}.
    placement = ModulePlacement(
        name="language",
        ranks=tuple(range(16)),
        tensor_model_parallel_size=2,
        context_parallel_size=2,
        data_parallel_size=2,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
    )

    assert run_ranks(_first_of_replicas, 1, placement) == [[0, 4]]


def _ask_parallel_state(rank):
    from megatron.core import parallel_state

    from megatron_mosaic.comm.groups import GroupFactory
    from megatron_mosaic.host.groups import StageGroup, lone_collection
    from megatron_mosaic.host.parallel_state_scope import ParallelStateScope

    collection = lone_collection(GroupFactory(rank).alone(1))
    collection.pp = StageGroup(1, (0, 0, 0))
    with ParallelStateScope(collection).active():
        inside = (
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.is_pipeline_first_stage(),
            parallel_state.is_pipeline_last_stage(),
        )
    return inside, parallel_state.is_initialized()


def test_scripts_that_ask_parallel_state_see_the_stage():
    assert run_ranks(_ask_parallel_state, 1) == [((1, 3, False, False), False)]
