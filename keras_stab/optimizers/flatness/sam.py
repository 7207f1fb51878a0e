"""SAM: sharpness-aware minimization, and its adaptive form ASAM."""

import functools
from collections.abc import Callable
from collections.abc import Iterable
from typing import Any

import keras

from keras_stab import keras_internals
from keras_stab.arguments import checked_boolean
from keras_stab.arguments import checked_choice
from keras_stab.arguments import checked_count
from keras_stab.arguments import checked_number
from keras_stab.backend import devices
from keras_stab.backend import many_tensors
from keras_stab.backend import tracing
from keras_stab.backend import updates
from keras_stab.gradients.oracle import GradientOracle
from keras_stab.numerics.ascent import ascent
from keras_stab.numerics.ascent import cosine
from keras_stab.numerics.norms import in_full_precision
from keras_stab.optimizers.figures import add_figures
from keras_stab.optimizers.figures import finite_figures
from keras_stab.optimizers.figures import read_figures
from keras_stab.optimizers.flatness.sam_arguments import check_inner
from keras_stab.optimizers.flatness.sam_arguments import checked_filter
from keras_stab.optimizers.flatness.strengths import Strength
from keras_stab.optimizers.gradient_method import GradientMethod
from keras_stab.optimizers.state import widest_dtype
from keras_stab.registration import registered

FIGURES = (
    "gradient_norm",
    "perturbation_norm",
    "sharpness_gap",
    "cosine",
)
NORMALIZATION = ("gamma", "beta", "scale")
OFFSETS = ("bias", "beta")


@registered
class SAM(GradientMethod):
    r"""Takes the gradient where the loss nearby is highest.

    For weights $w$ and their gradient $g$ the inner optimizer, which makes
    its step from $w$, is given

    $$
    h = \nabla L(w + e), \qquad e = \rho \, \frac{T^2 g}{\|T g\|}
    $$

    with one norm over all perturbed variables. $T = 1$ is SAM; $T = |w|$
    (and a little more) is ASAM, which does not change when a layer is scaled
    up and the next one down.

    Args:
        inner_optimizer: Keras optimizer, name or config, that is given $h$.
            Clipping, weight decay, moments and learning rate are its own.
            Defaults to `"sgd"`.
        rho: Float, the radius $\rho$, or a `LearningRateSchedule`, called
            with the number of updates. 0.05 to 0.2 are usual; with
            `adaptive=True` 0.5 to 1, with `adaptive="all"` about 2. 0 is the
            inner optimizer itself. Defaults to 0.05.
        adaptive: `False`: $T = 1$. `True`: $T = |w| + \eta$, but 1 for
            variables named `bias` or `beta`, as in the authors' code.
            `"all"`: $T = |w|$ for every variable. Defaults to `False`.
        interval: Int of at least 1. In one of `interval` updates, counted
            from `start_step`, the gradient is SAM's; otherwise it is the plain
            one. Defaults to 1.
        eta: Float, $\eta$; for `adaptive=True` only. Defaults to 0.01.
        start_step: Int, plain updates before SAM starts. Defaults to 0.
        stop_step: Int, the first update that is plain again, or `None`.
        variable_filter: Which variables are perturbed and enter the norm:
            `None` for all, `"normalization"` for those named `gamma`, `beta`
            or `scale`, or a function from a variable's path to a boolean
            (register it as serializable to save the model). The others get
            their gradient at $w + e$ too. Defaults to `None`.
        independent_noise: Whether the second pass draws its own dropout
            masks. Defaults to `False`: it uses those of the first.
        rho_schedule: `"constant"`, or `"learning_rate"`: $\rho$ times the
            learning rate over its highest value. Defaults to `"constant"`.
        reference_learning_rate: Float, that highest value; `None` takes it
            from the schedule of the inner optimizer.
        name: String or `None`.

    Raises:
        ValueError: If an argument is out of range, belongs on the inner
            optimizer, or the inner optimizer cannot be used.
        RuntimeError: If it is given plain gradients.

    What training keeps comes from the first pass: batch-norm statistics,
    dropout seeds, metrics, the loss that is logged. The weights are never
    moved to $w + e$ and back; the second pass is given other values. A
    gradient that is not finite reaches the inner optimizer, as without SAM.
    `diagnostics()` reads figures of the last update at which SAM acted.

    Example:

    >>> import keras, keras_stab
    >>> model = keras.Sequential([keras.layers.Dense(1)])
    >>> optimizer = keras_stab.SAM(keras.optimizers.SGD(0.1), rho=0.05)
    >>> model.compile(optimizer=optimizer, loss="mse")
    >>> x, y = keras.ops.ones((8, 3)), keras.ops.ones((8, 1))
    >>> history = model.fit(x, y, batch_size=8, verbose=0)
    >>> round(optimizer.diagnostics()["perturbation_norm"], 3)
    0.05

    Departures from the paper:
        On several devices there is one perturbation, that of the whole
        batch, not one per device: results do not depend on how many there are.
        With `gradient_accumulation_steps` each micro-batch has its own. On
        PyTorch and TensorFlow a weight that the loss does not depend on is
        not part of the norm; on JAX its gradient is zero, which is the same.

    Cost:
        Two forward and two backward passes instead of one of each;
        `interval=k` divides what is added by k. During a step one copy of the
        weights; nothing is kept. `benchmarks/step_time.py` measures it.

    References:
        - Foret, Kleiner, Mobahi, Neyshabur, 2020, "Sharpness-Aware
          Minimization for Efficiently Improving Generalization",
          arXiv:2010.01412
        - Kwon, Kim, Park, Choi, 2021, "ASAM: Adaptive Sharpness-Aware
          Minimization for Scale-Invariant Learning of Deep Neural Networks",
          arXiv:2102.11600
    """

    perturbs_weights = True

    def __init__(
        self,
        inner_optimizer: str | dict | keras.optimizers.Optimizer = "sgd",
        rho: float | keras.optimizers.schedules.LearningRateSchedule = 0.05,
        adaptive: bool | str = False,
        interval: int = 1,
        eta: float = 0.01,
        start_step: int = 0,
        stop_step: int | None = None,
        variable_filter: str | Callable[[str], bool] | None = None,
        independent_noise: bool = False,
        rho_schedule: str = "constant",
        reference_learning_rate: float | None = None,
        name: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(inner_optimizer, name=name, **kwargs)
        self._rho = Strength("rho", rho, rho_schedule, reference_learning_rate)
        self.adaptive = checked_choice(
            "adaptive", adaptive, (False, True, "all")
        )
        self.interval = checked_count("interval", interval, 1)
        self.eta = checked_number("eta", eta, minimum=0.0)
        self.start_step = checked_count("start_step", start_step, 0)
        self.stop_step = checked_count(
            "stop_step", stop_step, self.start_step + 1, optional=True
        )
        self.variable_filter = checked_filter(variable_filter)
        self.independent_noise = checked_boolean(
            "independent_noise", independent_noise
        )
        self._rho.check(self.inner_optimizer)
        check_inner(self.inner_optimizer)

    def build(self, variables: Iterable[keras.Variable]) -> None:
        if self.built:
            return
        variables = list(variables)
        self._perturbed = [self._is_perturbed(v) for v in variables]
        if not any(self._perturbed):
            paths = ", ".join(v.path for v in variables)
            raise ValueError(
                "`variable_filter` leaves no variable to perturb. Received: "
                f"variable_filter={self.variable_filter!r}; the variables are "
                f"{paths}"
            )
        super().build(variables)
        self._figures = add_figures(self, FIGURES, widest_dtype(variables))

    def estimate(self, oracle: GradientOracle) -> list[Any]:
        gradients = super().estimate(oracle)
        measures = self._figures.value
        if not self._rho.is_zero:
            gradients, measures = self._sharpness_aware(
                oracle, gradients, measures
            )
        oracle.notes[self] = measures
        return gradients

    def _sharpness_aware(self, oracle, gradients, measures):
        """The gradients to hand over and the figures, at this update."""
        gradients = [tracing.densify(g) for g in gradients]
        present = [i for i, g in enumerate(gradients) if g is not None]
        step = self.known_updates()
        active = self._active(step)
        if active is False:
            return gradients, measures
        if active is True:
            answer, measures, notes = self._second_pass(oracle, gradients, step)
            oracle.notes.update(notes)
            return answer, measures
        if devices.replicas() > 1:
            raise ValueError(
                "SAM cannot choose per update under a tf.distribute strategy, "
                "which allows no exchange between replicas inside a "
                "condition. Use interval=1, start_step=0 and stop_step=None"
            )
        methods = list(oracle.notes)
        kept = [oracle.notes[m] for m in methods]

        def flat(gradients, measures, notes):
            leaves = [gradients[i] for i in present]
            return [*leaves, measures, *keras.tree.flatten(notes)]

        def second():
            answer, measures, notes = self._second_pass(oracle, gradients, step)
            return flat(answer, measures, [notes[m] for m in methods])

        leaves = keras.ops.cond(
            active, second, lambda: flat(gradients, measures, kept)
        )
        answer = list(gradients)
        for i, leaf in zip(present, leaves):
            answer[i] = leaf
        measures, *rest = leaves[len(present) :]
        if methods:
            notes = keras.tree.pack_sequence_as(kept, rest)
            oracle.notes.update(zip(methods, notes))
        return answer, measures

    def _active(self, step):
        """Whether SAM acts at this update: a boolean, or a tensor."""
        conditions = []
        if self.start_step:
            conditions.append(step >= self.start_step)
        if self.stop_step is not None:
            conditions.append(step < self.stop_step)
        if self.interval > 1:
            conditions.append((step - self.start_step) % self.interval == 0)
        return updates.all_hold(conditions)

    def _second_pass(self, oracle, gradients, step):
        """The gradients at `w + e`, figures, and notes of inner methods."""
        index = functools.partial(keras_internals.variable_index, self)
        chosen = [
            i
            for i, (g, v) in enumerate(zip(gradients, oracle.variables))
            if g is not None and self._perturbed[index(v)]
        ]
        own = many_tensors.each_value([gradients[i] for i in chosen])
        shift, factor, lengths = self._ascent(oracle, chosen, own, step)
        shifted = oracle.at(shift, factor)
        if self.independent_noise:
            shifted = shifted.with_new_noise()
        shifted.notes = {}
        answer = [tracing.densify(g) for g in super().estimate(shifted)]
        _check_answer(gradients, answer, oracle.variables)
        gap, similarity = shifted.loss - oracle.loss, 0.0
        if own:
            others = many_tensors.each_value([answer[i] for i in chosen])
            similarity = cosine(
                many_tensors.inner_product(own, others),
                lengths[0] * many_tensors.total_norm(others),
            )
        dtype = self._figures.dtype
        figures = keras.ops.stack(
            [keras.ops.cast(f, dtype) for f in (*lengths, gap, similarity)]
        )
        return answer, figures, shifted.notes

    def _ascent(self, oracle, chosen, gradients, step):
        """The shift from w to w + e, as a direction and a factor.

        Args:
            chosen: Places of the perturbed variables.
            gradients: Their gradients, in full precision.

        Returns:
            `shift, factor, (|g|, |e|)`.
        """
        shift = [None] * len(oracle.values)
        if not chosen:
            return shift, None, (0.0, 0.0)
        scales = None
        if self.adaptive:
            scales = [
                self._scale(oracle.variables[i], oracle.values[i])
                for i in chosen
            ]
        radius = self._rho.at(step, self.inner_optimizer)
        direction, factor, lengths = ascent(
            gradients, scales, radius, many_tensors.total_norm
        )
        for i, part in zip(chosen, direction):
            shift[i] = part
        return shift, factor, lengths

    def _scale(self, variable, value):
        """T of one variable."""
        offset = self.adaptive is True and _short_name(variable) in OFFSETS
        if offset:
            return 1.0
        size = keras.ops.abs(in_full_precision(value))
        return size if self.adaptive == "all" else size + self.eta

    def _is_perturbed(self, variable):
        if variable.overwrite_with_gradient:  # statistics of fp8 layers
            return False
        if self.variable_filter is None:
            return True
        if self.variable_filter == "normalization":
            return _short_name(variable) in NORMALIZATION
        return bool(self.variable_filter(variable.path))

    def apply_in_order(
        self, gradients: list[Any], variables: list[keras.Variable]
    ) -> None:
        super().apply_in_order(gradients, variables)
        self._figures.assign(finite_figures(self.handed_over))

    def diagnostics(self) -> dict[str, float]:
        """Figures of the last update that was SAM's, read from the device.

        Returns:
            Dict of floats: `gradient_norm` (of the perturbed variables),
            `perturbation_norm`, `sharpness_gap` ($L(w + e) - L(w)$) and
            `cosine` (of the two gradients). All are 0 before SAM has acted.

        Raises:
            ValueError: Before the first step.
        """
        if not self.built:
            raise ValueError("There are no figures before the first step")
        return read_figures(self._figures, FIGURES)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        chosen = self.variable_filter
        if callable(chosen):
            chosen = keras.saving.serialize_keras_object(chosen)
        config.update(
            {
                "rho": self._rho.config(),
                "adaptive": self.adaptive,
                "interval": self.interval,
                "eta": self.eta,
                "start_step": self.start_step,
                "stop_step": self.stop_step,
                "variable_filter": chosen,
                "independent_noise": self.independent_noise,
                "rho_schedule": self._rho.schedule,
                "reference_learning_rate": self._rho.reference,
            }
        )
        return config


def _short_name(variable):
    return variable.path.rsplit("/", 1)[-1]


def _check_answer(first, second, variables):
    """Raises for a weight that is read past Keras: it was not perturbed."""
    for one, other, variable in zip(first, second, variables):
        if one is not None and other is None:
            raise ValueError(
                "SAM hands the perturbed weights to the model as values of "
                "its Keras variables, but a layer reads this one directly, "
                "as wrapped PyTorch modules do. Use an optimizer other than "
                f"SAM. Received: variable {variable.path!r}"
            )
