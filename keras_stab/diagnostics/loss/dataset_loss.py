"""The loss of a model on a whole data set, as a function of its weights."""

import keras
import numpy as np

from keras_stab.arguments import checked_boolean
from keras_stab.arguments import checked_count
from keras_stab.backend import devices
from keras_stab.backend import many_tensors
from keras_stab.backend import tracing
from keras_stab.batches import iterate_whole
from keras_stab.diagnostics.loss.batch_functions import compiled_functions
from keras_stab.diagnostics.targets import build_loss
from keras_stab.diagnostics.targets import check_loss
from keras_stab.diagnostics.targets import check_targets
from keras_stab.gradients.rows import batch_size as count_rows


class DatasetLoss:
    r"""Mean loss $L(w) = \sum_b \frac{n_b}{N} L_b(w)$, with its derivatives.

    $L_b$ is what Keras computes for a batch of $n_b$ rows, penalties
    included. A point in weight space is given by its shift from the weights
    of the model. Shifts and directions are vectors, for the algebra of
    `vectors`. Nothing is assigned.

    Args:
        model, data, loss, training, steps, batch_size: As for `sharpness`.

    Attributes:
        variables: The variables that are moved.
        sizes: Number of elements of each.
        vectors: The algebra of such vectors, a `Vectors`.
        passes: Passes over the data so far.
    """

    def __init__(self, model, data, loss, training, steps, batch_size):
        if not isinstance(model, keras.Model):
            raise ValueError(
                "`model` must be a keras.Model. Received: model of type "
                f"{type(model).__name__}"
            )
        checked_count("steps", steps, 1, optional=True)
        checked_count("batch_size", batch_size, 1)
        checked_boolean("training", training)
        check_loss(model, loss)
        with devices.replayed(devices.random_state()):
            self._batches = _collected(model, data, steps, batch_size)
        check_targets("data", data, self._batches, model, loss)
        rows = [count_rows(*batch) for batch in self._batches]
        self._shares = [n / sum(rows) for n in rows]
        tracing.sync_state(model)
        build_loss(model, self._batches[0], loss)
        self.variables = [
            v
            for v in model.trainable_variables
            if not v.overwrite_with_gradient
        ]
        if not self.variables:
            raise ValueError(
                "The model has no trainable weights, so its loss has no "
                f"gradient. Received: model {model.name!r}"
            )
        chosen = {id(v) for v in self.variables}
        others = [
            *(v for v in model.variables if id(v) not in chosen),
            *model.metrics_variables,
        ]
        self.sizes = [int(np.prod(v.shape)) for v in self.variables]
        self.passes = 0
        self._values = [tracing.read(v) for v in self.variables]
        self._other_variables = others
        self._others = [tracing.read(v) for v in others]
        self._random_state = devices.random_state()
        self._functions = compiled_functions(
            model, loss, training, self.variables, others
        )
        self.vectors = self._functions["vectors"]
        self._zeros = self.zeros()

    # ---- Questions --------------------------------------------------------

    def packed(self, arrays):
        """A vector made of arrays in the shapes of the variables."""
        dtype = many_tensors.common_dtype(self.variables)
        return many_tensors.pack_vector(
            [keras.ops.convert_to_tensor(a, dtype) for a in arrays]
        )

    def zeros(self):
        """The shift of length zero."""
        return self.packed([np.zeros(v.shape) for v in self.variables])

    def random(self, distribution, seed):
        """A random vector by `keras.random.normal` or another function."""
        dtype = many_tensors.common_dtype(self.variables)
        return [
            distribution(tensor.shape, dtype=dtype, seed=seed + i)
            for i, tensor in enumerate(self._zeros)
        ]

    def at(self, shift, state=None):
        """The loss at a shift, a float.

        Args:
            shift: Vector.
            state: From `state_towards`, or `None` for that of the model.
        """
        return self._mean(self._over_batches("loss", shift, state))

    def with_gradient(self, shift):
        """The loss at a shift, a float, and its gradient."""
        answers = self._over_batches("gradient", shift)
        losses, gradients = zip(*answers)
        return self._mean(losses), self._sum(gradients)

    def hessian_product(self, vector):
        """The Hessian at the weights of the model, times a vector."""
        return self._sum(self._over_batches("product", vector))

    def by_variable(self, left, right):
        """Inner products of two vectors, one per variable."""
        parts = self._functions["by_variable"](left, right)
        return keras.ops.convert_to_numpy(parts).astype("float64")

    def mask(self, variables):
        """A vector: 1 for the elements of these variables, 0 elsewhere."""
        chosen = {id(v) for v in variables}
        return self.packed(
            [np.full(v.shape, float(id(v) in chosen)) for v in self.variables]
        )

    def start(self):
        """The weights of the model, as NumPy arrays."""
        return [keras.ops.convert_to_numpy(value) for value in self._values]

    def state_towards(self, weights, share):
        """Values of the other variables, floats interpolated to a solution's.

        Args:
            weights: Dict from the `id` of a variable to an array.
            share: Float: 0 is this model, 1 the other.
        """
        state = []
        for variable, value in zip(self._other_variables, self._others):
            if id(variable) in weights and "float" in str(variable.dtype):
                other = keras.ops.convert_to_tensor(
                    weights[id(variable)], variable.dtype
                )
                value = value + share * (other - value)
            state.append(value)
        return state

    # ---- Over the batches -------------------------------------------------

    def _over_batches(self, name, vector, state=None):
        self.passes += 1
        state = self._others if state is None else state
        function = self._functions[name]
        with tracing.no_gradients():
            # The same dropout masks at every point, with `training=True`.
            with devices.replayed(self._random_state):
                return [
                    function(self._values, state, batch, vector)
                    for batch in self._batches
                ]

    def _mean(self, losses):
        # In float64: differences of losses are small.
        losses = [float(keras.ops.convert_to_numpy(loss)) for loss in losses]
        return float(np.dot(self._shares, losses))

    def _sum(self, answers):
        if len(answers) == 1:
            return answers[0]
        total = self.vectors.scaled(self._shares[0], answers[0])
        for share, answer in zip(self._shares[1:], answers[1:]):
            total = self.vectors.plus(total, share, answer)
        return total


def _collected(model, data, steps, batch_size):
    """All batches, kept in memory: each pass must see the same ones."""
    batches, _ = iterate_whole(data, batch_size, model)
    collected = []
    for batch in devices.pooled(batches):
        collected.append(batch)
        if len(collected) == steps:
            break
    if not collected:
        raise ValueError(
            "`data` holds no batches (a generator can be used only once). "
            f"Received: data of type {type(data).__name__}"
        )
    return collected
