"""A train step that is watched for spikes."""

import contextlib

import keras

from keras_stab import keras_internals
from keras_stab.backend import devices
from keras_stab.backend import under_condition
from keras_stab.gradients.spike_watch import watched
from keras_stab.nesting import scales_loss
from keras_stab.nesting import whole_nest


def watched_step(model, oracle, gradients, update, metrics):
    """Makes the update, unless it is a spike that is to be skipped.

    A skipped step leaves weights, optimizer, stored state of the layers and
    metrics as they were, as if its batch had not come.

    Args:
        model: The model.
        oracle: The `GradientOracle` of the step.
        gradients: Those that go to the optimizer, not scaled.
        update: Function that makes the update.
        metrics: Function that updates the metrics and returns the logs.

    Returns:
        The logs of the step.
    """
    _check_devices()
    watch, rule = watched(model)
    usual, factor = rule.look(
        watch, oracle.outcome.loss, gradients, scales_loss(model.optimizer)
    )

    def scaled_update():
        with scaled_rates(model.optimizer, factor):
            update()

    if not rule.skips:
        scaled_update()
        return metrics()
    optimizer = model.optimizer
    changing = [
        *oracle.variables,
        *optimizer.variables,
        *oracle.non_trainable_variables,
    ]
    own = {id(v) for v in watch.variables}
    counted = [v for v in model.metrics_variables if id(v) not in own]
    foreign = oracle.carried_variables[len(model.metrics_variables) :]
    under_condition.run_if(usual, scaled_update, [*changing, *foreign])
    if isinstance(usual, bool):  # nothing to take back
        return metrics() if usual else model.get_metrics_result()
    before = under_condition.values_before(counted)
    logs = metrics()
    under_condition.take_back_unless(usual, counted, before)
    # Those that were taken from metrics come from what these hold now.
    held = model.get_metrics_result()
    return {key: held.get(key, value) for key, value in logs.items()}


def _check_devices():
    count = max(devices.replicas(), devices.ranks())
    if count > 1:
        raise ValueError(
            "RecoverFromSpikes decides for one process, which alone sees its "
            "loss: leave it out under tf.distribute and torch.distributed, or "
            "train on several devices with keras.distribution (JAX). "
            f"Received: {count} replicas or processes"
        )


@contextlib.contextmanager
def scaled_rates(optimizer, factor):
    """Within it, updates are made with `factor` times the learning rates.

    Args:
        optimizer: With all that is inside of it.
        factor: Scalar tensor, or `None` for 1.
    """
    rates = [] if factor is None else rates_of(optimizer)
    before = under_condition.values_before(rates)
    for rate, value in zip(rates, before):
        rate.assign(keras.ops.cast(value * factor, value.dtype))
    try:
        yield
    finally:
        for rate, value in zip(rates, before):
            rate.assign(value)


def rates_of(optimizer):
    """The variables that hold the learning rates; `None` for a schedule."""
    return [
        keras_internals.rate_variable(each)
        for each in whole_nest(optimizer)
        if not hasattr(each, "inner_optimizer")
        and not hasattr(each, "optimizers")
    ]
