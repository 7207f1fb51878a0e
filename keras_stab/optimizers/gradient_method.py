"""GradientMethod: a wrapper that chooses the gradient."""

from collections.abc import Iterable
from typing import Any

import keras

from keras_stab.optimizers.wrapper import Wrapper


class GradientMethod(Wrapper):
    r"""Base of optimizers that choose the gradient of a step themselves.

    The step of a subclass is

    $$
    d_t = \mathrm{estimate}(\mathrm{oracle}_t), \qquad
    w_{t+1} = \mathrm{inner}(w_t, d_t)
    $$

    It defines `estimate(oracle)`, which asks a `GradientOracle` for any number
    of gradients of the batch and returns one tensor (or `None`) per trainable
    variable. It runs inside of the compiled step, so it is written in
    `keras.ops`, and it assigns nothing: other methods may be around it.

    A method with state makes variables in `build`, with `add_variable`, and
    assigns them in `apply_in_order(gradients, variables)`, before or after
    `super().apply_in_order(gradients, variables)`. What `estimate` leaves as
    `oracle.notes[self]` is `self.handed_over` there.

    `fit` and `train_on_batch` of any compiled `keras.Model` then train with
    it, on every backend, with what Keras's optimizers can do: saving,
    resuming, loss scaling, accumulation, nesting. Register the class with
    `keras.saving.register_keras_serializable` to save models; a setting of its
    own belongs into `get_config`.

    Args:
        inner_optimizer: A `keras.optimizers.Optimizer`, its name, or its
            config; it makes a step from what `estimate` returns.
        name: String or `None`. Defaults to `None`.

    Raises:
        ValueError: If `inner_optimizer` is not an optimizer, or an argument
            is given that the method does not have.
        RuntimeError: If it is given plain gradients.

    Example:

    >>> import keras, keras_stab
    >>> class HalfOfTheRows(keras_stab.methods.GradientMethod):
    ...     def estimate(self, oracle):
    ...         return oracle.head(0.5).gradient()
    >>> model = keras.Sequential([keras.layers.Dense(1)])
    >>> model.compile(optimizer=HalfOfTheRows("sgd"), loss="mse")
    >>> x, y = keras.ops.ones((8, 3)), keras.ops.ones((8, 1))
    >>> history = model.fit(x, y, batch_size=8, verbose=0)
    """

    handed_over: Any = None

    @property
    def wants_oracle(self) -> bool:
        return True

    def apply(
        self,
        grads: Iterable[Any],
        trainable_variables: Iterable[keras.Variable] | None = None,
    ) -> None:
        grads = list(grads)
        # A model without trainable weights hands over nothing at all.
        if grads and self.wants_oracle and self.handed_over is None:
            raise RuntimeError(
                f"{type(self).__name__} received plain gradients, but it "
                "takes its own from the model and the batch. Train with "
                "`model.fit` or `model.train_on_batch`. If the model has a "
                "`train_step` that takes gradients itself (GradientTape, "
                "`backward`), move its loss into "
                "`compute_loss(self, x, y, y_pred, sample_weight, training)` "
                "and delete it, or let it end in "
                "`return super().train_step(data)`. For several networks with "
                "an optimizer each use `keras_stab.Game`"
                + self.plain_gradient_hint
            )
        super().apply(grads, trainable_variables)

    @property
    def plain_gradient_hint(self) -> str:
        """The end of the message to one who hands over plain gradients."""
        return ""
