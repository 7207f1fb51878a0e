"""The train step of methods that ask for more than one gradient.

The only place that does the work of a Keras trainer's `train_step`; see
`keras_stab.trainer` for how a model comes to run it.
"""

import contextlib

import keras

from keras_stab import keras_internals
from keras_stab.backend import devices
from keras_stab.backend import tracing
from keras_stab.backend import updates
from keras_stab.gradients.rank_oracle import oracle_for
from keras_stab.gradients.rows import leaves
from keras_stab.gradients.spike_watch import watched
from keras_stab.gradients.watched_step import watched_step
from keras_stab.nesting import nest


def wants_oracle(optimizer):
    """Whether the optimizer, or one inside it, asks for gradients itself."""
    for each in nest(optimizer):
        if hasattr(each, "wants_oracle"):
            return each.wants_oracle
    return False


def takes_step(optimizer):
    """Whether `fit` makes its steps by the oracle.

    Where several processes train one model, that brings gradients together:
    there a method which chooses the gradient does so for all of them.
    """
    return wants_oracle(optimizer) or (
        devices.ranks() > 1
        and any(hasattr(each, "handed_over") for each in nest(optimizer))
    )


def estimate(optimizer, oracle):
    """The gradient that the optimizer, or one inside it, wants to be given."""
    for each in nest(optimizer):
        if hasattr(each, "estimate"):
            oracle.asked_by = each
            gradients = each.estimate(oracle)
            if hasattr(each, "handed_over"):  # even if it has nothing to say
                oracle.notes.setdefault(each, ())
            return gradients
    return oracle.gradient()


def takes_step_of(model):
    """Whether the next step of a model is one by the oracle."""
    return takes_step(model.optimizer) or watched(model) is not None


def takes_over(model, data):
    """Whether this step is made here, and not by Keras."""
    if not takes_step_of(model):
        return False
    keras_internals.build_for(model, data)
    # A model without trainable weights gets Keras's own warning.
    return bool(model.trainable_variables)


def train_step(model, *state_and_data):
    """One step; with a state (JAX) the new state is returned, not assigned."""
    *state, data = state_and_data
    if not state:
        return _step(model, data)
    kinds = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    mapping = [
        pair
        for kind, values in zip(kinds, state[0])
        for pair in zip(kind, values)
    ]
    with keras.StatelessScope(mapping) as scope:
        logs = _step(model, data)
    return logs, tuple(
        [scope.get_current_value(v) for v in kind] for kind in kinds
    )


def _step(model, data):
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    _check_scalers(model.optimizer)
    with tracing.no_gradients():
        oracle = oracle_for(model, x, y, sample_weight)
        _check_variables(model, oracle.variables)
        gradients = estimate(model.optimizer, oracle)
        outcome = oracle.outcome

        def update():
            with _handing_over(oracle):
                updates.apply_gradients(
                    model.optimizer,
                    oracle.to_optimizer(gradients),
                    oracle.variables,
                )
            _keep(oracle, outcome)

        def metrics():
            return _metrics(model, x, y, sample_weight, outcome)

        if watched(model) is None:
            update()
            logs = metrics()
        else:
            logs = watched_step(model, oracle, gradients, update, metrics)
        # It refers to itself: otherwise the tensors of a step would live until
        # Python looks for cycles, and the next could not have their memory.
        vars(oracle).clear()
        return logs


def _metrics(model, x, y, sample_weight, outcome):
    """Updates loss tracker and metrics; the logs of the step."""
    first_input = leaves(x)[0]
    keras_internals.loss_tracker(model).update_state(
        devices.whole_loss(outcome.loss),
        sample_weight=keras.ops.shape(first_input)[0],
    )
    if keras.ops.is_tensor(outcome.y_pred):  # without tree operations
        keras_internals.set_mask(outcome.y_pred, outcome.masks)
    else:
        keras.tree.map_structure(
            keras_internals.set_mask, outcome.y_pred, outcome.masks
        )
    return model.compute_metrics(
        x, y, outcome.y_pred, sample_weight=sample_weight
    )


def _keep(oracle, outcome):
    """Assigns what the first evaluation at the current weights stored."""
    for variable, value in zip(oracle.non_trainable_variables, outcome.state):
        if value is not None:
            variable.assign(value)
    # Metrics come back as they were unless the loss updates them.
    before = dict(zip(map(id, oracle.carried_variables), oracle.carried))
    for variable, value in zip(oracle.carried_variables, outcome.carried):
        if value is not None and value is not before.get(id(variable)):
            variable.assign(value)


@contextlib.contextmanager
def _handing_over(oracle):
    """Tells each method that the gradients are those which it estimated."""
    # Past Keras, which would look through what is set for variables.
    for method, note in oracle.notes.items():
        vars(method)["handed_over"] = note
    try:
        yield
    finally:
        for method in oracle.notes:
            vars(method)["handed_over"] = None


def _check_variables(model, variables):
    """JAX passes values by position and would not notice by itself."""
    built = keras_internals.built_variables(model.optimizer)
    known = {id(variable) for variable in built}
    for variable in variables:
        if id(variable) not in known:
            raise ValueError(
                f"Unknown variable: {variable.path}. The optimizer was built "
                "with the variables of another model, or before a layer was "
                "thawed: compile with a new optimizer"
            )


def _check_scalers(optimizer):
    kind = keras.optimizers.LossScaleOptimizer
    scalers = sum(isinstance(each, kind) for each in nest(optimizer))
    if scalers > 1:
        raise ValueError(
            "The loss would be scaled twice: `compile` puts a "
            "LossScaleOptimizer on top under mixed_float16. Leave your own "
            "out, or compile with auto_scale_loss=False. Received: "
            f"{scalers} nested LossScaleOptimizers"
        )
