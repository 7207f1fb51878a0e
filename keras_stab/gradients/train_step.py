"""The only place that touches the Keras trainer.

`keras.Model` itself defines no `train_step`: the backend's trainer, further
along the method resolution order, does. `install` adds one that looks at the
optimizer. When no method there asks an oracle, the step that Keras would have
run runs, untouched. It also sees to it that a model which was lent other
weights for evaluation has its own back before it trains, and after a call that
raised.
"""

import contextlib
import functools

import keras

from keras_stab import keras_internals
from keras_stab.backend import devices
from keras_stab.backend import tracing
from keras_stab.backend import updates
from keras_stab.gradients.oracle import GradientOracle
from keras_stab.nesting import nest
from keras_stab.nesting import whole_nest


def wants_oracle(optimizer):
    """Whether the optimizer, or one inside it, asks for gradients itself."""
    for each in nest(optimizer):
        if hasattr(each, "wants_oracle"):
            return each.wants_oracle
    return False


def estimate(optimizer, oracle):
    """The gradient that the optimizer, or one inside it, wants to be given."""
    for each in nest(optimizer):
        if hasattr(each, "estimate"):
            return each.estimate(oracle)
    return oracle.gradient()


class TrainStep:
    """A `keras.Model` mixin with the step that `install` adds to all models.

    For those who want it explicit, after `keras_stab.uninstall()`:

    ```python
    class MyModel(keras_stab.TrainStep, keras.Model):
        ...
    ```
    """

    def train_step(self, *state_and_data):
        if _takes_over(self, state_and_data[-1]):
            return _train_step(self, *state_and_data)
        return super().train_step(*state_and_data)

    def make_train_function(self, force=False):
        _take_back(self)
        return super().make_train_function(force)

    def fit(self, *args, **kwargs):
        with _taking_back_on_error(self):
            return super().fit(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        with _taking_back_on_error(self):
            return super().evaluate(*args, **kwargs)

    def predict(self, *args, **kwargs):
        with _taking_back_on_error(self):
            return super().predict(*args, **kwargs)


def install():
    """Adds the dispatching `train_step` to `keras.Model`.

    Importing `keras_stab` does this. It changes nothing for a model whose
    optimizer holds no keras_stab method.
    """
    if vars(keras.Model).get("train_step") is _dispatch:
        return
    _dispatch.replaced = vars(keras.Model).get("train_step")
    keras.Model.train_step = _dispatch
    for name in _GUARDED:
        setattr(keras.Model, name, _guarded(name))


def uninstall():
    """Takes the `train_step` of `install` off `keras.Model` again."""
    if vars(keras.Model).get("train_step") is not _dispatch:
        return
    if _dispatch.replaced is None:
        del keras.Model.train_step
    else:
        keras.Model.train_step = _dispatch.replaced
    for name in _GUARDED:
        guarded = vars(keras.Model)[name]
        delattr(keras.Model, name)
        if guarded.replaced is not None:
            setattr(keras.Model, name, guarded.replaced)


def _dispatch(self, *state_and_data):
    if _takes_over(self, state_and_data[-1]):
        return _train_step(self, *state_and_data)
    if _dispatch.replaced is not None:
        return _dispatch.replaced(self, *state_and_data)
    return super(keras.Model, self).train_step(*state_and_data)


_dispatch.__name__ = "train_step"
_dispatch.replaced = None


_GUARDED = ("make_train_function", "fit", "evaluate", "predict")


def _guarded(name):
    """The method of that name, for a model that may hold lent weights."""
    method = getattr(keras.Model, name)

    @functools.wraps(method)
    def guarded(self, *args, **kwargs):
        if name == "make_train_function":
            _take_back(self)
        with _taking_back_on_error(self):
            return method(self, *args, **kwargs)

    guarded.replaced = vars(keras.Model).get(name)
    return guarded


def _lenders(model):
    """The methods in the optimizer that may have lent the model weights."""
    for optimizer in whole_nest(getattr(model, "optimizer", None)):
        if hasattr(optimizer, "swap_out"):
            yield optimizer


def _take_back(model):
    for method in _lenders(model):
        method.swap_out(model)


@contextlib.contextmanager
def _taking_back_on_error(model):
    """Ends what a callback began in this call, when the call raises."""
    lenders = list(_lenders(model))
    lent_before = any(method.swapped for method in lenders)
    state = _held_state(model) if lenders else []
    try:
        yield
    except BaseException:
        _recover_state(model, state)
        if not lent_before:
            _take_back(model)
        raise


def _held_state(model):
    """What `_recover_state` needs; nothing but references."""
    if not devices.FUNCTIONAL:
        return []
    variables = [*model.variables, *model.metrics_variables]
    return [(v, v.value) for v in variables if keras_internals.has_value(v)]


def _recover_state(model, state):
    """Gives variables their values back after `evaluate` has raised.

    On JAX Keras takes the values out of the variables while it runs, and does
    not put them back when `evaluate` or `predict` raises.
    """
    if not state:
        return
    tracing.sync_state(model)
    for variable, value in state:
        if not keras_internals.has_value(variable) and not value.is_deleted():
            variable.assign(value)


def _takes_over(model, data):
    if not wants_oracle(model.optimizer):
        return False
    keras_internals.build_for(model, data)
    # A model without trainable weights gets Keras's own warning.
    return bool(model.trainable_variables)


def _train_step(model, *state_and_data):
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
    _check_variables(model)
    with tracing.no_gradients():
        oracle = GradientOracle(model, x, y, sample_weight)
        gradients = estimate(model.optimizer, oracle)
        outcome = oracle.outcome
        with _handing_over(oracle):
            updates.apply_gradients(
                model.optimizer,
                oracle.to_optimizer(gradients),
                oracle.variables,
            )
        _keep(oracle, outcome)
        first_input = next(i for i in keras.tree.flatten(x) if i is not None)
        keras_internals.loss_tracker(model).update_state(
            devices.whole_loss(outcome.loss),
            sample_weight=keras.ops.shape(first_input)[0],
        )
        keras.tree.map_structure(
            keras_internals.set_mask, outcome.y_pred, outcome.masks
        )
        return model.compute_metrics(
            x, y, outcome.y_pred, sample_weight=sample_weight
        )


def _keep(oracle, outcome):
    """Assigns what the first evaluation at the current weights stored."""
    for variable, value in zip(
        oracle.model.non_trainable_variables, outcome.state
    ):
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
    for method, note in oracle.notes.items():
        method.handed_over = note
    try:
        yield
    finally:
        for method in oracle.notes:
            method.handed_over = None


def _check_variables(model):
    """JAX hands values over by position and would not notice by itself."""
    built = keras_internals.built_variables(model.optimizer)
    known = {id(variable) for variable in built}
    for variable in model.trainable_variables:
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
