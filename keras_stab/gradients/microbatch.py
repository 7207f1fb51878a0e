"""The microbatch engine: the ordinary gradient of every group, any model."""

import keras

from keras_stab import keras_internals
from keras_stab.backend import devices
from keras_stab.backend import exchange
from keras_stab.backend import tracing
from keras_stab.gradients import rows
from keras_stab.gradients.convolutional import has_convolution
from keras_stab.gradients.device_groups import InTurn
from keras_stab.gradients.device_groups import groups_on_own_device
from keras_stab.gradients.device_groups import groups_over_devices
from keras_stab.gradients.groups import StoredGradients
from keras_stab.gradients.groups import collected
from keras_stab.gradients.pooling import largest
from keras_stab.gradients.pooling import rows_check
from keras_stab.gradients.pooling import shift_seeds
from keras_stab.gradients.pooling import weighted_sum


def microbatch(oracle, grouping, rows_apart=False):
    """The ordinary gradient of every group, one group after another.

    Args:
        oracle: The `GradientOracle`.
        grouping: The `Grouping` of its rows.
        rows_apart: Whether it is known that the model does not mix the rows
            of a group and that its loss is a mean over them.
    """
    groups = grouping.groups
    size = rows.batch_size(*oracle.batch)
    sizes = grouping.sizes(size)
    rows.check_not_empty(size)
    batch = oracle.batch
    if groups > 1:
        _check_model(oracle, size, grouping)
        conditions = rows.length_checks(batch)
        if not rows.is_static(size):
            conditions += _batch_norm_checks(oracle, size, grouping)
        if conditions:
            batch = tracing.checked(batch, conditions)
    scanned = (
        devices.FUNCTIONAL
        and groups > 1
        and rows.is_static(size)
        and size % groups == 0
        and not has_convolution(oracle.model)
    )
    run = _run_scanned if scanned else _run_unrolled
    where = _on_devices(grouping, size, rows_apart)
    try:
        if where is not None:
            try:
                evaluation, gradients = where(oracle, batch, grouping, size)
            except InTurn:
                where = None
        if where is None:
            evaluation, gradients = run(oracle, batch, grouping, size, sizes)
    except Exception as error:
        error.add_note(
            "This happened while the model ran on the rows of one group, a "
            "part of the batch: it must accept any batch size, and so must "
            "the backend's gradients of its layers."
        )
        raise
    oracle.record(evaluation)
    if where is groups_over_devices:
        shapes = [tuple(v.shape) for v in oracle.variables]
        slices = exchange.GroupSlices(gradients, sizes, shapes)
        return StoredGradients(oracle, slices, shapes)
    if exchange.sees_own_rows():
        return collected(oracle, gradients, sizes, grouping.aligned)
    aligned = where is groups_on_own_device
    answer = collected(oracle, gradients, sizes, aligned)
    answer.aligned, answer.summed_whole = aligned, where is None
    return answer


def _on_devices(grouping, size, rows_apart):
    """How groups are formed on each device by itself, or `None`."""
    shares = exchange.batch_shares()
    if not exchange.computes_on_each_device() or size % shares:
        return None
    if grouping.groups % shares == 0 and size % grouping.groups == 0:
        return groups_on_own_device
    own = size // shares
    if grouping.rule == "interleaved" and own % grouping.groups == 0:
        return groups_over_devices if rows_apart else None
    return None


def _run_unrolled(oracle, batch, grouping, size, sizes):
    """Evaluates each group by itself; on TensorFlow and JAX in one graph."""
    groups = grouping.groups
    if rows.is_static(size):  # those without rows come last
        groups = sum(n > 0 for n in sizes)
    evaluations = []
    gradients = []
    carried = oracle.carried
    variables = oracle.model.non_trainable_variables
    shares = _shares(sizes[:groups], size)
    for k in range(groups):

        def evaluate(k=k, carried=carried):
            evaluation, group = oracle.evaluate(
                grouping.take(batch, k, size),
                shift_seeds(variables, oracle.non_trainable, k),
                carried,
                shares[k],
            )
            return evaluation, [tracing.densify(g) for g in group]

        if k == 0 or rows.is_static(size):
            evaluation, group = evaluate()
        else:
            evaluation, group = tracing.evaluate_if(
                sizes[k] > 0,
                evaluate,
                _without_rows(oracle, evaluations[0], carried),
            )
        evaluations.append(evaluation)
        gradients.append(group)
        carried = evaluation.carried
    losses = [evaluation.loss for evaluation in evaluations]
    merged = evaluations[0]._replace(
        loss=weighted_sum(shares, losses),
        y_pred=grouping.merge([e.y_pred for e in evaluations], size),
        masks=grouping.merge([e.masks for e in evaluations], size),
        state=oracle.state_pool().merge(
            oracle.non_trainable, [e.state for e in evaluations], shares
        ),
        carried=carried,
        replacements=largest([e.replacements for e in evaluations]),
    )
    return merged, gradients


def _run_scanned(oracle, batch, grouping, size, sizes):
    """Groups of equal size in one loop: the memory of one group at a time."""
    groups = grouping.groups
    variables = oracle.model.non_trainable_variables

    def one_group(carried, inputs):
        k, part = inputs
        evaluation, group = oracle.evaluate(
            part,
            shift_seeds(variables, oracle.non_trainable, k),
            carried,
            1.0 / groups,
        )
        carried = evaluation.carried
        return carried, (evaluation._replace(carried=[]), group)

    batches = grouping.stack(batch)
    carried, (stacked, gradients) = tracing.scan(
        one_group,
        oracle.carried,
        (keras.ops.arange(groups, dtype="int32"), batches),
    )
    shares = [1.0 / groups] * groups
    states = [
        [None if v is None else v[k] for v in stacked.state]
        for k in range(groups)
    ]
    merged = stacked._replace(
        loss=keras.ops.mean(stacked.loss),
        y_pred=grouping.unstack(stacked.y_pred),
        masks=grouping.unstack(stacked.masks),
        state=oracle.state_pool().merge(oracle.non_trainable, states, shares),
        carried=carried,
        replacements=[
            None if v is None else keras.ops.max(v, axis=0)
            for v in stacked.replacements
        ],
    )
    return merged, gradients


def _without_rows(oracle, first, carried):
    """Returns what an empty group gives: zeros, and an unchanged state."""

    def otherwise(structure):
        evaluation, group = structure

        def no_rows(leaf):
            return None if leaf is None else leaf[:0]

        empty = evaluation._replace(
            loss=keras.ops.zeros_like(first.loss),
            y_pred=keras.tree.map_structure(no_rows, first.y_pred),
            masks=keras.tree.map_structure(no_rows, first.masks),
            state=first.state,
            carried=carried,
            replacements=first.replacements,
        )
        zeros = [
            None if g is None else keras.ops.zeros_like(v)
            for g, v in zip(group, oracle.values)
        ]
        return empty, zeros

    return otherwise


def _shares(sizes, size):
    """The part of the rows that each group has."""
    if rows.is_static(size):
        return [n / size for n in sizes]
    # A replica may get no row of a short batch: group 0, which is always
    # evaluated, then stands for it, as its whole batch does in Keras's step.
    counts = [keras.ops.maximum(sizes[0], 1), *sizes[1:]]
    whole = keras.ops.cast(keras.ops.maximum(size, 1), "float64")
    return [keras.ops.cast(n, "float64") / whole for n in counts]


def _check_model(oracle, size, grouping):
    """Refuses models whose answer would be wrong on a part of a batch."""
    model = oracle.model
    for layer in keras_internals.all_layers(model):
        if getattr(layer, "stateful", False):
            raise ValueError(
                "A stateful layer keeps a state for each row of the batch and "
                "cannot run on the rows of one group. Use stateful=False. "
                f"Received: layer {layer.name!r}"
            )
    if rows.is_static(size):
        for enough, message in _batch_norm_checks(oracle, size, grouping):
            if not enough:
                raise ValueError(f"{message}, a batch of {size} rows")


def _batch_norm_checks(oracle, size, grouping):
    name = oracle.state_pool().flat_batch_norm
    return [] if name is None else [rows_check(name, size, grouping)]
