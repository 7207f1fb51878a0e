"""The loss of a batch as a pure function of the values of a model."""

import collections
import copy
from typing import Any

import keras

from keras_stab import keras_internals
from keras_stab.backend import devices
from keras_stab.backend import differentiation
from keras_stab.backend import tracing
from keras_stab.gradients.scope import RecordingScope
from keras_stab.types import Tensor

# What one evaluation of the loss leaves behind. `state`: the non-trainable
# values, `None` where unassigned. `carried`: values that go on from one group
# to the next (metrics, and variables that the model does not track).
# `replacements`: new values of the trainable variables that are not weights
# (`overwrite_with_gradient`: scales and histories of float8 layers), which come
# in place of a gradient; `None` for every weight.
Evaluation = collections.namedtuple(
    "Evaluation",
    ["loss", "y_pred", "masks", "state", "carried", "replacements"],
)


class BatchLoss:
    """The training loss of a batch, and its gradients, at given values.

    It assigns nothing: variables have the given values inside `scope`, and
    what the model would assign is returned as an `Evaluation`.

    Attributes:
        model: The compiled `keras.Model`.
        batch: Tuple `(x, y, sample_weight)`.
        variables: The trainable variables of the model.
        values: Their values, where gradients are taken.
        non_trainable_variables: The other variables of the model.
        non_trainable: Their values.
        carried_variables: Variables that are not the model's: metrics, and
            what the model assigns without tracking it.
        carried: The values of those.
        loss_scale: Scalar by which a loss scaler multiplies the loss, or
            `None`.
    """

    def __init__(self, model: keras.Model, batch: tuple[Any, Any, Any]):
        self.model = model
        self.batch = batch
        self.variables = list(model.trainable_variables)
        self.values = [tracing.read(v) for v in self.variables]
        # Kept: Keras walks through all layers to find them.
        self.non_trainable_variables = list(model.non_trainable_variables)
        self.non_trainable = [
            tracing.read(v) for v in self.non_trainable_variables
        ]
        self.carried_variables = list(model.metrics_variables)
        self.carried = [tracing.read(v) for v in self.carried_variables]
        self.loss_scale = _loss_scale(model.optimizer)
        self._sampler = None
        self._loss = None

    def with_values(self, values: list[Any]) -> "BatchLoss":
        """The same loss, whose weights come in as these tensors.

        For a part of the step that a backend traces by itself.
        """
        loss = copy.copy(self)
        loss.values = values
        return loss

    def evaluate(
        self,
        batch: tuple[Any, Any, Any],
        non_trainable: list[Any],
        carried: list[Any],
        share: Tensor | float = 1.0,
    ) -> tuple[Evaluation, list[Any]]:
        """The `Evaluation` of some rows and the gradients of the scaled loss.

        Gradients are `None` for variables that are not weights.

        Args:
            batch: As the attribute, or a part of it.
            non_trainable, carried: Values instead of the attributes.
            share: Scalar, the part of the rows of the whole batch. Layers
                that take statistics of the gradients which pass through them
                see those of the whole batch.
        """
        x, y, sample_weight = batch
        shared = any(v.overwrite_with_gradient for v in self.variables)

        def scaled_loss(values):
            loss, evaluation = self._scaled_loss(
                values, non_trainable, carried, x, y, sample_weight
            )
            if shared:
                loss = loss * keras.ops.cast(share, loss.dtype)
            return loss, evaluation

        (_, evaluation), gradients = differentiation.value_and_gradients(
            scaled_loss, self.values
        )
        evaluation, gradients = self.without_replacements(evaluation, gradients)
        if shared:
            share = keras.ops.cast(share, evaluation.loss.dtype)
            gradients = self.times(gradients, 1.0 / share)
        return evaluation, gradients

    def evaluate_with_pullback(self) -> tuple[Any, ...]:
        """As `evaluate` for the whole batch, with a way back from the outputs.

        Returns:
            `evaluation, gradients, masks, pull`: the padding masks of the
            outputs, and a function from gradients with respect to the outputs
            to those with respect to the values.
        """
        x, y, sample_weight = self.batch

        def scaled_loss(values):
            loss, evaluation = self._scaled_loss(
                values, self.non_trainable, self.carried, x, y, sample_weight
            )
            outputs = keras.tree.flatten(evaluation.y_pred)
            masks = [keras_internals.get_mask(o) for o in outputs]
            return loss, (outputs, (evaluation, masks))

        (_, kept), gradients, pull = (
            differentiation.value_gradients_and_pullback(
                scaled_loss, self.values
            )
        )
        evaluation, masks = kept
        evaluation, gradients = self.without_replacements(evaluation, gradients)

        def pull_weights(cotangents):
            return self.without_replacements(evaluation, pull(cotangents))[1]

        return evaluation, gradients, masks, pull_weights

    def without_replacements(
        self, evaluation: Evaluation, gradients: list[Any]
    ) -> tuple[Evaluation, list[Any]]:
        """Moves what is not a gradient into the evaluation."""
        replacements = [
            g if v.overwrite_with_gradient else None
            for g, v in zip(gradients, self.variables)
        ]
        gradients = [
            None if v.overwrite_with_gradient else g
            for g, v in zip(gradients, self.variables)
        ]
        return evaluation._replace(replacements=replacements), gradients

    def scope(
        self, values: list[Any], non_trainable: list[Any], carried: list[Any]
    ) -> RecordingScope:
        """Within it, the model's variables have these values."""
        return RecordingScope(
            [
                *zip(self.variables, values),
                *zip(self.non_trainable_variables, non_trainable),
                *zip(self.carried_variables, carried),
            ]
        )

    def predict(self, x: Any) -> Any:
        """The model's outputs in training mode; inside `scope`."""
        if keras_internals.accepts_training(self.model):
            return self.model(x, training=True)
        return self.model(x)

    def labels(self, y: Any, y_pred: Any) -> Any:
        """The labels, drawn from `y_pred` if the loss has a label sampler."""
        if self._sampler is None:
            return y
        return self._sampler(
            y, keras.tree.map_structure(keras.ops.stop_gradient, y_pred)
        )

    def evaluation(
        self, scope: RecordingScope, loss: Tensor, y_pred: Any
    ) -> Evaluation:
        """What the computation inside `scope` leaves behind."""
        self._track_foreign(scope)
        return Evaluation(
            loss=loss,
            y_pred=y_pred,
            masks=_masks_for_metrics(y_pred),
            state=[
                scope.assigned_value(v) for v in self.non_trainable_variables
            ],
            carried=[
                scope.get_current_value(v) for v in self.carried_variables
            ],
            replacements=[None] * len(self.variables),
        )

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss times the loss scale."""
        if self.loss_scale is None:
            return loss
        return loss * keras.ops.cast(self.loss_scale, loss.dtype)

    def unscaled(self, gradients: list[Any]) -> list[Any]:
        """Gradients of the loss from those of the scaled loss."""
        if self.loss_scale is None:
            return gradients
        return self.times(gradients, 1.0 / self.loss_scale)

    def times(self, gradients: list[Any], factor: Any) -> list[Any]:
        """The gradients times a scalar, in full precision."""
        return [
            None if g is None else keras.ops.multiply(g, factor)
            for g in gradients
        ]

    def _scaled_loss(self, values, non_trainable, carried, x, y, sample_weight):
        with self.scope(values, non_trainable, carried) as scope:
            y_pred = self.predict(x)
            y = self.labels(y, y_pred)
            if self._loss is None:
                loss = keras_internals.compute_loss(
                    self.model, x, y, y_pred, sample_weight
                )
            else:
                loss = self._loss(y, y_pred, sample_weight)
        return self.scaled(loss), self.evaluation(scope, loss, y_pred)

    def _track_foreign(self, scope):
        """Finds variables that the model does not own but assigns.

        The global seed generator is one. The stock step moves them on the
        backends that assign in place; in JAX they are constants of the step.
        """
        if devices.FUNCTIONAL:
            return
        known = {id(v) for v in self.variables}
        known.update(id(v) for v in self.non_trainable_variables)
        known.update(id(v) for v in self.carried_variables)
        for variable in scope.assigned.values():
            if id(variable) not in known:
                self.carried_variables.append(variable)


def _masks_for_metrics(outputs):
    """The masks that metrics will see; Keras's own step on JAX loses them."""

    def mask(tensor):
        return None if devices.FUNCTIONAL else keras_internals.get_mask(tensor)

    if keras.ops.is_tensor(outputs):  # without tree operations
        return mask(outputs)
    return keras.tree.map_structure(mask, outputs)


def _loss_scale(optimizer):
    scale = optimizer.scale_loss(1.0)
    if isinstance(scale, float) and scale == 1.0:
        return None
    return scale
