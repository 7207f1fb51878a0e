"""Every use of an underscore attribute of Keras, in one place.

Checked on Keras 3.15.1; `tests/test_keras_internals.py` names that version
and fails when a Keras release changes one of these.
"""

import keras

from keras_stab.gradients import autodiff


def build_for(model, data):
    """Builds model, loss and optimizer from one batch, when they are not.

    On TensorFlow a subclassed model or an optimizer would otherwise be built
    inside the traced step, in the stateless scope of the loss function.
    """
    loss = model._compile_loss
    loss_is_built = loss is None or loss.built
    if not (model.built and model.optimizer.built and loss_is_built):
        model._symbolic_build(data_batch=data)


def accepts_training(model):
    """Whether the model's `call` takes a `training` argument."""
    return model._call_has_training_arg


def compute_loss(model, x, y, y_pred, sample_weight):
    """The trainer's own call of `compute_loss`, in training mode."""
    return model._compute_loss(
        x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True
    )


def loss_tracker(model):
    """The metric that the trainer logs as `loss`."""
    return model._loss_tracker


def all_layers(model):
    """Every layer of the model, however deep, the model excluded."""
    return list(model._flatten_layers(include_self=False))


class _Masks(keras.layers.Layer):
    """Reads and writes the mask of a tensor by way of a layer.

    Keras keeps it in an attribute, or, of tracers of JAX that take none, in a
    table of its own. A layer is given the one and asked for the other.
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
    if keras.backend.backend() != "jax" or hasattr(tensor, "_keras_mask"):
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


def compiled_losses(model):
    """The loss objects that `compile` made; none before they are used."""
    entries = getattr(model._compile_loss, "_flat_losses", None) or []
    return [entry.loss for entry in entries]


def compile_identity(model):
    """Changes with every `compile`."""
    return id(model._compile_loss)


def loss_arguments(loss):
    """What a loss of Keras's own passes to its function."""
    return loss._fn_kwargs


def variable_index(optimizer, variable):
    """The position of a variable among those the optimizer was built with."""
    return optimizer._get_variable_index(variable)


class UpdatesTogether:
    """Mixin of optimizers that define `update_steps` for many variables.

    Keras calls `update_step` once a variable. On PyTorch its own optimizers
    override what is overridden here, and for the same reason: many small
    operations are bound by Python.
    """

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        if keras.backend.backend() != "torch":
            super()._backend_update_step(
                grads, trainable_variables, learning_rate
            )
            return
        with autodiff.no_gradients():
            self.update_steps(grads, trainable_variables, learning_rate)
