"""Writes the errors of the cost model into ``README.md``, where a test looks for them.

python -m benchmarks.accuracy_summary
"""

import json
from typing import Any

from benchmarks.machine import RESULTS
from benchmarks.summary import README

FIRST, LAST = "<!-- cost accuracy -->\n", "<!-- end of cost accuracy -->\n"

_NAMES = {
    "simumax": "SimuMax, 8 B200, bf16",
    "a100-2205.05198": "arXiv 2205.05198, A100",
    "bridge-dense": "Megatron-Bridge releases, dense",
    "bridge-moe": "Megatron-Bridge releases, experts",
    "bridge-lora": "Megatron-Bridge releases, LoRA",
    "cards": "Megatron-Bridge model cards, tuned runs",
    "recipes": "Megatron-LM MoE recipes",
    "nemo-cp": "NeMo, long sequences",
    "vlm": "vision-language, step time, not fitted",
    "automodel": "NeMo AutoModel (PyTorch FSDP), not fitted",
}


def numbers() -> str:
    """Returns the errors in Markdown."""
    results = json.loads((RESULTS / "cost_accuracy.json").read_text())
    lines = [
        "",
        "| source | half A, fitted: layouts, MAPE | half B: layouts, MAPE | all: layouts, MAPE "
        "| largest | bias | rank |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for source, name in _NAMES.items():
        if source in results["sources"]:
            lines.append(_line(name, results["sources"][source]))
    lines.append(
        f"\nFLOPs of a LoRA step of Llama-3-70B over those of a full one: "
        f"{results['lora_flop_ratio']:.3f}, published 0.645.\n"
    )
    lines += [
        "| encoder on a 17th GPU: images, tokens | step shorter, published | predicted, H100 "
        "| A100 to GB200 |",
        "| --- | --- | --- | --- |",
    ]
    for cell in results["17_gpus"]:
        shown = ("dataset", "sequence_length", "published")
        gains = [value for key, value in cell.items() if key not in shown]
        lines.append(
            f"| {cell['dataset']}, {cell['sequence_length']} | {cell['published']:.1%} "
            f"| {cell['h100']:.1%} | {min(gains):.1%} to {max(gains):.1%} |"
        )
    return "\n".join(lines) + "\n\n"


def _line(name: str, halves: dict[str, Any]) -> str:
    parts = [halves.get(half) for half in ("A", "B", "all")]
    cells = [name, *(f"{it['rows']}, {it['mape']:.1%}" if it else "" for it in parts)]
    whole = halves["all"]
    rank = "" if whole["rank"] is None else f"{whole['rank']:.2f}"
    cells += [f"{whole['largest']:.1%}", f"{whole['bias']:+.1%}", rank]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Rewrites what stands between the two marks."""
    before, _, rest = README.read_text().partition(FIRST)
    _, _, after = rest.partition(LAST)
    README.write_text(f"{before}{FIRST}{numbers()}{LAST}{after}")


if __name__ == "__main__":
    main()
