"""Gradients of a batch for who measures: compiled, in either mode."""

import weakref

import keras

from keras_stab import keras_internals
from keras_stab.backend import devices
from keras_stab.backend import tracing
from keras_stab.gradients.one_pass.engine import one_pass
from keras_stab.gradients.one_pass.examination import examine
from keras_stab.gradients.one_pass.layout import Layout
from keras_stab.gradients.one_pass.units import Refusal
from keras_stab.gradients.oracle import GradientOracle
from keras_stab.gradients.rows import leaves
from keras_stab.memory import remembered


class MeasuringOracle(GradientOracle):
    """A `GradientOracle` at values that come in, trained or as in `predict`.

    Attributes:
        training: Whether layers run as in training.
    """

    def __init__(self, model, state, batch, training):
        super().__init__(model, *batch)
        self.values, self.non_trainable, self.carried = state
        self.training = training

    def predict(self, x):
        if keras_internals.accepts_training(self.model):
            return self.model(x, training=self.training)
        return self.model(x)


def values_of(model):
    """The values of all variables, as `MeasuringOracle` takes them."""
    tracing.sync_state(model)
    kinds = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.metrics_variables,
    )
    return [[tracing.read(v) for v in variables] for variables in kinds]


class BatchGradients:
    """What one batch gives, as compiled functions of its rows.

    They know the model weakly, and are kept on it: measuring it again
    compiles nothing.
    """

    def __init__(self, model, training):
        self._model = weakref.ref(model)
        self._training = training
        self._examined = {}
        self._random_state = devices.random_state()
        self._gram = tracing.compiled(self._of_gram)
        self._combined = tracing.compiled(self._of_combined)
        self._plain = tracing.compiled(self._of_plain)
        self._by_loss = tracing.compiled(self._of_losses)

    def gram(self, state, batch):
        """Inner products of the gradients of all rows, `(B, B)`.

        Raises:
            Refusal: Where the one-pass engine cannot give them.
        """
        return self._run(self._gram, state, batch)

    def combined(self, state, batch, weights):
        """`sum_i weights[i] g_i` over the rows, one tensor per variable."""
        return self._run(self._combined, state, batch, weights)

    def plain(self, state, batch):
        """The gradient of the loss of the batch, one tensor per variable."""
        with tracing.no_gradients(), devices.replayed(self._random_state):
            return self._plain(state, batch)

    def by_loss(self, state, batch):
        """The K gradients of the losses, one tensor `(K, ...)` per variable."""
        with tracing.no_gradients(), devices.replayed(self._random_state):
            return self._by_loss(state, batch)

    def examine(self, state, batch):
        """Finds out whether `gram` can answer for a batch of this kind.

        Raises:
            Refusal: If it cannot.
        """
        key = tuple((str(t.shape[1:]), str(t.dtype)) for t in leaves(batch[0]))
        if key not in self._examined:
            oracle = self._oracle(state, batch)
            self._examined[key] = examine(oracle)
        examined = self._examined[key]
        if examined.by_group:
            layer, _ = examined.by_group[0]
            raise Refusal(
                f"layer {layer.name!r} mixes the rows of a group in training"
            )
        return examined

    def _run(self, function, state, batch, *more):
        self.examine(state, batch)
        with tracing.no_gradients(), devices.replayed(self._random_state):
            return function(state, batch, *more)

    def _oracle(self, state, batch):
        return MeasuringOracle(self._model(), state, batch, self._training)

    def _by_row(self, state, batch):
        oracle = self._oracle(state, batch)
        layout = Layout(batch, leaves(batch)[0].shape[0])
        examined = self.examine(state, batch)
        _, answer = one_pass(oracle, layout, examined)
        self.is_of_rows = answer.is_of_rows
        return answer

    def _of_gram(self, state, batch):
        return self._by_row(state, batch).gram()

    def _of_combined(self, state, batch, weights):
        found = self._by_row(state, batch).combine(weights)
        return _whole(found, state[0])

    def _of_plain(self, state, batch):
        return _whole(self._oracle(state, batch).gradient(), state[0])

    def _of_losses(self, state, batch):
        found = self._oracle(state, batch).loss_gradients()
        count = (len(found.sizes),)
        return [
            keras.ops.zeros(count + tuple(value.shape)) if s is None else s
            for s, value in zip(found.stacks(), state[0])
        ]


def _whole(gradients, values):
    """Dense gradients, zero where there is none."""
    return [
        keras.ops.zeros_like(value) if g is None else tracing.densify(g)
        for g, value in zip(gradients, values)
    ]


def batch_gradients(model, training):
    """The `BatchGradients` of a model as it is compiled now."""
    known = remembered(model, "batch gradients")
    # The objects themselves are kept, so that no `id` is used again.
    parts = (
        training,
        keras_internals.compile_loss(model),
        *model.trainable_variables,
    )
    before = known.get("parts", ())
    same = len(before) == len(parts)
    if not (same and all(a is b for a, b in zip(before, parts))):
        known.update(parts=parts, found=BatchGradients(model, training))
    return known["found"]
