"""`install` and `uninstall`: what stands on `keras.Model`, and for how long.

`keras.Model` itself defines neither `train_step` nor `fit`: the backend's
trainer does, further along the method resolution order. `install` adds
methods of these names, which look at the optimizer and pass on to whatever
stood there before. Two needs are served, each by names of its own:

- methods that ask for gradients need `train_step`;
- methods that lend evaluation weights need `fit`, `evaluate`, `predict`,
  `make_train_function`, `get_state_tree` and `set_state_tree`.

Other libraries patch the same names, before or after this one. So nothing but
our own methods is ever removed, and one that somebody else's wrapper still
holds passes on silently once it is uninstalled.
"""

import functools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING
from typing import Any

import keras

from keras_stab.gradients.train_step import takes_over
from keras_stab.gradients.train_step import takes_step_of
from keras_stab.gradients.train_step import train_step
from keras_stab.trainer.compiling import uncompiled_if_need_be
from keras_stab.trainer.fitting import fitting
from keras_stab.trainer.guards import begin_again
from keras_stab.trainer.guards import take_back
from keras_stab.trainer.guards import taking_back_on_error
from keras_stab.trainer.guards import warn_if_apart
from keras_stab.trainer.state_trees import setting_weights_aside
from keras_stab.trainer.state_trees import with_weights_aside
from keras_stab.trainer.watching import watching_as_asked


def _step(model, following, *state_and_data):
    if takes_over(model, state_and_data[-1]):
        return train_step(model, *state_and_data)
    return following(*state_and_data)


def _guarded(model, following, *args, **kwargs):
    with taking_back_on_error(model):
        return following(*args, **kwargs)


def _guarded_fit(model, following, *args, **kwargs):
    # What comes back when the call raises is to be the trained weights.
    take_back(model)
    with watching_as_asked(model, args, kwargs):
        return _guarded(model, fitting, model, following, *args, **kwargs)


def _guarded_training(model, following, *args, **kwargs):
    take_back(model)
    begin_again(model)
    warn_if_apart(model)
    with uncompiled_if_need_be(model, *args, **kwargs):
        return _guarded(model, following, *args, **kwargs)


FOR_GRADIENTS = {"train_step": _step}
FOR_EVALUATION_WEIGHTS = {
    "fit": _guarded_fit,
    "evaluate": _guarded,
    "predict": _guarded,
    "make_train_function": _guarded_training,
    "get_state_tree": with_weights_aside,
    "set_state_tree": setting_weights_aside,
}
# What a mixin is mixed into, for the type check only.
_Base: Any = keras.Model if TYPE_CHECKING else object

_ADDITIONS = {**FOR_GRADIENTS, **FOR_EVALUATION_WEIGHTS}


class TrainStep(_Base):
    """A `keras.Model` mixin with the methods that `install` adds to all models.

    For those who want it explicit, after `keras_stab.uninstall()`:

    ```python
    class MyModel(keras_stab.TrainStep, keras.Model):
        ...
    ```
    """

    def train_step(self, *state_and_data: Any) -> Any:
        following = super().train_step
        return _once(_step, self, "train_step", following, *state_and_data)

    def make_train_function(self, force: bool = False) -> None:
        name, following = "make_train_function", super().make_train_function
        return _once(_guarded_training, self, name, following, force)

    def fit(self, *args: Any, **kwargs: Any) -> keras.callbacks.History:
        return _once(_guarded_fit, self, "fit", super().fit, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        following = super().evaluate
        return _once(_guarded, self, "evaluate", following, *args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        following = super().predict
        return _once(_guarded, self, "predict", following, *args, **kwargs)

    def get_state_tree(
        self, value_format: str = "backend_tensor"
    ) -> dict[str, Any]:
        name, following = "get_state_tree", super().get_state_tree
        return _once(with_weights_aside, self, name, following, value_format)

    def set_state_tree(self, state_tree: dict[str, Any]) -> None:
        name, following = "set_state_tree", super().set_state_tree
        return _once(setting_weights_aside, self, name, following, state_tree)


# Each method that was added: what stood on `keras.Model` under its name, or
# `None`. By identity, since `functools.wraps` copies attributes.
_before: dict[Callable, Callable | None] = {}
_installed = False


def install() -> None:
    """Lets every `keras.Model` train with the methods of this library.

    Importing `keras_stab` does this. It changes nothing for a model whose
    optimizer holds none of them. A `train_step` or `fit` that another library
    has put on `keras.Model` runs as before, inside ours.
    """
    global _installed
    _installed = True
    for name, around in _ADDITIONS.items():
        if vars(keras.Model).get(name) not in _before:
            method = _added(name, around)
            _before[method] = vars(keras.Model).get(name)
            setattr(keras.Model, name, method)


def uninstall() -> None:
    """Removes from `keras.Model` what `install` added.

    What other libraries have put there, before or since, stays.
    """
    global _installed
    _installed = False
    for name in _ADDITIONS:
        while (method := vars(keras.Model).get(name)) in _before:
            delattr(keras.Model, name)
            if _before[method] is not None:
                setattr(keras.Model, name, _before[method])


def _added(name, around):
    """A method for `keras.Model`, in front of what stands there now."""

    @functools.wraps(getattr(keras.Model, name))
    def method(self, *args, **kwargs):
        following = _following(self, name, _before[method])
        if not _installed or _is_stock(self, name):
            return following(*args, **kwargs)
        return _once(around, self, name, following, *args, **kwargs)

    return method


def _is_stock(model, name):
    """Whether this is the step of an optimizer that leaves it to Keras.

    The compiler of PyTorch then finds nothing of ours that it cannot follow.
    """
    return name == "train_step" and not takes_step_of(model)


def _following(model, name, before):
    """What Python would have found under the name without our method."""
    if before is None:
        return getattr(super(keras.Model, model), name)
    if hasattr(before, "__get__"):
        return before.__get__(model, type(model))
    return before


_running: set[tuple[str, int, int]] = set()


def _once(around, model, name, following, *args, **kwargs):
    """Runs `around`; nested calls of the same method pass on.

    So a name acts once however many layers hold a method of ours: this mixin,
    `keras.Model`, and a wrapper of somebody else around an earlier one.
    """
    call = (name, id(model), threading.get_ident())
    if call in _running:
        return following(*args, **kwargs)
    _running.add(call)
    try:
        return around(model, following, *args, **kwargs)
    finally:
        _running.remove(call)
