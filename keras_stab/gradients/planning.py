"""How an engine would answer for a model, found out without a step."""

from keras_stab import keras_internals
from keras_stab.backend import tracing
from keras_stab.batches import iterate_whole
from keras_stab.gradients.oracle import GradientOracle


def plan_for(model, batch, groups, engine, rule):
    """The `Plan` for one batch, as `fit` of the model takes it.

    Args:
        model: A compiled `keras.Model`.
        batch: Tuple `(x, y, sample_weight)` of arrays.
        groups, engine, rule: As in `GradientOracle.group_gradients`.
    """
    batches, _ = iterate_whole(batch, _ALL_ROWS, model)
    batch = next(batches)
    keras_internals.build_for(model, batch)
    plans = []

    def ask(batch):
        oracle = GradientOracle(model, *batch)
        answer = oracle.group_gradients(groups, engine, rule)
        plans.append(answer.plan)

    tracing.traced(ask, batch)
    return plans[0]


_ALL_ROWS = 2**31
