"""What a step of a game evaluates: all losses, or that of one player."""

import keras

from keras_stab.backend import devices
from keras_stab.backend import differentiation
from keras_stab.backend import tracing
from keras_stab.games.compiling import per_player


class JointStep:
    """What is known only while a train or test step runs.

    Attributes:
        turn: Integer tensor, the position of the player who moves; `None`
            where all do.
        joint_losses: List of the `JointLoss`es that were evaluated.
    """

    def __init__(self, turn=None):
        self.turn = turn
        self.joint_losses = []


def player_on_turn(optimizer, state):
    """The position of the player who moves, or `None` where all do.

    Args:
        optimizer: The compiled optimizer, which keeps the turn counter.
        state: What JAX's train step is given: during `fit` the counter has
            its value only there.
    """
    parts = per_player(optimizer)
    if parts is None or parts.turn is None:
        return None
    if not devices.FUNCTIONAL:
        return parts.player_on_turn(tracing.read(parts.turn))
    for variable, value in zip(optimizer.variables, state[2]):
        if variable is parts.turn:
            return parts.player_on_turn(value)
    raise RuntimeError("The optimizer has no turn counter")


def evaluate(joint, turn, norm):
    """Evaluates a batch and keeps what layers wrote meanwhile.

    Args:
        joint: A `JointLoss`.
        turn: The position of the player who moves, or `None`.
        norm: Metric for the norm of the joint field, or `None`.

    Returns:
        The scalar to differentiate, the players' losses, and for each the
        share with which it counts in the log, or `None` where all count.
    """
    values = [tracing.read(v) for v in joint.weights]
    state = [v.value for v in joint.carried]
    shares = [None] * len(joint.game.players)
    if turn is not None:
        total, losses, state, shares = _of_one(joint, turn, values, state)
    elif norm is None:
        total, losses, state = joint(values, state)
    else:
        total, losses, state = _with_norm(joint, values, state, norm)
    for variable, value in zip(joint.carried, state):
        if id(variable) in joint.written:
            variable.assign(value)
    return total, losses, shares


def _with_norm(joint, values, state, norm):
    """The joint loss; the norm of its gradient goes to the metric."""
    # With the field F at hand, <F, z> is a loss whose gradient is F.
    constants = [keras.ops.stop_gradient(v) for v in values]

    def field(values):
        total, losses, after = joint(values, state)
        return total, (losses, after)

    (_, (losses, after)), gradients = differentiation.value_and_gradients(
        field, constants
    )
    gradients = [
        None if g is None else keras.ops.stop_gradient(tracing.densify(g))
        for g in gradients
    ]
    square = sum(
        keras.ops.sum(keras.ops.square(g))
        for g, weight in zip(gradients, joint.weights)
        if g is not None and not weight.overwrite_with_gradient
    )
    norm.update_state(keras.ops.sqrt(square))
    total = sum(
        keras.ops.sum(g * v) for g, v in zip(gradients, values) if g is not None
    )
    return total, losses, after


def _of_one(joint, turn, values, state):
    """The loss of the player whose turn it is; no other is computed."""
    players = joint.game.players

    def branch(player):
        def evaluate():
            total, (loss,), after = joint(values, state, [player])
            if not any(joint.game.owner(v) is player for v in joint.weights):
                # PyTorch refuses to differentiate what needs no gradient.
                total = total + sum(0.0 * keras.ops.sum(v) for v in values)
            return [total, loss, *after]

        return evaluate

    total, loss, *after = keras.ops.switch(turn, [branch(p) for p in players])
    shares = [
        keras.ops.cast(keras.ops.equal(turn, i), "float32")
        for i in range(len(players))
    ]
    losses = [
        keras.ops.where(share > 0, loss, keras.ops.zeros_like(loss))
        for share in shares
    ]
    return total, losses, after, shares


def row_count(batch):
    """The number of examples, by which Keras weights a batch in the logs."""
    shapes = [
        keras.ops.shape(leaf)
        for leaf in keras.tree.flatten(batch)
        if leaf is not None
    ]
    rows = shapes[0][0] if shapes and len(shapes[0]) else 1
    return keras.ops.cast(rows, "float32")
