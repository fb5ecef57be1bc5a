from dataclasses import replace

from megatron_mosaic.cluster.shipped import load_cluster
from megatron_mosaic.cost.cost_model import CostModel
from megatron_mosaic.cost.layer_split import even_split, split_runs
from megatron_mosaic.cost.sizes import ParallelSizes
from megatron_mosaic.model.shipped import load_model


def test_even_split_gives_what_is_left_over_to_the_first_stages():
    assert even_split(7, 3) == (3, 2, 2)


def test_runs_are_cut_where_stages_end():
    runs = [(3, "dense"), (0, "none"), (2, "expert")]

    assert split_runs(runs, [2, 0, 3]) == [
        ((2, "dense"),),
        (),
        ((1, "dense"), (2, "expert")),
    ]


def test_frozen_stage_has_a_backward_pass_behind_a_trained_one_alone():
    llava = load_model("llava-1.5-7b")
    frozen = replace(llava.modules["language"], trainable=())
    backward_s = []
    for before in (llava.modules["vision"], replace(llava.modules["vision"], trainable=())):
        model = replace(llava, modules={**llava.modules, "vision": before, "language": frozen})
        costs = CostModel(model, load_cluster("h100"))
        module = costs.module("language", ParallelSizes(pp=2), samples=1.0)
        backward_s.append([stage.backward_s for stage in costs.stages(module)])

    behind_trained, behind_frozen = backward_s
    assert all(seconds > 0 for seconds in behind_trained)
    assert behind_frozen == [0.0, 0.0]
