"""What the planner chooses for a case, by its model of one H200 or of a file's cluster."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from benchmarks.sharing.cases import LANGUAGE, Case
from benchmarks.sharing.modules import Tower
from megatron_mosaic.cluster.shipped import load_cluster
from megatron_mosaic.cost.sizes import TrainingSettings
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.model.model_file import model_from_document
from megatron_mosaic.planner.planner import make_plan
from megatron_mosaic.planner.problem import Pins, Problem

LIMIT_S = 5.0
"""Seconds of a search: on one GPU there are few layouts."""

_GRADIENT_BYTES = 2  # of the benchmark's modules; Megatron's are usually of 4


class Planned(NamedTuple):
    """The planner's answer.

    Args:
        plan: What it chooses.
        step_s: What it expects of that.
        serial_s: What it expects of the best plan that runs one module at a time.
        shared: The best plan whose modules run at the same time, chosen or not.
        shared_s: What it expects of that.
    """

    plan: Plan
    step_s: float
    serial_s: float
    shared: Plan | None
    shared_s: float | None

    def written(self) -> dict[str, Any]:
        """As results have it."""
        return {
            "kind": self.plan.schedule.kind,
            "sms": sms_of(self.plan),
            "encoder_group": self.plan.schedule.encoder_group,
            "step_s": self.step_s,
            "serial_s": self.serial_s,
            "shared_sms": self.shared and sms_of(self.shared),
            "shared_s": self.shared_s,
        }


def planned(case: Case, *, graphs: bool, cluster: str = "h200") -> Planned:
    """Plans a case on one GPU, with microbatches as the case has them.

    Args:
        case: The case.
        graphs: Whether steps are captured, so that launches take the host no time.
        cluster: A shipped cluster, or the path of a file, such as one that was measured.

    Raises:
        PlanError: Nothing fits.
    """
    samples = case.language.items
    problem = Problem(
        model=model_from_document(document_of(case)),
        cluster=load_cluster(cluster, num_gpus=1),
        num_gpus=1,
        global_batch_size=samples * case.num_microbatches,
        settings=TrainingSettings(
            gradient_bytes=_GRADIENT_BYTES, cuda_graph="full" if graphs else "none"
        ),
        pins=Pins(
            micro_batch_size=samples,
            modules={name: {"recompute": None} for name in case.modules},
        ),
    )
    answer = make_plan(problem, time_limit_s=LIMIT_S)
    best = answer.multiplexing.best
    return Planned(
        plan=answer.choice.plan,
        step_s=answer.choice.step_s,
        serial_s=answer.multiplexing.serial_s,
        shared=best and best.plan,
        shared_s=best and best.step_s,
    )


def sms_of(plan: Plan) -> dict[str, int | None]:
    """Quotas of a plan's modules."""
    return {name: own.share and own.share.sms for name, own in plan.modules.items()}


def document_of(case: Case) -> dict[str, Any]:
    """The case as a model file describes it."""
    samples = case.language.items
    modules: dict[str, Any] = {
        name: _encoder(tower, out=case.language.hidden, pooled=case.contrastive, samples=samples)
        for name, tower in case.encoders.items()
    }
    modules[LANGUAGE] = _language(case)
    return {
        "format": 1,
        "name": "case",
        "edges": [[name, LANGUAGE] for name in case.encoders],
        "modules": modules,
    }


def _layers(tower: Tower) -> dict[str, Any]:
    return {
        "hidden_size": tower.hidden,
        "num_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "num_query_groups": tower.groups,
        "ffn_hidden_size": tower.ffn,
        "gated_linear_unit": tower.gated,
        "add_bias_linear": not tower.gated,
        "normalization": "RMSNorm" if tower.gated else "LayerNorm",
    }


def _encoder(tower: Tower, *, out: int, pooled: bool, samples: int) -> dict[str, Any]:
    merged = tower.tokens // tower.rows
    width = tower.hidden * (1 if pooled else merged)
    projector: Mapping[str, Any] = {"sizes": [width, out], "merged_tokens": merged}
    return {
        **_layers(tower),
        "patches": {"values": tower.hidden, "learned_positions": tower.tokens, "normed": False},
        "projector": {**projector, "pooled": pooled} if pooled else projector,
        "items_per_sample": tower.items // samples,
        "tokens_per_item": tower.tokens,
    }


def _language(case: Case) -> dict[str, Any]:
    tower = case.language
    vocab = {"vocab_size": tower.vocab}
    end: dict[str, Any] = {"embedding": vocab, "head": vocab}
    if case.contrastive:
        sizes = [tower.hidden, tower.hidden]
        end = {
            "embedding": vocab,
            "projector": {"sizes": sizes, "merged_tokens": tower.tokens, "pooled": True},
        }
    return {**_layers(tower), **end, "seq_length": tower.tokens}
