"""Random state of every module on a rank that hosts several.

Megatron keeps one random state per process: the default generators and the tensor-parallel
tracker. Two modules with different tensor-parallel ranks need two.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.training.initialize import _set_random_seed

from megatron_mosaic.host.groups import ModuleGroups

ModuleStates = Mapping[str, dict[str, torch.Tensor]]

_HOST, _DEVICE = "default-host", "default-device"


class ModuleRandomness:
    """Swaps the process's random state when another module runs.

    Between steps the states of all modules lie inside the tracker, under ``module@key``, so
    that the stock checkpoint saves and restores them with the tracker itself.
    """

    def __init__(self) -> None:
        self._states: dict[str, dict[str, torch.Tensor]] = {}
        self._current: str | None = None

    def seed(self, groups: ModuleGroups, *, seed: int) -> None:
        """Seeds one module as the stock initialisation seeds a homogeneous run."""
        collection = groups.collection
        get_cuda_rng_tracker().reset()
        _set_random_seed(
            seed,
            pp_group=collection.pp,
            dp_group=collection.dp,
            tp_group=collection.tp,
            ep_group=collection.ep,
            etp_group=collection.expt_tp,
        )
        self._states[groups.placement.name] = _read()

    @contextmanager
    def of(self, module: str) -> Iterator[None]:
        """Makes the state of ``module`` the process's own."""
        if self._current != module:
            if self._current is not None:
                self._states[self._current] = _read()
            _write(self._states[module])
            self._current = module
        yield

    def states_of(self, modules: Iterable[str]) -> ModuleStates:
        """Returns the states of modules of this rank."""
        self._leave()
        return {module: self._states[module] for module in modules if module in self._states}

    def exchange(self, states: ModuleStates) -> ModuleStates:
        """Gives modules other states. Returns those that they had."""
        had = self.states_of(states)
        self._states.update(states)
        return had

    def park(self) -> None:
        """Puts the states of all modules into the tracker. Called when a step ends."""
        self._leave()
        parked = {
            f"{module}@{key}": state
            for module, states in self._states.items()
            for key, state in states.items()
        }
        # Megatron takes an empty tracker in a checkpoint for a damaged one: a rank without any
        # module parks what it has.
        get_cuda_rng_tracker().set_states(parked or {f"idle@{_HOST}": torch.get_rng_state()})

    def _leave(self) -> None:
        if self._current is not None:
            self._states[self._current] = _read()
            self._current = None

    def unpark(self) -> None:
        """Takes the states back, as they are after a checkpoint was loaded."""
        for name, state in get_cuda_rng_tracker().get_states().items():
            module, _, key = name.partition("@")
            if key and module in self._states:
                self._states[module][key] = state


def _read() -> dict[str, torch.Tensor]:
    states = dict(get_cuda_rng_tracker().get_states())
    states[_HOST] = torch.get_rng_state()
    if torch.cuda.device_count() > 0:
        states[_DEVICE] = torch.cuda.get_rng_state()
    return states


def _write(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states[_HOST])
    if torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state(states[_DEVICE])
    tracked = {key: state for key, state in states.items() if key not in (_HOST, _DEVICE)}
    get_cuda_rng_tracker().set_states(tracked)
