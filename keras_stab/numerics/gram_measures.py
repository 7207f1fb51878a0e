"""What a Gram matrix of group gradients tells about a training step.

As in `min_norm`, `xp` is `keras.ops` or `numpy`: on an eager backend the
whole K x K computation runs on the host.
"""

import keras
import numpy as np

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


def gram_measures(gram, solution, present, rows):
    r"""Returns the figures named in `GROUP_MEASURES`, as one vector.

    With $\bar g$ the plain mean of the K group gradients that are neither
    excluded nor non-finite, $d$ the min-norm combination and m the mean
    number of rows in a group:

    - `residual`: the solver's certificate;
    - `norm_ratio`: $|d| / |\bar g|$, in [0, 1];
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
        solution: What `min_norm_weights(gram)` returned.
        present: Boolean of shape `(K,)`, `False` for a group without rows.
        rows: Scalar, rows in the batch.

    Returns:
        Tensor or array of shape `(len(GROUP_MEASURES),)`.
    """
    xp = np if isinstance(gram, np.ndarray) else keras.ops
    if xp is keras.ops:
        gram = in_full_precision(gram)
        rows = keras.ops.cast(rows, gram.dtype)
    included = xp.logical_not(solution.excluded)
    member = indicator(xp, included, gram)
    pairs = included[:, None] & included[None, :]
    clean = xp.where(pairs, gram, 0.0)
    count = xp.sum(member)
    safe_count = xp.maximum(count, 1.0)
    others = xp.maximum(count - 1.0, 1.0)
    squares = xp.diagonal(clean)
    mean_square = xp.sum(squares) / safe_count
    with_mean = xp.sum(clean, axis=1) / safe_count
    mean_norm_squared = xp.maximum(xp.sum(with_mean) / safe_count, 0.0)
    norm_squared = xp.maximum(solution.norm_squared, 0.0)
    # By rounding, the ratio may pass 1 when the mean is the minimum.
    ratio = norm_squared / xp.where(
        mean_norm_squared > 0, mean_norm_squared, 1.0
    )
    root = xp.sqrt(xp.where(included, squares, 1.0))
    cosines = clean / root[:, None] / root[None, :]
    off_diagonal = xp.arange(clean.shape[0])
    off_diagonal = off_diagonal[:, None] != off_diagonal[None, :]
    broken = xp.logical_not(xp.isfinite(xp.diagonal(gram)))
    values = [
        solution.residual,
        xp.sqrt(xp.minimum(ratio, 1.0)),
        xp.sum(indicator(xp, solution.weights > 1e-4, gram)),
        xp.sum(xp.where(with_mean < 0, member, 0.0)) / safe_count,
        xp.min(xp.where(off_diagonal & pairs, cosines, 1.0)),
        xp.sum(1.0 - member),
        xp.sum(indicator(xp, xp.logical_and(present, broken), gram)),
        (count * mean_norm_squared - mean_square) / others,
        rows * (mean_square - mean_norm_squared) / others,
    ]
    if xp is np:
        return np.array(values, dtype="float64")
    return keras.ops.stack([keras.ops.cast(v, "float32") for v in values])


def weight_entropy(weights):
    """The entropy of convex weights, in nats; log K where all are equal."""
    weights = np.asarray(weights, "float64")
    positive = weights[weights > 0]
    return float(-np.sum(positive * np.log(positive)))
