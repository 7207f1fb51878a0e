"""How far the projection on a half-space moves."""

import keras


def step_to_half_space(inner, square, offset):
    r"""The multiple of a vector b that leads to the edge of a half-space.

    $t = o + \langle a, b \rangle / \|b\|^2$, and 0 where b is 0: there is
    nowhere to go, and 0 / 0 would say so with a NaN. Other NaNs stay.

    Args:
        inner: Scalar tensor, $\langle a, b \rangle$.
        square: Scalar tensor of the same dtype, $\|b\|^2$.
        offset: Float or scalar tensor of the same dtype, o.
    """
    # Not `square > 0`, which is false of a NaN too: the weights would stand
    # still instead of showing it.
    still = square == 0
    safe = keras.ops.where(still, keras.ops.ones_like(square), square)
    return keras.ops.where(
        still, keras.ops.zeros_like(square), offset + inner / safe
    )
