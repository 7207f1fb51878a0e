"""Every use of an underscore attribute of Keras, in one place.

Checked on Keras 3.15.1; `tests/test_keras_internals.py` names that version
and fails when a Keras release changes one of these.
"""

import collections
import weakref

import keras

from keras_stab.backend import devices

# Where an optimizer with `use_ema` keeps its averages, for `SwapEMAWeights`.
AVERAGES = "_model_variables_moving_average"

# What an optimizer calls with gradients, variables and rate to move them all.
UPDATE_STEP = "_backend_update_step"

# Losses of `compile` that a model was built without.
_unused_losses: weakref.WeakSet = weakref.WeakSet()


def build_for(model, data):
    """Builds model, loss and optimizer from one batch, when they are not.

    On TensorFlow a subclassed model or an optimizer would otherwise be built
    inside the traced step, in the stateless scope of the loss function.
    """
    if not (model.built and model.optimizer.built and _loss_is_known(model)):
        model._symbolic_build(data_batch=data)
        if not loss_is_built(model):
            _unused_losses.add(model._compile_loss)


def _loss_is_known(model):
    """Whether building once more would add nothing.

    A model's own `compute_loss` may leave the losses of `compile` unbuilt.
    Keras has tried before a step of JAX, in which variables have no values.
    """
    own = type(model).compute_loss is not keras.Model.compute_loss
    return (
        loss_is_built(model)
        or (own and devices.FUNCTIONAL)
        or model._compile_loss in _unused_losses
    )


def accepts_training(model):
    """Whether the model's `call` takes a `training` argument."""
    return model._call_has_training_arg


def compute_loss(model, x, y, y_pred, sample_weight, training=True):
    """The trainer's own call of `compute_loss`."""
    return model._compute_loss(
        x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training
    )


def compile_loss(model):
    """What `compile` made of the losses, an object of its own; or `None`."""
    return model._compile_loss


def loss_is_built(model):
    """Whether the losses of `compile` were matched to the outputs."""
    return model._compile_loss is None or model._compile_loss.built


def build_loss(model, y, y_pred):
    """Builds the losses of `compile`; that makes variables for metrics."""
    model._compile_loss.build(y, y_pred)


def loss_tracker(model):
    """The metric that the trainer logs as `loss`."""
    return model._loss_tracker


def all_layers(model):
    """Every layer of the model, however deep, the model excluded."""
    return list(model._flatten_layers(include_self=False))


def weights_to_train(model):
    """All variables that layers made to be trained, including frozen ones.

    `non_trainable_variables` mixes frozen ones with moving statistics.
    """
    return [
        v for layer in all_layers(model) for v in layer._trainable_variables
    ]


class _Masks(keras.layers.Layer):
    """Reads and writes the mask of a tensor through a layer.

    Keras keeps the mask in an attribute, or, for tracers of JAX, which take no
    attributes, in a table of its own. What a layer is called with is the mask
    that was read; what it returns from `compute_mask` is written.
    """

    def __init__(self):
        super().__init__(autocast=False, name="masks")
        self.supports_masking = True
        self.read = []
        self.to_write = None

    def call(self, inputs, mask=None):
        self.read.append(mask)
        return inputs

    def compute_mask(self, inputs, previous_mask):
        return previous_mask if self.to_write is None else self.to_write


def get_mask(tensor):
    """The padding mask that a layer attached to its output, or `None`."""
    if not devices.FUNCTIONAL or hasattr(tensor, "_keras_mask"):
        return getattr(tensor, "_keras_mask", None)
    layer = _Masks()
    layer(tensor)
    return list(layer.read)[0]


def set_mask(tensor, mask):
    """Attaches a padding mask to a tensor, as layers do."""
    if mask is None:
        return
    try:
        tensor._keras_mask = mask
    except AttributeError:
        layer = _Masks()
        layer.to_write = mask
        layer(tensor)


def built_variables(optimizer):
    """The model variables that the optimizer was built with, in order."""
    return list(optimizer._trainable_variables)


def variable_key(optimizer, variable):
    """What identifies a model variable to this optimizer."""
    return optimizer._var_key(variable)


def positions(optimizer):
    """Dict: the key of each variable an optimizer was built with, in order."""
    built = built_variables(optimizer)
    return {variable_key(optimizer, v): i for i, v in enumerate(built)}


def is_seed_state(variable):
    """Whether the variable is the `[seed, counter]` of a `SeedGenerator`."""
    return (
        variable.name == "seed_generator_state"
        and tuple(variable.shape) == (2,)
        and "int" in str(variable.dtype)
    )


def is_rematerialised(layer):
    """Whether the layer was made in a `RematScope`."""
    return layer._remat_mode is not None


def loss_entries(model):
    """Each `loss`, its `name`, `path`, `loss_weights`; none before use."""
    return getattr(model._compile_loss, "_flat_losses", None) or []


def is_loss_of_keras(loss):
    """Whether a loss runs one of Keras's functions and nothing around it."""
    kind = keras.losses.MeanSquaredError
    return type(loss).call is kind.call and type(loss).__call__ is kind.__call__


def loss_arguments(loss):
    """What a loss of Keras's own passes to its function."""
    return loss._fn_kwargs


def variable_index(optimizer, variable):
    """The position of a variable among those the optimizer was built with."""
    return optimizer._get_variable_index(variable)


def adam_moments(optimizer, variables):
    """The first and the second moments that Adam keeps of variables."""
    each = [optimizer._get_variable_index(v) for v in variables]
    slots = optimizer._momentums, optimizer._velocities
    return [[slot[i] for i in each] for slot in slots]


Head = collections.namedtuple(
    "Head", ["loss", "weight", "y", "y_pred", "sample_weight"]
)


def compiled_heads(model, y, y_pred, sample_weight):
    """What each compiled loss is given, as a list of `Head`."""
    heads = []

    def noting(entry):
        def note(*given):
            heads.append(Head(entry.loss, entry.loss_weights, *given))
            return 0.0

        return entry._replace(loss=note)

    compiled = _with_losses(model, noting)
    compiled._metrics = [None] * len(compiled._flat_losses)
    compiled(y, y_pred, sample_weight)
    return heads


def compiled_losses(model, y, y_pred, sample_weight):
    """The losses of `compile`: their sum, and each one times its weight.

    The metric of each of them is updated, as in a step.
    """
    values = []

    def noting(entry):
        def note(*given):
            value = keras.ops.cast(entry.loss(*given), compiled.dtype)
            weight = entry.loss_weights
            values.append(
                value if weight is None else keras.ops.multiply(value, weight)
            )
            return value

        return entry._replace(loss=note)

    compiled = _with_losses(model, noting)
    total = compiled(y, y_pred, sample_weight)
    if not (keras.tree.is_nested(y) or keras.tree.is_nested(y_pred)):
        values = values[:1]  # Keras leaves the others out
    return total, values


def _with_losses(model, change):
    """What `compile` made of the losses, with changed ones in their place."""
    compiled = object.__new__(type(model._compile_loss))
    compiled.__dict__.update(vars(model._compile_loss))
    compiled._flat_losses = [change(entry) for entry in loss_entries(model)]
    return compiled


def penalties(model):
    """Regularisers and `add_loss`, as the loss of a step has them."""
    return [model._aggregate_additional_loss(loss) for loss in model.losses]


def compiled_loss(model, y, y_pred, sample_weight):
    """The losses of `compile` alone, without penalties."""
    return model._compile_loss(y, y_pred, sample_weight)


def is_update_step(optimizer):
    """Whether the next call of an accumulating optimizer moves the weights."""
    steps = optimizer.gradient_accumulation_steps
    return (optimizer._iterations + 1) % steps == 0


def set_updates(optimizer, count):
    """Sets the number of updates; a window of gradients stays as full."""
    steps = optimizer.gradient_accumulation_steps or 1
    calls = int(keras.ops.convert_to_numpy(optimizer._iterations.value))
    optimizer._iterations.assign(count * steps + calls % steps)


def is_decayed(optimizer, variable):
    """Whether decoupled weight decay acts on a variable."""
    return optimizer._use_weight_decay(variable)


def layout(variable):
    """How a variable is spread over devices, or `None`."""
    return getattr(variable, "_layout", None)


def has_value(variable):
    """Whether the variable holds a value; on JAX not during `fit`."""
    return variable._value is not None


def forget_step_state(model):
    """Drops what the trainer of JAX keeps of a step that raised."""
    model._jax_state = None


def rate_variable(optimizer):
    """The variable that holds the learning rate, `None` of a schedule."""
    rate = optimizer._learning_rate
    return rate if isinstance(rate, keras.Variable) else None
