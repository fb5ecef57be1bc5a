"""Lanes that arms use: opened once for each kind and quotas, and kept."""

import os
from collections.abc import Mapping
from typing import cast

from benchmarks.sharing.cases import LANGUAGE
from benchmarks.sharing.setting import Setting
from megatron_mosaic.sharing.choose import Mode, open_lanes
from megatron_mosaic.sharing.guards import Environment
from megatron_mosaic.sharing.lane import Lanes, Quota


class LaneBank:
    """Opens lanes; a green context is made once, as nothing destroys it.

    Args:
        setting: Where. On a host lanes of every kind are virtual ones, which find races.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._opened: dict[tuple[str, tuple[tuple[str, int | None], ...]], Lanes] = {}

    def lanes(self, mode: str, sms: Mapping[str, int | None]) -> Lanes:
        """Lanes of modules, exactly of the kind that is asked for.

        The language model goes first under ``priority``: it is what a step waits for.

        Raises:
            HostError: The device cannot give them.
            LayoutError: It has no such quotas.
        """
        key = mode, tuple(sorted(sms.items()))
        if key not in self._opened:
            quotas = [
                Quota(lane=name, sms=own, priority=int(name != LANGUAGE))
                for name, own in sms.items()
            ]
            tiny = self._setting.tiny
            self._opened[key] = open_lanes(
                quotas,
                mode=cast(Mode, "auto" if tiny and mode != "serial" else mode),
                device=self._setting.device,
                environment=Environment(
                    compute_capability=None if tiny else self._setting.compute_capability,
                    device_max_connections=os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"),
                    launch_blocking=os.environ.get("CUDA_LAUNCH_BLOCKING") == "1",
                ),
            )
        return self._opened[key]
