"""The loss of one batch and its derivatives, as compiled functions."""

import weakref

import keras

from keras_stab import keras_internals
from keras_stab.backend import differentiation
from keras_stab.backend import jacobians
from keras_stab.backend import many_tensors
from keras_stab.backend import tracing
from keras_stab.gradients.scope import RecordingScope
from keras_stab.memory import remembered
from keras_stab.numerics.vectors import Vectors


def compiled_functions(model, loss, training, variables, others):
    """The compiled functions, from an earlier call if those still fit.

    Measuring a model again, for example after the next epoch, compiles nothing.
    As in Keras's own steps, settings of layers are part of what is compiled
    and are read again after `compile`.
    """
    compile_loss = keras_internals.compile_loss(model)
    # The objects themselves are kept too, so that no `id` is used again.
    parts = (loss, compile_loss, training, *variables, *others)
    known = remembered(model, "batch functions")
    if known:
        before, functions = known["parts"], known["functions"]
        same = len(before) == len(parts)
        if same and all(a is b for a, b in zip(before, parts)):
            return functions
    functions = _make_functions(model, loss, training, variables, others)
    known.update(parts=parts, functions=functions)
    return functions


def _make_functions(model, loss, training, variables, others):
    # The functions stand on the model: a strong reference would be a circle.
    model = weakref.ref(model)
    shapes = [tuple(v.shape) for v in variables]
    dtype = many_tensors.common_dtype(variables)

    def pieces(vector, values):
        return [
            keras.ops.cast(piece, value.dtype)
            for piece, value in zip(
                many_tensors.unpack_vector(vector, shapes), values
            )
        ]

    def packed(tensors):
        return many_tensors.pack_vector(
            [keras.ops.cast(t, dtype) for t in tensors]
        )

    def at(values, other_values, batch):
        mapping = [*zip(variables, values), *zip(others, other_values)]
        with RecordingScope(mapping):
            return _batch_loss(model(), loss, training, *batch)

    def moved(values, shift):
        return [v + piece for v, piece in zip(values, pieces(shift, values))]

    def batch_loss(values, other_values, batch, shift):
        return at(moved(values, shift), other_values, batch)

    def gradient(values, other_values, batch, shift):
        values = moved(values, shift)
        (scalar, _), gradients = differentiation.value_and_gradients(
            lambda values: (at(values, other_values, batch), ()), values
        )
        return scalar, packed(
            keras.ops.zeros_like(v) if g is None else tracing.densify(g)
            for v, g in zip(values, gradients)
        )

    def product(values, other_values, batch, vector):
        return packed(
            jacobians.hessian_vector_product(
                lambda values: at(values, other_values, batch),
                values,
                pieces(vector, values),
            )
        )

    def by_variable(left, right):
        products = [a * b for a, b in zip(left, right)]
        return keras.ops.stack(
            [
                keras.ops.sum(piece)
                for piece in many_tensors.unpack_vector(products, shapes)
            ]
        )

    return {
        "loss": tracing.compiled(batch_loss),
        "gradient": tracing.compiled(gradient),
        "product": tracing.compiled(product),
        "by_variable": tracing.compiled(by_variable),
        "vectors": Vectors(tracing.compiled),
    }


def _batch_loss(model, loss, training, x, y, sample_weight):
    """What Keras computes for a batch; runs inside a stateless scope."""
    if keras_internals.accepts_training(model):
        y_pred = model(x, training=training)
    else:
        y_pred = model(x)
    if loss is None:
        total = keras_internals.compute_loss(
            model, x, y, y_pred, sample_weight, training=training
        )
        return keras.ops.cast(total, _at_least_float32(total))
    loss = keras.losses.get(loss)
    if not isinstance(loss, keras.losses.Loss):
        loss = _FunctionLoss(loss)
    total = loss(y, y_pred, sample_weight)
    for penalty in model.losses:
        total = total + keras.ops.cast(penalty, total.dtype)
    return keras.ops.cast(total, _at_least_float32(total))


class _FunctionLoss(keras.losses.Loss):
    """The mean over rows of a function, as `compile` makes it."""

    def __init__(self, function):
        super().__init__(name="function")
        self.call = function


def _at_least_float32(tensor):
    return many_tensors.common_dtype([tensor])
