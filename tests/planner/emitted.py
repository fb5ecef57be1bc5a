"""Plans that other programs take, and what is written for them."""

import shlex

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.planner.emit.emission import Launch
from megatron_mosaic.planner.emit.formats import emit

LANGUAGE = """\
format: 1
world_size: 8
global_batch_size: 64
micro_batch_size: 2
modules:
  language:
    ranks: 0-7
    tensor_model_parallel_size: 2
    pipeline_model_parallel_size: 2
    data_parallel_size: 2
    sequence_parallel: true
    recompute: full
schedule: {kind: 1f1b}
"""

HOMOGENEOUS = """\
format: 1
world_size: 8
global_batch_size: 64
micro_batch_size: 2
modules:
  language:
    ranks: 0-7
    tensor_model_parallel_size: 2
    pipeline_model_parallel_size: 2
    data_parallel_size: 2
    layers_per_stage: [14, 18]
  vision:
    ranks: 0-3
    tensor_model_parallel_size: 2
    data_parallel_size: 2
    trainable: [projector]
edges: [[vision, language]]
schedule: {kind: colocated, encoder_group: 1}
"""

DISJOINT = """\
format: 1
world_size: 16
global_batch_size: 64
micro_batch_size: 2
modules:
  vision: {ranks: 0-3, tensor_model_parallel_size: 2, data_parallel_size: 2}
  language:
    ranks: 4-15
    tensor_model_parallel_size: 2
    pipeline_model_parallel_size: 3
    data_parallel_size: 2
edges: [[vision, language]]
schedule: {kind: 1f1b}
"""

SEQUENCE_PARALLEL = DISJOINT.replace(
    "pipeline_model_parallel_size: 3",
    "pipeline_model_parallel_size: 3\n    sequence_parallel: true",
)


def emitted(form, source, *, gpus_per_node=8):
    launch = Launch(plan_path="plan.yaml", script="pretrain_vlm.py", gpus_per_node=gpus_per_node)
    return emit(Plan.loads(source, where="plan.yaml"), form=form, launch=launch)


def words_of(text):
    return shlex.split(text.replace("\\\n", " "))


def interleaved(source, layers=""):
    virtual = f"    virtual_pipeline_model_parallel_size: 2\n{layers}"
    language, _, rest = source.partition("schedule:")
    edges = ""
    if "edges:" in language:
        language, _, edges = language.partition("edges:")
        edges = f"edges:{edges}"
    return f"{language}{virtual}{edges}schedule:{rest}".replace("1f1b", "interleaved")


def split_into(layers):
    source = LANGUAGE.replace("pipeline_model_parallel_size: 2", "pipeline_model_parallel_size: 4")
    return source.replace("data_parallel_size: 2", f"layers_per_stage: {layers}")
