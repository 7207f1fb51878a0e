"""Adam's second moment alone: what Schedule-Free puts its average around."""

import keras

from keras_stab import keras_internals
from keras_stab.arguments import checked_fraction
from keras_stab.arguments import checked_number
from keras_stab.backend import in_place
from keras_stab.backend import many_tensors
from keras_stab.numerics.norms import in_full_precision
from keras_stab.object_arguments import checked_learning_rate
from keras_stab.optimizers.updates_together import UpdatesTogether
from keras_stab.registration import registered


@registered
class MomentumFreeAdam(UpdatesTogether):
    r"""$w \leftarrow w - \gamma g / (\sqrt{\hat v} + \epsilon)$.

    `keras.optimizers.Adam(beta_1=0)` keeps a momentum that it does not need,
    and adds its epsilon before the correction of the bias.

    Args:
        learning_rate: $\gamma$: float, schedule or callable.
        beta_2: Decay of the second moment, in [0, 1).
        epsilon: $\epsilon$.
        name: String.
        **kwargs: Further arguments of every Keras optimizer.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        learning_rate=1e-3,
        beta_2=0.999,
        epsilon=1e-8,
        name="momentum_free_adam",
        **kwargs,
    ):
        super().__init__(
            checked_learning_rate(learning_rate), name=name, **kwargs
        )
        self.beta_2 = checked_fraction("beta_2", beta_2, zero=True, one=False)
        self.epsilon = checked_number("epsilon", epsilon, 0.0)

    compiled_by_itself = True

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self.velocities = self.add_optimizer_variables(variables, "velocity")

    def update_step(self, gradient, variable, learning_rate):
        self.update_steps([gradient], [variable], learning_rate)

    def update_steps(self, gradients, variables, learning_rate):
        gradients = many_tensors.each_value(gradients)
        slots = [
            self.velocities[keras_internals.variable_index(self, v)]
            for v in variables
        ]
        if in_place.is_quicker([*variables, *slots], gradients):
            in_place.update_moments(slots, gradients, self.beta_2, 2)
            in_place.subtract_quotients(
                variables,
                gradients,
                slots,
                float(learning_rate),
                in_place.bias_correction(self.beta_2, self.iterations + 1),
                self.epsilon,
            )
            return
        for gradient, variable, slot in zip(gradients, variables, slots):
            self._update(gradient, variable, slot, learning_rate)

    def _update(self, gradient, variable, slot, learning_rate):
        ops = keras.ops
        velocity = in_full_precision(ops.convert_to_tensor(slot.value))
        velocity = velocity + (1.0 - self.beta_2) * (
            ops.square(gradient) - velocity
        )
        self.assign(slot, ops.cast(velocity, slot.dtype))
        step = ops.cast(self.iterations + 1, velocity.dtype)
        beta = ops.convert_to_tensor(self.beta_2, velocity.dtype)
        update = gradient / (
            ops.sqrt(velocity / (1.0 - ops.power(beta, step))) + self.epsilon
        )
        rate = ops.cast(learning_rate, velocity.dtype)
        self.assign_sub(variable, ops.cast(rate * update, variable.dtype))

    def get_config(self):
        config = super().get_config()
        config.update({"beta_2": self.beta_2, "epsilon": self.epsilon})
        return config
