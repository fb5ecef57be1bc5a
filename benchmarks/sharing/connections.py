"""Whether kernels of two streams run at once, with the hardware queues this process was given.

python -m benchmarks.sharing.connections  (CUDA_DEVICE_MAX_CONNECTIONS is read when CUDA starts)
"""

import json
from collections.abc import Sequence

import torch

from benchmarks.sharing.kernels import Spin
from benchmarks.sharing.setting import median_s, synchronize

SPIN_S = 5e-3

# Streams of kernels of one block in the order of their launch. In the second pattern the queue's
# head waits for its own stream: with one queue the other stream's kernel waits behind it.
PATTERNS = {"pair": (0, 1), "chain": (0, 0, 1)}


def overlap(streams: Sequence[int], device: torch.device) -> dict[str, float | bool]:
    """Time of kernels in two streams, over what it takes if the streams run at once."""
    lanes = [torch.cuda.Stream(device) for _ in range(2)]
    spins = [Spin(1, device) for _ in streams]

    def run() -> None:
        current = torch.cuda.current_stream()
        for lane in lanes:
            lane.wait_stream(current)
        for number, spin in zip(streams, spins, strict=True):
            with torch.cuda.stream(lanes[number]):
                spin.launch(SPIN_S)
        for lane in lanes:
            current.wait_stream(lane)

    taken_s = median_s(run, device, repeats=5, warm_up=2)
    ideal_s = SPIN_S * max(list(streams).count(number) for number in range(2))
    in_a_row_s = SPIN_S * len(streams)
    return {
        "taken_s": taken_s,
        "ideal_s": ideal_s,
        "in_a_row_s": in_a_row_s,
        "overlaps": taken_s < (ideal_s + in_a_row_s) / 2,
    }


def main() -> None:
    """Prints what was found as one line of JSON."""
    device = torch.device("cuda")
    synchronize(device)
    print(json.dumps({name: overlap(streams, device) for name, streams in PATTERNS.items()}))


if __name__ == "__main__":
    main()
