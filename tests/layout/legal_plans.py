"""Random plans that every rule allows."""

from hypothesis import strategies as st

from megatron_mosaic.layout.attention import AttentionPlan
from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.plan import Plan, ScheduleChoice

_SIZES = st.integers(1, 3)
_PARTS = st.none() | st.lists(
    st.sampled_from(["projector", "on", "3", "a: b", "*.bias"]), unique=True
).map(tuple)
_RECOMPUTE = st.sampled_from([None, "selective", "full"])
_MASKS = st.sampled_from(
    ["causal", "prefix_lm", "encoder_prepended", "encoder_embedded", "multimodal_packed"]
)
_NOTES = st.none() | st.dictionaries(
    st.text(max_size=4),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner),
        max_leaves=4,
    ),
    max_size=3,
)


@st.composite
def legal_plans(draw):
    kind = draw(st.sampled_from(["no_pipelining", "1f1b", "colocated"]))
    with_encoder = kind == "colocated" or draw(st.booleans())
    language_size = {
        "tensor_model_parallel_size": draw(_SIZES),
        "context_parallel_size": draw(st.integers(1, 2)),
        "data_parallel_size": draw(_SIZES),
        "pipeline_model_parallel_size": 1 if kind == "no_pipelining" else draw(_SIZES),
    }
    vision_size = {
        "tensor_model_parallel_size": draw(_SIZES),
        "data_parallel_size": draw(_SIZES),
    }
    num_language, num_vision = _product(language_size), _product(vision_size)
    world_size = num_language + num_vision + draw(st.integers(0, 3))
    ranks = draw(st.permutations(range(world_size)) | st.just(list(range(world_size))))
    stages = language_size["pipeline_model_parallel_size"]
    layers = st.lists(st.integers(1, 40), min_size=stages, max_size=stages).map(tuple)
    language = ModulePlacement(
        name="language",
        ranks=tuple(ranks[:num_language]),
        **language_size,
        sequence_parallel=language_size["tensor_model_parallel_size"] > 1 and draw(st.booleans()),
        trainable=draw(_PARTS) or None,
        layers_per_stage=draw(st.none() | layers),
        expert_model_parallel_size=draw(st.sampled_from([1, language_size["data_parallel_size"]])),
        expert_tensor_parallel_size=draw(st.sampled_from([None, 1])),
        recompute=draw(_RECOMPUTE),
        attention=draw(st.none() | _attention(language_size["context_parallel_size"])),
    )
    # With 1f1b the encoder starts behind the language ranks, otherwise anywhere.
    first = num_language if kind == "1f1b" else draw(st.integers(0, num_language))
    vision = ModulePlacement(
        name="vision",
        ranks=tuple(ranks[first : first + num_vision]),
        **vision_size,
        trainable=draw(_PARTS),
        recompute=draw(_RECOMPUTE),
        items=draw(st.sampled_from(["in_order", "balanced"])),
    )
    group, num_groups, micro_batch_size = draw(_SIZES), draw(_SIZES), draw(_SIZES)
    return Plan(
        world_size=world_size,
        global_batch_size=group * num_groups * micro_batch_size * language.data_parallel_size,
        micro_batch_size=micro_batch_size,
        modules={"vision": vision, "language": language}
        if with_encoder
        else {"language": language},
        edges=(("vision", "language"),) if with_encoder else (),
        schedule=ScheduleChoice(
            kind=kind,
            encoder_group=group if kind == "colocated" and draw(st.booleans()) else None,
        ),
        predicted=draw(_NOTES),
        inputs=draw(_NOTES),
    )


def _attention(cp):
    tokens = ["balanced", "local", "zigzag"] if cp > 1 else ["balanced"]
    keys = ["auto", "blocks", "all_gather"] if cp > 1 else ["auto"]
    return st.builds(
        AttentionPlan, mask=_MASKS, tokens=st.sampled_from(tokens), keys=st.sampled_from(keys)
    )


def _product(sizes):
    product = 1
    for size in sizes.values():
        product *= size
    return product
