"""How an engine would answer for a model, found out without a step."""

import math

from keras_stab import keras_internals
from keras_stab.backend import costs
from keras_stab.backend import devices
from keras_stab.backend import exchange
from keras_stab.backend import tracing
from keras_stab.batches import iterate_whole
from keras_stab.gradients.oracle import GradientOracle


def plan_for(model, batch, groups_of, solve):
    """The `Plan` for one batch, as `fit` of the model takes it.

    Args:
        model: A compiled `keras.Model`.
        batch: Tuple `(x, y, sample_weight)` of arrays.
        groups_of: From a `GradientOracle` to a `GroupGradients`.
        solve: From both to weights and figures.
    """
    batches, _ = iterate_whole(batch, _ALL_ROWS, model)
    batch = next(batches)
    keras_internals.build_for(model, batch)
    plans = []

    def gradient(batch):
        return _known(GradientOracle(model, *batch).gradient())

    def ask(batch):
        oracle = GradientOracle(model, *batch)
        answer = groups_of(oracle)
        plans.append(answer.plan)
        return oracle, answer

    def combination(batch):
        oracle, answer = ask(batch)
        weights, measures = solve(oracle, answer)
        return [measures, *_known(answer.combine(weights))]

    # What is found out about the model is part of no step.
    tracing.traced(lambda batch: ask(batch) and None, batch)
    plan = plans[0]
    if exchange.batch_shares() == 1:
        with devices.replayed(devices.random_state()):
            stock, own = (
                costs.cost_of(f, batch) for f in (gradient, combination)
            )
        plan.step_ratio = _ratio(model, stock, own)
    return plan


def _ratio(model, stock, own):
    """Predicted time of a step over that of the inner optimizer alone."""
    machine = costs.machine()
    weights = sum(math.prod(v.shape) for v in model.trainable_variables)
    rest = costs.Cost(_OPERATIONS, 0, _BYTES * weights).seconds(machine)
    return (own.seconds(machine) + rest) / (stock.seconds(machine) + rest)


def _known(gradients):
    return [tracing.densify(g) for g in gradients if g is not None]


# Of a step besides its gradient: the trainer's loop and its metrics; ten
# passes over the weights, as Adam makes them.
_OPERATIONS = 100
_BYTES = 40
_ALL_ROWS = 2**31
