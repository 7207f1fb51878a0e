"""Numbers of timed steps, and their ratios to those of another optimizer."""

import statistics

from timing.arms import AGAIN
from timing.arms import ARMS
from timing.arms import STOCK

KINDS = ("cpu", "wall")


def first_quartile(seconds):
    """Steadier than the median where other machines share the processor."""
    return sorted(seconds)[len(seconds) // 4]


def seconds_a_step(turns, period):
    """The mean over the places in a cycle of the first quartile there.

    Args:
        turns: List of turns, each a list of `(place, seconds)`.
        period: Number of places.
    """
    places = [[] for _ in range(period)]
    for turn in turns:
        for place, seconds in turn:
            places[place].append(seconds)
    return statistics.fmean(first_quartile(p) for p in places if p)


def paired_ratio(turns, base_turns):
    """The median over turns of the ratio of their mean steps."""
    return statistics.median(
        _mean(own) / _mean(base) for own, base in zip(turns, base_turns)
    )


def _mean(turn):
    return statistics.fmean(seconds for _, seconds in turn)


def summarise(times, arms=ARMS):
    """Milliseconds and ratios of every arm.

    Args:
        times: For each arm a dict with `"cpu"` and `"wall"`, each a list of
            turns, and those a list of `(place in the cycle, seconds)`. All
            arms have the same number of turns.
        arms: The `Arm` of each name.

    Returns:
        For each arm a dict of `steps` and, for either kind of time, of a dict:
        `milliseconds`; `ratio` of these to the base; `paired`, the median of
        the ratios of single turns. The base of most is a stock optimizer that
        was timed twice: then it is the mean of the two.
    """
    answer = {arm: {} for arm in times}
    for kind in KINDS:
        costs = {
            arm: seconds_a_step(turns[kind], arms[arm].period)
            for arm, turns in times.items()
        }
        bases = dict(costs)
        if AGAIN in costs:
            bases[STOCK] = (costs[STOCK] + costs[AGAIN]) / 2
        for arm, turns in times.items():
            base = arms[arm].base or arm
            reference = costs[STOCK] if arm == AGAIN else bases[base]
            answer[arm][kind] = {
                "milliseconds": 1e3 * costs[arm],
                "ratio": costs[arm] / reference,
                "paired": paired_ratio(turns[kind], times[base][kind]),
            }
    for arm, turns in times.items():
        answer[arm]["steps"] = sum(map(len, turns["cpu"]))
    return answer
