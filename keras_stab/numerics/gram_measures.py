"""What a Gram matrix of group gradients tells about a training step.

As in `min_norm`, a NumPy array is measured on the host, where an eager backend
runs the whole K x K computation.
"""

import keras
import numpy as np

from keras_stab.numerics.interior_point import identity_like
from keras_stab.numerics.interior_point import indicator
from keras_stab.numerics.norms import in_full_precision

GROUP_MEASURES = (
    "residual",
    "norm_ratio",
    "support_size",
    "conflict_rate",
    "min_cosine",
    "excluded",
    "nonfinite",
    "gradient_norm_squared",
    "gradient_noise",
)


def gram_measures(gram, solution, present, rows, is_shortest=True):
    r"""Returns the figures named in `GROUP_MEASURES`, as one vector.

    With $\bar g$ the plain mean of the K group gradients that are neither
    excluded nor non-finite, $d$ the combination and m the mean number of rows
    in a group:

    - `residual`: the solver's certificate;
    - `norm_ratio`: $|d| / |\bar g|$;
    - `support_size`: how many weights exceed 1e-4;
    - `conflict_rate`: share of groups with $\langle \bar g, g_k \rangle < 0$;
    - `min_cosine`: smallest cosine between two groups;
    - `excluded`, `nonfinite`: how many groups took no part, and how many of
      these because of a NaN or infinite gradient;
    - `gradient_norm_squared`: $(K |\bar g|^2 - \overline{|g_k|^2}) / (K-1)$,
      the unbiased estimate of the true gradient's squared norm;
    - `gradient_noise`: $m K (\overline{|g_k|^2} - |\bar g|^2) / (K-1)$, the
      trace of the per-row gradient covariance. Its ratio to the figure above,
      each averaged over steps, is the gradient noise scale.

    Args:
        gram: Tensor or NumPy array of shape `(K, K)`.
        solution: What `min_norm_weights(gram)` or `solve_rule` returned.
        present: Boolean of shape `(K,)`, `False` for a group without rows.
        rows: Scalar, rows in the batch.
        is_shortest: Whether $d$ is no longer than $\bar g$.

    Returns:
        Tensor or array of shape `(len(GROUP_MEASURES),)`.
    """
    if isinstance(gram, np.ndarray):
        values = _on_host(gram, solution, present, rows, is_shortest)
        return np.array(values, "float64")
    ops = keras.ops
    gram = in_full_precision(gram)
    rows = ops.cast(rows, gram.dtype)
    included = ops.logical_not(solution.excluded)
    member = indicator(ops, included, gram)
    pairs = included[:, None] & included[None, :]
    clean = ops.where(pairs, gram, 0.0)
    identity = identity_like(ops, gram)
    diagonal = ops.sum(ops.where(identity > 0, gram, 0.0), axis=1)
    squares = ops.where(included, diagonal, 0.0)
    sums = ops.sum(clean, axis=1)
    broken = ops.logical_and(present, ops.logical_not(ops.isfinite(diagonal)))
    opposed = ops.logical_and(included, sums < 0)
    # Every sum is a kernel of a compiled step.
    chosen = [solution.weights > 1e-4, broken, opposed]
    chosen = [indicator(ops, each, gram) for each in chosen]
    count, total, of_all, support, broken, opposed = ops.unstack(
        ops.sum(ops.stack([member, squares, sums, *chosen]), axis=1), num=6
    )
    safe_count = ops.maximum(count, 1.0)
    others = ops.maximum(count - 1.0, 1.0)
    mean_square = total / safe_count
    mean_norm_squared = ops.maximum(of_all / safe_count / safe_count, 0.0)
    norm_squared = ops.maximum(solution.norm_squared, 0.0)
    ratio = norm_squared / ops.where(
        mean_norm_squared > 0, mean_norm_squared, 1.0
    )
    if is_shortest:  # but for rounding, when the mean is the minimum
        ratio = ops.minimum(ratio, 1.0)
    root = ops.sqrt(ops.where(included, squares, 1.0))
    cosines = clean / root[:, None] / root[None, :]
    between = ops.logical_and(identity == 0, pairs)
    values = [
        solution.residual,
        ops.sqrt(ratio),
        support,
        opposed / safe_count,
        ops.min(ops.where(between, cosines, 1.0)),
        gram.shape[0] - count,
        broken,
        (count * mean_norm_squared - mean_square) / others,
        rows * (mean_square - mean_norm_squared) / others,
    ]
    return ops.stack([ops.cast(v, "float32") for v in values])


def _on_host(gram, solution, present, rows, is_shortest):
    """The same figures; only groups that take part enter the arithmetic."""
    groups = len(gram)
    broken = np.count_nonzero(present & ~np.isfinite(gram.diagonal()))
    chosen = (~solution.excluded).nonzero()[0]
    if len(chosen) < groups:
        gram = gram[chosen[:, None], chosen]
    count = max(len(chosen), 1)
    others = max(count - 1, 1)
    squares = gram.diagonal()
    mean_square = squares.sum() / count
    with_mean = gram.sum(axis=1) / count
    mean_norm_squared = max(with_mean.sum() / count, 0.0)
    # Of `np`, which keep NaN.
    ratio = np.maximum(solution.norm_squared, 0.0) / (mean_norm_squared or 1.0)
    if is_shortest:
        ratio = np.minimum(ratio, 1.0)
    root = np.sqrt(squares)
    cosines = gram / root[:, None] / root
    cosines.flat[:: len(root) + 1] = 1.0
    return (
        solution.residual,
        np.sqrt(ratio),
        np.count_nonzero(solution.weights > 1e-4),
        np.count_nonzero(with_mean < 0) / count,
        cosines.min(initial=1.0),
        groups - len(chosen),
        broken,
        (count * mean_norm_squared - mean_square) / others,
        rows * (mean_square - mean_norm_squared) / others,
    )


def weight_entropy(weights):
    """The entropy of convex weights, in nats; log K where all are equal."""
    weights = np.asarray(weights, "float64")
    positive = weights[weights > 0]
    return float(-np.sum(positive * np.log(positive)))
