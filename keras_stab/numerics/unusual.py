"""Which of the last values of a quantity are usual, and what is far above.

With NumPy or `keras.ops` as `xp`.
"""

from typing import Any
from typing import NamedTuple

# Entries of the vector of counts.
COUNTS = STEPS, KEPT, SPIKES, COOLING, RECOVERIES = range(5)
# From the lower half of the middle half of normal values to their deviation.
_DEVIATIONS = 1.4826
# A smaller spread, as part of the loss, is that of a loss which is about the
# same in every step. Of a logarithm it is the same for the gradient norm.
LEAST_SPREAD = 0.05


class Rule(NamedTuple):
    """What counts as a spike, and what it does to the learning rate.

    Attributes:
        threshold: Float, spreads above the median.
        compared: Booleans, which columns of the window are looked at.
        rate_factor: Float, by which the rate is multiplied in a cool-down.
        cool_down: Int, the steps of a cool-down that a spike begins; 0 where
            something else begins it.
    """

    threshold: float
    compared: tuple
    rate_factor: float
    cool_down: int


class Judgement(NamedTuple):
    """Of one step.

    Attributes:
        usual: Boolean: no spike.
        rate_factor: Factor of the learning rate in this step.
        row: Values for the window.
        place: The row of the window where they belong.
        counts: The counts after this step.
    """

    usual: Any
    rate_factor: Any
    row: Any
    place: Any
    counts: Any


def usual_limits(xp, window, threshold):
    r"""The values above which loss and gradient norm are far from the last.

    For the median $m$ and the lower quartile $q$ of a column the spread is
    $s = \max(1.4826 (m - q), s_0)$ and the limit $m + \tau s$; the least spread
    $s_0$ is $0.05 |m|$ for losses and $0.05$ for logarithms of norms. For
    normal values $1.4826 (m - q)$ is the standard deviation. Only what lies
    below the median is looked at: until half of the values are spikes, these
    hardly change it, however large they are.

    Args:
        xp: `numpy` or `keras.ops`.
        window: `[steps, 2]`: losses and logarithms of norms, all finite.
        threshold: Float, $\tau$.

    Returns:
        Vector of two limits.
    """
    count = window.shape[0]
    ordered = xp.sort(xp.transpose(window), axis=-1)
    median, lower = ordered[:, count // 2], ordered[:, count // 4]
    size = xp.stack([xp.abs(median[0]), xp.ones_like(median[1])])
    spread = xp.maximum(_DEVIATIONS * (median - lower), LEAST_SPREAD * size)
    return median + threshold * spread


def judge(xp, window, counts, values, must_be_finite, rule):
    """Looks at the loss and the gradient norm of a step.

    Args:
        xp: `numpy` or `keras.ops`.
        window: As for `usual_limits`. Its rows are filled in turn.
        counts: Integers: steps; of them, those in the window, past its length
            too; spikes; steps of the cool-down that are left; recoveries.
        values: Vector of the loss and the logarithm of the gradient norm.
        must_be_finite: Booleans: which of them, if not finite, make a spike.
        rule: A `Rule`.

    Returns:
        A `Judgement`. All finite values go into the window, those of spikes
        too: a level that is new for good is usual after half a window. Until
        the window is full only values that are not finite are spikes.
    """
    finite = xp.isfinite(values)
    all_finite = finite[0] & finite[1]
    above = values > usual_limits(xp, window, rule.threshold)
    far = [above[i] for i, looked_at in enumerate(rule.compared) if looked_at]
    far = far[0] if len(far) == 1 else far[0] | far[1]
    spike = far & all_finite & (counts[KEPT] >= window.shape[0])
    for each, needed in zip((finite[0], finite[1]), must_be_finite):
        if needed:
            spike = spike | ~each
    place = counts[KEPT] % window.shape[0]
    cooling = left = counts[COOLING]
    factor = 1.0
    if rule.rate_factor != 1.0:
        factor = xp.where(cooling > 0, rule.rate_factor, 1.0)
        left = xp.maximum(cooling - 1, 0)
        if rule.cool_down:
            left = xp.where(spike, rule.cool_down, left)
    after = [
        counts[STEPS] + 1,
        counts[KEPT] + xp.where(all_finite, 1, 0),
        counts[SPIKES] + xp.where(spike, 1, 0),
        left,
        counts[RECOVERIES],
    ]
    return Judgement(
        usual=~spike,
        rate_factor=factor,
        row=xp.where(all_finite, values, window[place]),
        place=place,
        counts=xp.stack(after),
    )
