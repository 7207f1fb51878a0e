"""What predictions show: agreement between runs, floors of the deviation."""

import numpy as np


def prediction_agreement(predictions):
    """Share of rows on which two runs agree, mean over all pairs of runs.

    Args:
        predictions: Array of classes of shape `(runs, rows)`; at least two
            runs.

    Returns:
        Float from 0 to 1.

    >>> prediction_agreement([[0, 1, 2, 2], [0, 1, 2, 0]])
    0.75
    """
    predictions = np.asarray(predictions)
    runs = len(predictions)
    if predictions.ndim != 2 or runs < 2:
        raise ValueError(
            "Agreement needs the predictions of at least two runs, as an "
            f"array (runs, rows). Received: shape={predictions.shape}"
        )
    pairs = 0
    for chosen in np.unique(predictions):
        votes = np.sum(predictions == chosen, axis=0)
        pairs = pairs + votes * (votes - 1)
    return float(np.mean(pairs) / (runs * (runs - 1)))


def binomial_floor(accuracy, rows):
    r"""Standard deviation that a finite test set gives to an accuracy.

    $\sqrt{p (1 - p) / n}$: the deviation of the accuracy of one fixed model
    over new test sets of n rows.

    Args:
        accuracy: Float from 0 to 1.
        rows: Int, of the test set.

    >>> round(binomial_floor(0.7, 277), 4)
    0.0275
    """
    return float(np.sqrt(accuracy * (1 - accuracy) / rows))


def flip_floor(right):
    r"""Deviation between runs if their errors were independent, row by row.

    All runs are tested on the same rows. If row i is right in a share $p_i$
    of them, whatever happens in other rows, the accuracy has the standard
    deviation $\sqrt{\sum_i p_i (1 - p_i)} / n$. A larger deviation means that
    some runs are better than others as a whole; one of this size means that
    they only disagree about single rows, which a larger test set would
    average out (arXiv:2304.01910).

    Args:
        right: Booleans of shape `(runs, rows)`; at least two runs.

    >>> round(flip_floor([[True, True], [True, False]]), 4)
    0.3536
    """
    right = np.asarray(right, "float64")
    # The unbiased estimate of p (1 - p): few runs would make it too small.
    variances = right.var(axis=0, ddof=1)
    return float(np.sqrt(variances.sum()) / right.shape[1])
