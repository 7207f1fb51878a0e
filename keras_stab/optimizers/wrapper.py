"""Wrapper: an optimizer around another one."""

import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from operator import is_
from typing import Any

import keras
import numpy as np

from keras_stab import keras_internals
from keras_stab.backend import updates
from keras_stab.gradients.oracle import GradientOracle
from keras_stab.gradients.train_step import estimate
from keras_stab.gradients.train_step import wants_oracle
from keras_stab.nesting import nest
from keras_stab.object_arguments import checked_optimizer
from keras_stab.optimizers.figures import finite_figures
from keras_stab.optimizers.figures import is_figures
from keras_stab.optimizers.forwarding import ForwardsToInner
from keras_stab.optimizers.quick_adam import quickly
from keras_stab.optimizers.restart import restart_inside
from keras_stab.optimizers.unknown_arguments import refuse_unknown_arguments
from keras_stab.types import Tensor


class Wrapper(ForwardsToInner, keras.optimizers.Optimizer):
    """Base of every method that works around an `inner_optimizer`.

    It has no learning rate, clipping, decay, accumulation or average of its
    own: those are the inner optimizer's, and Keras's public attributes for
    them are forwarded to it (`ForwardsToInner`). `variables` are the wrapper's
    own, then the inner optimizer's; each saves its own. Wrappers nest, inside
    and outside `keras.optimizers.LossScaleOptimizer` too.

    Args:
        inner_optimizer: A `keras.optimizers.Optimizer`, its name, or its
            config.
        name: String or `None`.

    Raises:
        ValueError: If `inner_optimizer` is not an optimizer, or an argument
            is given that the wrapper does not have.
    """

    def __init__(
        self,
        inner_optimizer: str | dict | keras.optimizers.Optimizer,
        name: str | None = None,
        **kwargs: Any,
    ):
        inner_optimizer = checked_optimizer(
            "inner_optimizer", inner_optimizer, type(self).__name__
        )
        if kwargs:
            refuse_unknown_arguments(type(self), inner_optimizer, kwargs)
        super().__init__(learning_rate=0.0, name=name)
        # The base class makes a counter and a learning rate; a wrapper has
        # neither, so they are left out of its state.
        self._unused = len(super().variables)
        self.inner_optimizer = inner_optimizer

    def build(self, variables: Iterable[keras.Variable]) -> None:
        """Makes the state, once; a method adds its own variables here."""
        if self.built:
            return
        variables = list(variables)
        inner = self.inner_optimizer
        refuse_built_elsewhere(inner, variables)
        if not inner.built:
            inner.build(variables)
        self._base_builds = True
        super().build(variables)
        self._base_builds = False

    @property
    def own_variables(self) -> list[keras.Variable]:
        """The state of this wrapper without that of the inner optimizer."""
        return super().variables[self._unused :]

    @property
    def variables(self) -> list[keras.Variable]:
        return self.own_variables + self.inner_optimizer.variables

    def set_weights(self, weights: Iterable[Tensor]) -> None:
        weights = list(weights)
        if not self.built:
            raise ValueError(
                "You are calling `set_weights()` on an optimizer that has not "
                "yet been built. Call `optimizer.build(trainable_variables)` "
                "before"
            )
        shapes = [tuple(v.shape) for v in self.variables]
        given = [tuple(w.shape) for w in weights]
        if shapes != given:
            raise ValueError(
                "`weights` must hold one value for each of "
                f"`optimizer.variables`, which have the shapes {shapes}. "
                f"Received: {given}"
            )
        for variable, weight in zip(self.variables, weights):
            # A copy: on JAX no two variables may share a buffer.
            weight = keras.ops.convert_to_tensor(weight, variable.dtype)
            variable.assign(keras.ops.copy(weight))

    def completed_updates(self) -> Any:
        """Updates made so far, an int32 tensor that stays as it is."""
        count = keras.ops.convert_to_tensor(self.inner_optimizer.iterations)
        return keras.ops.cast(count, "int32") + 0

    def known_updates(self) -> Any:
        """The same, as an int where Python can read it without waiting."""
        count = keras.ops.convert_to_tensor(self.inner_optimizer.iterations)
        known = updates.if_known(count)
        return known if isinstance(known, int) else self.completed_updates()

    # ---- Gradients in, weights out ----------------------------------------

    @property
    def wants_oracle(self) -> bool:
        """Whether this method, or one inside it, asks a `GradientOracle`."""
        return wants_oracle(self.inner_optimizer)

    def estimate(self, oracle: GradientOracle) -> list[Any]:
        """The gradients to hand to `apply`; assigns nothing."""
        return estimate(self.inner_optimizer, oracle)

    def apply_gradients(
        self, grads_and_vars: Iterable[tuple[Any, keras.Variable]]
    ) -> Any:
        super().apply_gradients(grads_and_vars)
        return self.iterations

    def apply(
        self,
        grads: Iterable[Any],
        trainable_variables: Iterable[keras.Variable] | None = None,
    ) -> None:
        gradients = list(grads)
        if not gradients:
            return
        if not self.built:
            if trainable_variables is None:
                raise ValueError(
                    "When passing `grads` without `trainable_variables`, the "
                    "optimizer must be built. Call "
                    "`optimizer.build(model.trainable_variables)` first"
                )
            self.build(trainable_variables)
        variables = keras_internals.built_variables(self)
        if trainable_variables is not None:
            gradients = self.in_built_order(gradients, trainable_variables)
        if len(gradients) != len(variables):
            raise ValueError(
                "One gradient is needed for each variable that the optimizer "
                f"was built with. Received: {len(gradients)} gradients for "
                f"{len(variables)} variables"
            )
        quick = nullcontext if self.rounds_as_keras else quickly
        with quick(self.inner_optimizer):
            self.apply_in_order(gradients, variables)

    @property
    def rounds_as_keras(self) -> bool:
        """Whether the steps of the inner optimizer are Keras's to the bit."""
        return False

    def apply_in_order(
        self, gradients: list[Any], variables: list[keras.Variable]
    ) -> None:
        """What the method does with one gradient per built variable."""
        updates.apply_gradients(
            self.inner_optimizer, updates.barrier(gradients), variables
        )

    def in_built_order(
        self, values: Iterable[Any], variables: Iterable[keras.Variable]
    ) -> list[Any]:
        """One value per built variable; `None` for those not passed.

        A model's trainable variables may now be fewer than those that
        the optimizer was built with: a layer may have been frozen since.
        """
        values, variables = list(values), list(variables)
        built = keras_internals.built_variables(self)
        if len(variables) == len(built) and all(map(is_, variables, built)):
            return values
        position = keras_internals.positions(self)
        ordered = [None] * len(position)
        for value, variable in zip(values, variables):
            key = keras_internals.variable_key(self, variable)
            if key not in position:
                raise ValueError(
                    f"Unknown variable: {variable}. The optimizer can only be "
                    "called for the variables that it was built with; make a "
                    "new optimizer for another model, and compile again after "
                    "layers were frozen or thawed"
                )
            ordered[position[key]] = value
        return ordered

    def restart(self) -> None:
        """Lets the methods inside begin again at the weights of the model."""
        restart_inside(self)

    # ---- Saving -----------------------------------------------------------

    # Keras walks nested optimizers by itself, so each stores its own state.

    def save_own_variables(self, store: Any) -> None:
        for i, variable in enumerate(self.own_variables):
            store[str(i)] = variable.numpy()

    def load_own_variables(self, store: Any) -> None:
        own = self.own_variables
        saved = sum(key.isdigit() for key in store.keys())
        if not self.built and saved:
            # Keras's own warning. Keras would count the inner optimizer's
            # variables too, and write into them if the numbers agree.
            warnings.warn(
                f"Skipping variable loading for optimizer {self.name!r}, "
                f"because it has {len(own)} variables whereas the saved "
                f"optimizer has {saved} variables. This is likely because the "
                "optimizer has not been called/built yet. To load them call "
                "`optimizer.build(model.trainable_variables)` first",
                stacklevel=2,
            )
            return
        shapes = [tuple(v.shape) for v in own]
        saved_shapes = [tuple(store[str(i)].shape) for i in range(saved)]
        if shapes != saved_shapes:
            raise ValueError(
                f"The saved state of {type(self).__name__} does not fit: make "
                "the optimizer with the arguments that the saved one had. "
                f"Received: variables of shapes {saved_shapes}, expected "
                f"{shapes}"
            )
        for i, variable in enumerate(own):
            value = store[str(i)]
            if is_figures(variable):  # version 0.1 wrote NaN
                value = finite_figures(np.asarray(value))
            variable.assign(value)

    def get_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "inner_optimizer": keras.saving.serialize_keras_object(
                self.inner_optimizer
            ),
        }

    @classmethod
    def from_config(
        cls,
        config: dict[str, Any],
        custom_objects: dict[str, Any] | None = None,
    ) -> "Wrapper":
        config = dict(config)
        config["inner_optimizer"] = keras.saving.deserialize_keras_object(
            config["inner_optimizer"], custom_objects=custom_objects
        )
        return cls(**config)


def innermost(optimizer):
    """The optimizer at the bottom of a nest."""
    *_, last = nest(optimizer)
    return last


def refuse_built_elsewhere(optimizer, variables):
    """Raises for the optimizer of another model, whose state it holds."""
    if not optimizer.built:
        return
    key = keras_internals.variable_key
    known = list(keras_internals.positions(optimizer))
    if known != [key(optimizer, v) for v in variables]:
        raise ValueError(
            f"The optimizer {optimizer.name!r} was already built with other "
            "variables, whose state it holds. Give a new one, for example "
            f"{type(optimizer).__name__}.from_config(optimizer.get_config()). "
            f"Received: {len(variables)} variables, built with {len(known)}"
        )
