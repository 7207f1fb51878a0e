"""The gradient of each loss that a model was compiled with."""

import math

import keras

from keras_stab import keras_internals
from keras_stab.backend import exchange
from keras_stab.backend import several_gradients
from keras_stab.backend import tracing
from keras_stab.gradients import rows
from keras_stab.gradients.groups import collected
from keras_stab.gradients.plan import Plan
from keras_stab.gradients.pooling import largest
from keras_stab.numerics.min_norm import MAX_GROUPS

# What an argument `groups` calls them.
LOSSES = "losses"


def by_loss(oracle):
    r"""Gradients of K losses, by one forward pass and K passes back.

    Group k is all rows, with the loss $K w_k L_k + R$: $w_k$ is the weight that
    `compile` was given for $L_k$, and R all penalties. So the mean over the
    groups is the gradient of the model's loss.

    Args:
        oracle: The `GradientOracle`.
    """
    count = count_losses(oracle.model)
    # Nothing is cut, so that the rest of the batch may be of any kind.
    size = rows.length(rows.leaves(oracle.batch[0])[0])
    rows.check_not_empty(size)
    evaluation, gradients = _evaluate(oracle)
    oracle.record(evaluation)
    answer = collected(oracle, gradients, [size] * count, False, float(count))
    answer.rows = answer.sizes[0]
    answer.summed_whole = not exchange.sees_own_rows()
    plan = Plan("one_forward", "one forward pass, one back per loss", count)
    plan.grouping = LOSSES
    weights = sum(math.prod(v.shape) for v in oracle.variables)
    plan.traffic = answer.traffic(weights, count, False)
    answer.plan = plan
    return answer


def _evaluate(oracle):
    """The `Evaluation` of the batch, and scaled gradients for each loss.

    Each loss has its weight and an equal part of the penalties, so that all of
    them add up to the loss.
    """
    x, y, sample_weight = oracle.batch
    model = oracle.model

    def scaled_losses(values):
        with oracle.scope(
            values, oracle.non_trainable, oracle.carried
        ) as scope:
            y_pred = oracle.predict(x)
            loss, each = keras_internals.compiled_losses(
                model, oracle.labels(y, y_pred), y_pred, sample_weight
            )
            _check_count(len(each), model)
            penalties = [
                keras.ops.cast(penalty, loss.dtype)
                for penalty in keras_internals.penalties(model)
            ]
        if penalties:
            loss = keras.ops.sum([loss, *penalties])
            share = sum(penalties) / len(each)
            each = [part + share for part in each]
        each = [oracle.scaled(part) for part in each]
        return each, oracle.evaluation(scope, loss, y_pred)

    (_, evaluation), each = several_gradients.values_and_gradients(
        scaled_losses, oracle.values
    )
    parts = [oracle.without_replacements(evaluation, g) for g in each]
    replacements = largest([part.replacements for part, _ in parts])
    return evaluation._replace(replacements=replacements), [
        [tracing.densify(g) for g in gradients] for _, gradients in parts
    ]


def count_losses(model):
    """K, how many losses a model was compiled with.

    Raises:
        ValueError: If they are not at least two, or not those that the model
            is trained with.
    """
    if type(model).compute_loss is not keras.Model.compute_loss:
        raise ValueError(
            'groups="losses" takes the losses of `compile`, but the model has '
            "a `compute_loss` of its own, which returns one number. Delete it "
            "and pass `compile` a loss for each output, with `add_loss` for "
            "what else there is; or use groups of rows, for example groups=8. "
            f"Received: compute_loss of {type(model).__name__}"
        )
    count = len(keras_internals.loss_entries(model))
    _check_count(count, model)
    return count


def _check_count(count, model):
    if 2 <= count <= MAX_GROUPS:
        return
    how = "a model with several outputs and a loss for each of them"
    if count > MAX_GROUPS:
        how = f"a model with at most {MAX_GROUPS} losses"
    raise ValueError(
        f'groups="losses" makes a group of each loss of `compile`: use {how}, '
        'for example loss={"a": "mse", "b": "mae"}; or groups of rows, for '
        f"example groups=8. Received: model {model.name!r} with {count} "
        f"{'loss' if count == 1 else 'losses'}"
    )
