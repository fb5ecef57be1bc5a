"""Why tokens and items of a plan are where they are, in sentences."""

from collections.abc import Iterator
from dataclasses import replace

from megatron_mosaic.cost.context import ContextLoads, context_loads
from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.planner.planner import Answer
from megatron_mosaic.tokens.names import Method


def balance_sentences(answer: Answer) -> list[str]:
    """Says what evens out the loads of the chosen plan, and what would be without it."""
    return [*_tokens(answer), *_items(answer)]


def _tokens(answer: Answer) -> Iterator[str]:
    language, workload = answer.choice.candidate.language, answer.cost_model.workload
    if workload is None or language.cp == 1:
        return

    def loads(method: Method) -> ContextLoads:
        return context_loads(workload, cp=language.cp, method=method)

    chosen, zigzag = loads(language.tokens), loads("zigzag")
    length = float(chosen.lengths.mean())
    received = f"{chosen.received / length:.0%} of the keys"
    how = "every rank gathers all keys" if language.keys == "all_gather" else "keys come as blocks"
    sentence = (
        f"Under the mask {workload.mask} tokens are {_WORDS[language.tokens]} over "
        f"{language.cp} ranks: the slowest one computes {chosen.imbalance:.2f}x of the mean"
    )
    if language.tokens != "zigzag":
        sentence += f", zigzag would leave it at {zigzag.imbalance:.2f}x"
    yield f"{sentence}. It needs {received} from others; {how}, which is predicted to be faster."


_WORDS: dict[Method, str] = {
    "balanced": "balanced",
    "local": "kept together by document and balanced",
    "zigzag": "dealt in zigzag",
    "contiguous": "cut one after the other",
    "lpt": "dealt by cost alone",
}


def _items(answer: Answer) -> Iterator[str]:
    choice, plan = answer.choice, answer.choice.plan
    num_samples = plan.micro_batch_size * plan.language.data_parallel_size
    for encoder in choice.candidate.encoders:
        name, sizes = encoder.name, encoder.sizes
        if name == LANGUAGE or sizes.dp == 1 or not answer.cost_model.has_unlike_items(name):
            continue
        group = choice.estimate.modules[name].group
        samples = -(-num_samples * group // sizes.dp)
        orders = [replace(sizes, items=items) for items in ("in_order", "balanced")]
        before, after = (answer.cost_model.imbalance(name, o, samples=samples) for o in orders)
        if sizes.items == "balanced":
            yield (
                f"Items of {name} go to its {sizes.dp} replicas by cost: the slowest one computes "
                f"{after:.2f}x of the mean, with samples in order {before:.2f}x."
            )
        else:
            yield (
                f"Items of {name} stay in order: the slowest of its {sizes.dp} replicas computes "
                f"{before:.2f}x of the mean, but rows that are balanced would have to travel."
            )
