"""The plugin of NeMo-Run, with tasks and executors of its form and, where installed, its own."""

import importlib.util
import warnings
from dataclasses import dataclass, field

import pytest

from megatron_mosaic.errors import HostError, LayoutError, PlanError
from tests.planner.emitted import DISJOINT

with warnings.catch_warnings():
    # Of what NeMo-Run imports.
    warnings.simplefilter("ignore")
    from megatron_mosaic.recipes.plugin import MosaicPlugin

with_nemo_run = pytest.mark.skipif(
    importlib.util.find_spec("nemo_run") is None, reason="nemo-run is not installed"
)
ignoring = pytest.mark.filterwarnings("ignore")


@dataclass
class Script:
    path: str = "train.py"
    args: list[str] = field(default_factory=list)
    entrypoint: str = "python"
    m: bool = False


@dataclass
class Executor:
    nodes: int = 2
    ranks: int = 8

    def nnodes(self):
        return self.nodes

    def nproc_per_node(self):
        return self.ranks


@pytest.fixture
def plugin(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(DISJOINT)
    return MosaicPlugin(plan_path=str(path))


def test_script_runs_under_the_plan(plugin):
    task = Script(args=["--lr", "1e-4"])
    plugin.setup(task, Executor())

    assert (task.path, task.m, task.entrypoint) == ("megatron_mosaic.run", True, "python")
    assert task.args == ["train.py", "--lr", "1e-4", "--mosaic-plan", plugin.plan_path]


def test_other_number_of_ranks_is_refused(plugin):
    with pytest.raises(LayoutError, match=r"plan.yaml: world_size=16 must equal the 8 launched"):
        plugin.setup(Script(), Executor(nodes=1))


def test_executor_of_one_process_lets_it_launch_the_ranks(plugin):
    task = Script()
    plugin.setup(task, Executor(nodes=1, ranks=1))

    assert task.args[0] == "train.py"


def test_plan_is_added_once(plugin):
    task = Script()
    plugin.setup(task, Executor())

    with pytest.raises(HostError, match=r"task: args=--mosaic-plan must be given once; remove it"):
        plugin.setup(task, Executor())


def test_inline_script_is_refused(plugin):
    with pytest.raises(HostError, match=r"task: inline=\.\.\. must be absent"):
        plugin.setup(Script(path=""), Executor())


def test_missing_plan_is_named():
    with pytest.raises(PlanError, match=r"none\.yaml: file must be readable text"):
        MosaicPlugin(plan_path="none.yaml").setup(Script(), Executor())


def train(mosaic_plan=""):
    return mosaic_plan


def train_without_a_plan():
    return None


@ignoring
@with_nemo_run
def test_own_script_of_nemo_run_becomes_the_command(plugin):
    import nemo_run as run

    task = run.Script(path="train.py", entrypoint="python", args=["--lr", "1e-4"])
    executor = run.SlurmExecutor(
        account="a", nodes=2, ntasks_per_node=8, tunnel=run.LocalTunnel(job_dir="/tmp")
    )
    assert isinstance(plugin, run.Plugin)
    plugin.setup(task, executor)

    words = ["python", "-m", "megatron_mosaic.run", "train.py", "--lr", "1e-4"]
    assert task.to_command(with_entrypoint=True) == [*words, "--mosaic-plan", plugin.plan_path]


@ignoring
@with_nemo_run
def test_function_gets_the_plan_where_it_has_a_parameter(plugin):
    import nemo_run as run

    task = run.Partial(train)
    plugin.setup(task, run.LocalExecutor())

    assert task.mosaic_plan == plugin.plan_path
    with pytest.raises(HostError, match=r"task: function must have a parameter mosaic_plan"):
        plugin.setup(run.Partial(train_without_a_plan), run.LocalExecutor())
