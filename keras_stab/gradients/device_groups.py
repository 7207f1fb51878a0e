"""Small batches on several devices: each computes with its own rows alone.

For backends where one program runs on all devices. Left to itself the
compiler would run one group after another on all of them.
"""

import keras

from keras_stab.backend import exchange
from keras_stab.backend import sharding
from keras_stab.backend import tracing
from keras_stab.gradients import rows
from keras_stab.gradients.convolutional import has_convolution
from keras_stab.gradients.grouping import Contiguous
from keras_stab.gradients.grouping import Interleaved
from keras_stab.gradients.pooling import shift_seeds
from keras_stab.numerics.norms import in_full_precision


class InTurn(Exception):
    """Why the groups of a model must be evaluated one after another."""


def groups_on_own_device(oracle, batch, grouping, size):
    """Groups whole on a device: one `Evaluation` of all, and stacks.

    The rows of a batch are moved to the device of their group: less than the
    gradients of all groups on all devices would be. The gradients
    `[K, *shape]` are cut along the groups.

    Raises:
        InTurn: If one group must see what another has left behind.
    """
    groups, shares = grouping.groups, exchange.batch_shares()
    own = Contiguous(groups // shares)
    batch = rows.map_tensors(_by_group, grouping.stack(batch))

    def evaluate(index, part, shared):
        first = index * own.groups
        return _evaluate(
            oracle, part, own, size // shares, shared, first, 1 / groups
        )

    stacked, gradients = sharding.on_each_device(
        evaluate, batch, _shared(oracle)
    )
    states = [
        None if v is None else sharding.whole_on_each_device(v)
        for v in stacked.state
    ]
    states = [
        [None if v is None else v[k] for v in states] for k in range(groups)
    ]
    merged = _merged(oracle, stacked)._replace(
        state=oracle.state_pool().merge(
            oracle.non_trainable, states, [1 / groups] * groups
        ),
        y_pred=_in_order(grouping, stacked.y_pred),
        masks=_in_order(grouping, stacked.masks),
    )
    return merged, gradients


def _by_group(stacked):
    return exchange.with_shared_rows(rows.merge_first_axes(stacked))


def _in_order(grouping, stacked):
    ordered = grouping.unstack(stacked)
    return rows.map_tensors(exchange.with_shared_rows, ordered)


def groups_over_devices(oracle, batch, grouping, size):
    """Groups whose rows are spread, of a model that does not mix rows.

    The gradients come back as slices `[K, p]` along the weights.

    Raises:
        InTurn: If the parts of a group must see each other.
    """
    groups, shares = grouping.groups, exchange.batch_shares()
    own = Interleaved(groups)

    def evaluate(scatter, part, shared):
        def summed(gradients):
            # The mean over a group is that of its equal parts on devices.
            return [scatter(g[None] / shares)[0] for g in gradients]

        stacked, slices = _evaluate(
            oracle, part, own, size // shares, shared, 0, 1 / groups, summed
        )
        if any(v is not None for v in [*stacked.state, *stacked.replacements]):
            raise InTurn("it draws random numbers, or keeps a state")
        stacked = stacked._replace(
            y_pred=own.unstack(stacked.y_pred),
            masks=own.unstack(stacked.masks),
        )
        return slices, stacked

    slices, stacked = sharding.sum_into_slices(evaluate, batch, _shared(oracle))
    return _merged(oracle, stacked), slices


def _shared(oracle):
    return oracle.values, oracle.non_trainable, oracle.carried


def _merged(oracle, stacked):
    """The evaluation of all groups, but for outputs and state."""
    return stacked._replace(
        loss=keras.ops.mean(stacked.loss),
        carried=oracle.carried,
        replacements=[
            None if v is None else keras.ops.max(v, axis=0)
            for v in stacked.replacements
        ],
    )


def _evaluate(oracle, part, own, size, shared, first, share, then=None):
    """Some groups of a device: stacks of their evaluations and gradients.

    Args:
        oracle: The `GradientOracle`.
        part: The rows of the device.
        own: The `Grouping` of these rows.
        size: How many they are.
        shared: Values of the trainable, other and carried variables.
        first: The number of the first group.
        share: The part of all rows that a group has.
        then: What becomes of the gradients of each group.
    """
    values, non_trainable, carried = shared
    local = oracle.with_values(values)
    variables = oracle.non_trainable_variables

    def one_group(k, group):
        evaluation, gradients = local.evaluate(
            group,
            shift_seeds(variables, non_trainable, first + k),
            carried,
            share,
        )
        if any(a is not b for a, b in zip(evaluation.carried, carried)):
            raise InTurn("its metrics go on from one group to the next")
        gradients = [in_full_precision(g) for g in gradients]
        if then is not None:
            gradients = then(gradients)
        return evaluation._replace(carried=[]), gradients

    if own.groups == 1:
        answers = [one_group(0, part)]
    elif not has_convolution(oracle.model):
        numbers = keras.ops.arange(own.groups, dtype="int32")
        _, answer = tracing.scan(
            lambda carry, inputs: (carry, one_group(*inputs)),
            [],
            (numbers, own.stack(part)),
        )
        return answer
    else:
        answers = [
            one_group(k, own.take(part, k, size)) for k in range(own.groups)
        ]
    return tracing.stacked(answers)
