"""Which layers each pipeline stage holds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def balanced_stages(costs: Sequence[float], stages: int) -> list[range]:
    """Cut a list of layers into `stages` runs of at least one layer so that the maximum cost of a run is minimal.

    Among cuts that are equally good the earlier stages take fewer layers: they hold the activations of more micro batches
    in flight. Raises ValueError for more stages than layers.
    """
    layers = len(costs)
    if not 1 <= stages <= layers:
        raise ValueError(f"{layers} layers cannot be cut into {stages} pipeline stages of at least one")
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    # dearest[start]: maximum cost of `left` stages over the layers from start; cuts[left - 2][start]: the first cut
    dearest = [total[layers] - total[start] for start in range(layers)]
    cuts: list[list[int]] = []
    for left in range(2, stages + 1):
        row, choice = [float("inf")] * layers, [layers] * layers
        for start in range(layers - left + 1):
            for stop in range(start + 1, layers - left + 2):
                cost = max(total[stop] - total[start], dearest[stop])
                if cost < row[start]:
                    row[start], choice[start] = cost, stop
        dearest = row
        cuts.append(choice)
    bounds = [0]
    for choice in reversed(cuts):
        bounds.append(choice[bounds[-1]])
    bounds.append(layers)
    return [range(start, stop) for start, stop in itertools.pairwise(bounds)]
