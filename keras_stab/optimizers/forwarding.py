"""What a wrapper shows of the optimizer inside it."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_stab import keras_internals

# What callbacks of Keras look for inside of one `inner_optimizer`, and what
# no optimizer may have that does not need it: the rates of a `MultiOptimizer`
# and the averages of `use_ema`.
_WHERE_THERE_IS_ONE = ("optimizers", keras_internals.AVERAGES)


class _Forwarded:
    """An attribute of the inner optimizer, under the same name."""

    def __set_name__(self, owner, name):
        self._name = name

    def __get__(self, wrapper, owner=None):
        if wrapper is None:
            return self
        inner = vars(wrapper).get("inner_optimizer")
        # Where the base class finds one of these, it makes slots of its own.
        if inner is None or vars(wrapper).get("_base_builds"):
            return None
        return getattr(inner, self._name)

    def __set__(self, wrapper, value):
        # The base class sets it before there is an inner optimizer.
        inner = vars(wrapper).get("inner_optimizer")
        if inner is not None:
            setattr(inner, self._name, value)


class ForwardsToInner:
    """The public attributes of Keras's optimizers, taken from the inner one."""

    inner_optimizer: keras.optimizers.Optimizer

    clipnorm = _Forwarded()
    clipvalue = _Forwarded()
    global_clipnorm = _Forwarded()
    weight_decay = _Forwarded()
    use_ema = _Forwarded()
    ema_momentum = _Forwarded()
    ema_overwrite_frequency = _Forwarded()
    gradient_accumulation_steps = _Forwarded()
    loss_scale_factor = _Forwarded()

    @property
    def learning_rate(self) -> keras.Variable | Any:
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(
        self,
        learning_rate: float | keras.optimizers.schedules.LearningRateSchedule,
    ) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def iterations(self) -> keras.Variable | Any:
        return self.inner_optimizer.iterations

    def __getattr__(self, name: str) -> Any:
        inner = vars(self).get("inner_optimizer")
        if name in _WHERE_THERE_IS_ONE and hasattr(inner, name):
            return getattr(inner, name)
        raise AttributeError(
            f"{type(self).__name__!r} object has no attribute {name!r}"
        )

    def scale_loss(self, loss: Any) -> Any:
        return self.inner_optimizer.scale_loss(loss)

    def exclude_from_weight_decay(
        self,
        var_list: Sequence[keras.Variable] | None = None,
        var_names: Sequence[str] | None = None,
    ) -> None:
        self.inner_optimizer.exclude_from_weight_decay(
            var_list=var_list, var_names=var_names
        )

    def finalize_variable_values(
        self, var_list: Sequence[keras.Variable]
    ) -> None:
        self.inner_optimizer.finalize_variable_values(var_list)
