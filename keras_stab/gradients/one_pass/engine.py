"""The one-pass engine: group gradients from one forward and one backward.

The backward pass stops at the outputs of the layers that own weights. The
input of a layer and the gradient with respect to its output then give, layer
by layer, its part of the Gram matrix and of the combination.
"""

import keras

from keras_stab.backend import devices
from keras_stab.backend import differentiation
from keras_stab.gradients.one_pass.contributions import join
from keras_stab.gradients.one_pass.gradients import OnePassGradients
from keras_stab.gradients.one_pass.group_forward import GroupForward
from keras_stab.gradients.one_pass.group_forward import of_copies
from keras_stab.gradients.one_pass.group_forward import refuse_batch_norm
from keras_stab.gradients.one_pass.group_forward import with_enough_rows
from keras_stab.gradients.one_pass.group_losses import GroupLosses
from keras_stab.gradients.one_pass.layer_calls import NOMINAL_ROWS
from keras_stab.gradients.one_pass.layer_calls import CallWithoutRows
from keras_stab.gradients.one_pass.layer_calls import LayerCall
from keras_stab.gradients.one_pass.layer_rules import contributions
from keras_stab.gradients.one_pass.units import Recorder
from keras_stab.gradients.one_pass.units import Refusal
from keras_stab.gradients.one_pass.units import floating
from keras_stab.numerics.norms import in_full_precision


def one_pass(oracle, layout, examined):
    """The `Evaluation` of a batch, and the `OnePassGradients` of K groups.

    Args:
        oracle: The `GradientOracle`.
        layout: The `Layout` of its batch.
        examined: The answer of `examine`.

    Raises:
        Refusal: If the answer would be wrong for this model and loss.
    """
    with_enough_rows(layout, examined.by_group)
    x, y, sample_weight = layout.batch
    losses = GroupLosses(oracle, layout)
    calls, draws = [], []

    def run(tap):
        values = [differentiation.constant(v) for v in oracle.values]
        scope = oracle.scope(values, oracle.non_trainable, oracle.carried)
        by_group = GroupForward(examined.by_group, layout, scope, tap)
        recorder = Recorder(
            examined.units,
            scope,
            tap,
            layout.spread,
            examined.without_rows,
            by_group=by_group,
        )
        with scope:
            with recorder.listening():
                y_pred = oracle.predict(x)
            # One without weights may have been thawed since the examination.
            refuse_batch_norm(examined.batch_norms, scope)
            if examined.by_group:
                by_group.finish(oracle.state_pool())
            _check_rows(recorder.calls, y_pred)
            if scope.losses:
                raise Refusal("a layer adds a loss of the batch (add_loss)")
            labels = oracle.labels(y, y_pred)
            total, loss = losses(x, labels, y_pred, sample_weight)
        if scope.strays:
            raise Refusal(
                f"variable {scope.strays[0].path!r} is read outside of the "
                "call of the layer that owns it"
            )
        calls[:], draws[:] = recorder.calls, [scope.draws]
        evaluation = oracle.evaluation(scope, loss, y_pred)
        tensors = []
        if devices.FUNCTIONAL:
            tensors = [(c.tensors(), c.outputs) for c in calls]
        return oracle.scaled(total), (evaluation, tensors)

    (_, (evaluation, tensors)), gradients = differentiation.gradients_at_taps(
        run
    )
    evaluation = evaluation._replace(
        y_pred=layout.restore(evaluation.y_pred),
        masks=layout.restore(evaluation.masks),
    )
    remaining = iter(gradients)
    by_variable = {}
    for call, (inputs, outputs) in zip(calls, tensors):
        call.args, call.kwargs = call.with_tensors(inputs)
        call.outputs = outputs
    for call in calls:
        cotangents = [next(remaining) for _ in call.outputs]
        if all(c is None for c in cotangents):
            continue
        cotangents = _unscaled(oracle, cotangents)
        if call.weights is not None:
            tokens = layout.size if layout.is_static else NOMINAL_ROWS
            answer = of_copies(call.weights, cotangents, tokens)
        else:
            kind = LayerCall if call.shapes is None else CallWithoutRows
            answer = contributions(kind(oracle, layout, call, cotangents))
        for key, contribution in answer.items():
            if key in by_variable:
                contribution = join(by_variable[key], contribution)
            by_variable[key] = contribution
    regularised = losses.regularisation_gradients()
    answer = OnePassGradients(
        oracle, layout, by_variable, losses.factors(), regularised
    )
    (answer.draws,) = draws
    return evaluation, answer


def _check_rows(calls, y_pred):
    """TensorFlow may leave more open than the number of rows."""
    tensors = [t for call in calls for t in (*call.tensors(), *call.outputs)]
    for tensor in tensors + floating(y_pred):
        shape = tuple(tensor.shape[1:])
        if None in shape:
            raise Refusal(
                "the shape of a row (the length of a sequence, say) is not "
                "known while the step is traced"
            )
        if 0 in shape:
            raise Refusal("a row of a layer is empty (a sequence of length 0)")


def _unscaled(oracle, gradients):
    if oracle.loss_scale is None:
        return gradients
    return [
        None if g is None else _divided(in_full_precision(g), oracle.loss_scale)
        for g in gradients
    ]


def _divided(tensor, scale):
    return tensor / keras.ops.cast(scale, tensor.dtype)
