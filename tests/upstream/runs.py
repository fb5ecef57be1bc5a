"""Runs ``pretrain_vlm.py`` of a tree on ranks, and records what it trained.

    python -m tests.upstream.runs TREE FOLDER

reads runs from its input, one a line as JSON, and answers each with what its ranks recorded. It is
a process of its own, whose ranks import Megatron from TREE, patched or not, once for all runs.
"""

import hashlib
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_mosaic.rehearsal.ranks import IMPORTED_FIRST
from tests.ranks import ROOT, run_ranks

OPTIONS = """
--encoder-num-layers 2 --decoder-num-layers 4 --hidden-size 32 --num-attention-heads 4
--ffn-hidden-size 64 --seq-length 16 --max-position-embeddings 64 --img-h 28 --img-w 28
--patch-dim 14 --attention-dropout 0 --hidden-dropout 0 --vocab-size 126
--make-vocab-size-divisible-by 16 --tokenizer-type NullTokenizer --mock-data --split 949,50,1
--train-iters 3 --lr 1e-3 --adam-eps 1e-4 --lr-decay-style constant --transformer-impl local
--ckpt-format torch --no-gradient-accumulation-fusion --no-masked-softmax-fusion --num-workers 0
--eval-iters 1 --eval-interval 1000 --log-interval 1
"""
# The image takes the place of one of 20 tokens with 5 rows: 24 positions are 4 chunks of 6.
TEXT = "--dataloader-seq-length 19"
BATCH = "--micro-batch-size 2 --global-batch-size 16"
TIMEOUT_S = 150.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of the script.

    Args:
        name: How tests call it.
        num_ranks: Ranks that are started.
        plan: Text of a plan; without one the script runs under its own options.
        launched: Whether ``megatron_mosaic.run`` starts the script, as it starts it for a user;
            otherwise Python does.
        by_name: Whether weights begin as they do under a plan: by their names.
    """

    name: str
    num_ranks: int = 1
    plan: str | None = None
    launched: bool = False
    by_name: bool = False


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a rank saw.

    Args:
        losses: Of every step and, last, of the evaluations.
        weights: Checksum of the weights in the end.
        replaced: Functions of the training loop that were Mosaic's while it trained.
    """

    losses: list[float]
    weights: str
    replaced: list[str]


class Runner:
    """Runs the script of one tree, as often as it is asked to.

    Args:
        tree: The tree.
        folder: Where plans and the output of ranks go.
    """

    def __init__(self, tree: Path, folder: Path) -> None:
        self._output = folder / "output.txt"
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.upstream.runs", str(tree), str(folder)],
                env=os.environ | {IMPORTED_FIRST: str(tree), "PYTHONPATH": str(ROOT)},
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )
        self._done: dict[Run, list[Record]] = {}

    def __call__(self, run: Run) -> list[Record]:
        """Returns what the ranks of a run recorded; the same run is done once."""
        if run not in self._done:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps(asdict(run)) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            assert answer, self._output.read_text()[-6000:]
            self._done[run] = [Record(**fields) for fields in json.loads(answer)]
        return self._done[run]

    def close(self) -> None:
        """Ends the process: it has no more to read."""
        with self._process:
            pass


def main(tree: str, folder: str) -> None:
    """Runs what it is asked for, one after the other."""
    for line in sys.stdin:
        run = Run(**json.loads(line))
        with redirect_stdout(sys.stderr):
            records = run_ranks(
                train, run.num_ranks, tree, folder, run, init=False, timeout_s=TIMEOUT_S
            )
        print(json.dumps([asdict(record) for record in records]), flush=True)


def train(rank: int, tree: str, folder: str, run: Run) -> Record:
    """Runs the script on this rank."""
    from megatron_mosaic.host.cpu import run_on_cpu

    run_on_cpu()
    import megatron.training.training as loop

    assert loop.__file__ is not None
    assert Path(loop.__file__).is_relative_to(tree), "the wheel's Megatron is not the tree's"
    recorder = _Recorder(loop)
    script = f"{tree}/pretrain_vlm.py"
    options = f"{OPTIONS} {TEXT}".split()
    if run.plan is None:
        options += BATCH.split()
    else:
        path = Path(folder) / f"{run.name}.{rank}.yaml"
        path.write_text(run.plan)
        options += ["--mosaic-plan", str(path)]
    if run.by_name:
        _begin_by_name()
    if run.launched:
        from megatron_mosaic.run import main as launch

        assert launch(["--mosaic-device", "cpu", script, *options]) == 0
    else:
        sys.path.insert(0, tree)
        sys.argv = [script, *options]
        runpy.run_path(script, run_name="__main__")
    return recorder.record()


class _Recorder:
    """Listens to the training loop: to what its functions return, not to what they do."""

    def __init__(self, loop: Any) -> None:
        self._loop = loop
        self._losses: list[float] = []
        self._model: Any = None
        self._replaced: list[str] = []
        for name in ("train_step", "evaluate", "setup_model_and_optimizer"):
            self._listen(name, getattr(loop, name))

    def _listen(self, name: str, function: Any) -> None:
        def call(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            if name == "setup_model_and_optimizer":
                (self._model,) = result[0]
            else:
                self._losses.append(_loss(result[0]))
                self._replaced = _replaced_in(self._loop)
            return result

        setattr(self._loop, name, call)

    def record(self) -> Record:
        digest = hashlib.sha256()
        for parameter in self._model.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        return Record(
            losses=self._losses, weights=digest.hexdigest(), replaced=sorted(set(self._replaced))
        )


def _loss(losses: Mapping[str, Any]) -> float:
    """The script's only loss, which an evaluation has as a sum and a count."""
    (value,) = losses.values()
    if isinstance(value, (list, tuple)) or getattr(value, "numel", lambda: 1)() == 2:
        return float(value[0]) / float(value[1])
    return float(value)


def _replaced_in(loop: Any) -> list[str]:
    """Names under which the loop finds functions of Mosaic's."""
    from megatron.training import checkpointing

    places = (
        (loop, "get_forward_backward_func"),
        (loop, "num_floating_point_operations"),
        (checkpointing, "maybe_save_dataloader_state"),
    )
    return [
        name
        for module, name in places
        if not getattr(getattr(module, name), "__module__", "megatron_mosaic").startswith(
            "megatron."
        )
    ]


def _begin_by_name() -> None:
    """Gives the stock script's model the weights that a plan gives its modules."""
    import megatron.training as training

    from megatron_mosaic.rehearsal.record import initialized_by_name

    stock = training.pretrain

    def pretrain(cfg: Any, data: Any, kind: Any, step: Any, provider: Any, **options: Any) -> None:
        stock(cfg, data, kind, step, initialized_by_name(provider), **options)

    training.pretrain = pretrain


if __name__ == "__main__":
    main(*sys.argv[1:])
