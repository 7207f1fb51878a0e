"""AveragedSGD: SGD with the average of its last weights."""

from typing import Any

import keras

from keras_stab.arguments import checked_boolean
from keras_stab.arguments import checked_fraction
from keras_stab.arguments import checked_number
from keras_stab.object_arguments import checked_learning_rate
from keras_stab.optimizers.averaging.weight_averaging import WeightAveraging
from keras_stab.registration import registered
from keras_stab.schedules import ConstantTail
from keras_stab.types import LearningRate


@registered
class AveragedSGD(WeightAveraging):
    r"""SGD whose last weights are averaged.

    With gradients $g$ and rates $\eta_t$,

    $$
    w_{t+1} = w_t - \eta_t \, g(w_t), \qquad
    a = \frac{1}{T - t_0} \sum_{t = t_0}^{T - 1} w_{t+1}
    $$

    SGD with a large step descends on a smoothed objective. The average comes
    near the minimum of that objective; the last iterate stays farther away.
    So keep the rate large and constant over the averaged tail: `from_run`
    makes the schedule.

    Args:
        learning_rate: $\eta$: float, schedule or callable. Defaults to 0.1.
        momentum: Float in [0, 1). Defaults to 0.0.
        nesterov: Whether to use Nesterov's momentum. Defaults to `False`.
        weight_decay: Float or `None`, decoupled, as in
            `keras.optimizers.SGD`. Defaults to `None`.
        method, start_step, period, compensated: As in `WeightAveraging`.
        name: String or `None`.
        evaluate_with: `"evaluation"`: validation in `fit`, callbacks at the
            end of an epoch and the model after `fit` have the average.
            `"trained"`: the trained weights. Defaults to `"evaluation"`.
        **kwargs: Further arguments of `keras.optimizers.SGD` (`clipnorm`,
            `gradient_accumulation_steps` and others), or those that `method`
            takes.

    Raises:
        ValueError: If an argument is out of range.

    Example:

    >>> import keras, keras_stab
    >>> optimizer = keras_stab.AveragedSGD.from_run(
    ...     0.1, final_learning_rate=0.02, epochs=20, steps_per_epoch=100
    ... )
    >>> optimizer.start_step
    1500
    >>> model = keras.Sequential([keras.layers.Dense(1)])
    >>> model.compile(optimizer=optimizer, loss="mse")

    Departures from the paper:
        Its full text was not available to us; the official experiments average
        every update of the last quarter, as `from_run` does. Their weight
        decay is added to the gradient: without momentum that is the same as
        here, with momentum it is not.

    References:
        - Nitanda, Kikuchi, Maeda, Wu, 2023, "Why is parameter averaging
          beneficial in SGD? An objective smoothing perspective",
          arXiv:2302.09376
    """

    def __init__(
        self,
        learning_rate: LearningRate = 0.1,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float | None = None,
        method: str = "uniform",
        start_step: int = 0,
        period: int = 1,
        compensated: bool | None = None,
        name: str | None = None,
        evaluate_with: str = "evaluation",
        **kwargs: Any,
    ):
        averaging = {k: kwargs.pop(k) for k in list(kwargs) if k in _OF_RULES}
        sgd = keras.optimizers.SGD(
            checked_learning_rate(learning_rate),
            momentum=checked_fraction("momentum", momentum, zero=True),
            nesterov=checked_boolean("nesterov", nesterov),
            weight_decay=checked_number(
                "weight_decay", weight_decay, 0.0, optional=True
            ),
            **kwargs,
        )
        super().__init__(
            sgd,
            method=method,
            start_step=start_step,
            period=period,
            compensated=compensated,
            name=name,
            evaluate_with=evaluate_with,
            **averaging,
        )

    @classmethod
    def from_run(  # type: ignore[override]
        cls,
        learning_rate: float = 0.1,
        *,
        epochs: int,
        steps_per_epoch: int,
        tail: float = 0.25,
        final_learning_rate: float | None = None,
        **kwargs: Any,
    ) -> "AveragedSGD":
        """The optimizer for a run of known length.

        Args:
            learning_rate: Float, the first rate.
            epochs: Int, epochs of the run.
            steps_per_epoch: Int, batches in an epoch.
            tail: Float in (0, 1], the share of the updates to average.
                Defaults to 0.25.
            final_learning_rate: Float, the constant rate of the averaged
                tail, reached along half a cosine; `None` for
                `learning_rate` from start to end. Defaults to `None`.
            **kwargs: As for the class, without `start_step`.
        """
        run = {"epochs": epochs, "steps_per_epoch": steps_per_epoch}
        start = super().from_run(**run, tail=tail, **kwargs).start_step
        if final_learning_rate is not None:
            # Keras reads schedules at every batch, accumulated or not.
            batches = start * (kwargs.get("gradient_accumulation_steps") or 1)
            learning_rate = ConstantTail(
                learning_rate, final_learning_rate, max(batches, 1)
            )
        return cls(learning_rate, start_step=start, **kwargs)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["inner_optimizer"]
        sgd = self.inner_optimizer.get_config()
        del sgd["name"]
        return {**sgd, **config}

    @classmethod
    def from_config(
        cls,
        config: dict[str, Any],
        custom_objects: dict[str, Any] | None = None,
    ) -> "AveragedSGD":
        config = dict(config)
        if isinstance(config["learning_rate"], dict):
            config["learning_rate"] = keras.saving.deserialize_keras_object(
                config["learning_rate"], custom_objects=custom_objects
            )
        return cls(**config)


_OF_RULES = (
    "decay",
    "warmup_gamma",
    "warmup_power",
    "dynamic",
    "exponent",
    "relative_std",
)
