"""IRE: implicit regularization enhancement."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import keras

from keras_stab import keras_internals
from keras_stab.arguments import checked_boolean
from keras_stab.arguments import checked_choice
from keras_stab.arguments import checked_count
from keras_stab.arguments import checked_fraction
from keras_stab.backend import devices
from keras_stab.backend import updates
from keras_stab.gradients.oracle import GradientOracle
from keras_stab.gradients.sampled_labels import check_losses
from keras_stab.gradients.train_step import wants_oracle
from keras_stab.optimizers.exclusions import as_patterns
from keras_stab.optimizers.exclusions import excluded_variables
from keras_stab.optimizers.flatness.boost import Boost
from keras_stab.optimizers.flatness.boost import decay_rates
from keras_stab.optimizers.flatness.boost_start import BoostStart
from keras_stab.optimizers.flatness.fisher import FisherPass
from keras_stab.optimizers.flatness.flat_mask import FlatMask
from keras_stab.optimizers.flatness.ire_arguments import CURVATURES
from keras_stab.optimizers.flatness.ire_arguments import always_moves
from keras_stab.optimizers.flatness.ire_arguments import check_inner
from keras_stab.optimizers.flatness.ire_arguments import checked_sampler
from keras_stab.optimizers.flatness.ire_arguments import first_step
from keras_stab.optimizers.flatness.ire_arguments import (
    refuse_fisher_on_replicas,
)
from keras_stab.optimizers.flatness.second_moment import second_moment_roots
from keras_stab.optimizers.flatness.strengths import Strength
from keras_stab.optimizers.gradient_method import GradientMethod
from keras_stab.optimizers.wrapper import innermost
from keras_stab.registration import registered


@registered
class IRE(GradientMethod):
    r"""Moves faster along the weights in which the loss is flat.

    The inner optimizer makes its whole step, from $w$ to $w + \delta$. Then

    $$
    w \leftarrow w + \delta + \kappa \, m \odot \delta
    $$

    where the mask m is 1 for the fraction $\gamma$ of all weights with the
    smallest curvature, in one ranking over all variables, and 0 for the
    others. The curvature is estimated again every K updates. The inner
    optimizer does not know of it.

    Args:
        inner_optimizer: Keras optimizer, name or config. Gradients, clipping,
            weight decay and learning rate are its own. Defaults to
            `"adamw"`.
        flat_fraction: Float in (0, 1), $\gamma$; 1 boosts every weight, as a
            control. Defaults to 0.6.
        boost: Float, $\kappa$, at least 0, or a `LearningRateSchedule` of the
            updates since `start_step`. 0 is the inner optimizer itself.
            Defaults to 2.0.
        update_every: Int, K. Defaults to 10.
        start_step: Int, the first boosted update; `"warmup_end"`, the
            `warmup_steps` of the inner schedule; or `"manual"`: when
            `start_boost` or the callback `keras_stab.StartBoostAtLoss` says
            so. No published run starts at 0 without a warm-up. Defaults to 0.
        curvature: What is squared to give a score. `"fisher"`: the gradient at
            labels drawn from the model's own predictions, which costs one
            more forward and backward pass of `fisher_fraction` of the batch
            every K updates. `"second_moment"`: the running average that the
            inner Adam, AdamW, Nadam, Lamb or RMSprop keeps; no extra pass.
            `"gradient"`: the training gradient; no extra pass where the inner
            optimizer takes plain gradients; set `curvature_momentum=0.95`
            with it. The paper uses neither of the last two. Defaults to
            `"fisher"`.
        curvature_momentum: Float in [0, 1), of a running average of the
            scores; 0.9 makes masks that change less. Defaults to 0.0.
        fisher_fraction: Float in (0, 1], the part of the batch in the Fisher
            pass. With 1.0 the forward pass of the training gradient is used
            again, and stays in memory until then, if the inner optimizer
            takes the gradient of the whole batch. Defaults to 0.25.
        boost_schedule: `"constant"`, or `"learning_rate"`: $\kappa$ times the
            learning rate over its highest value. Defaults to `"constant"`.
        reference_learning_rate: Float, that highest value; `None` takes it
            from the schedule of the inner optimizer.
        boost_weight_decay: Whether the decoupled weight decay of the inner
            optimizer is boosted with the rest. Defaults to `True`.
        label_sampler: Function `(outputs, seed) -> labels` for a custom loss
            (register it as serializable to save the model); `seed` is for
            functions of `keras.random`. Defaults to `None`.
        exclude: Variables, or regular expressions for their paths, that are
            neither ranked nor boosted. Defaults to `None`.
        seed: Int, the seed of the drawn labels; `None` for one that differs
            in every process unless `keras.utils.set_random_seed` was called.
        name: String or `None`.

    Raises:
        ValueError: If an argument is out of range, belongs on the inner
            optimizer, the inner optimizer cannot be used, or the labels of
            the loss cannot be drawn.
        RuntimeError: If it is given plain gradients with
            `curvature="fisher"`.

    A refresh whose curvature is not finite, or zero everywhere, keeps the old
    mask and is counted. The Fisher pass leaves batch-norm statistics, seeds,
    metrics and the inner optimizer's state as they are, and always looks at
    the weights themselves, around `SAM` too. `diagnostics()` reads figures of
    the last refresh. Keep the weights in float32: the boost multiplies the
    rounding of a less precise step.

    Example:

    >>> import keras, keras_stab
    >>> model = keras.Sequential([keras.layers.Dense(4), keras.layers.Dense(1)])
    >>> optimizer = keras_stab.IRE("adamw", flat_fraction=0.6)
    >>> model.compile(optimizer=optimizer, loss="mse")
    >>> x, y = keras.random.normal((8, 3), seed=1), keras.ops.ones((8, 1))
    >>> history = model.fit(x, y, batch_size=8, verbose=0)
    >>> round(optimizer.diagnostics()["flat_fraction"], 2)  # 12 of 21
    0.57

    Departures from the paper:
        A quarter of the batch is in the Fisher pass (paper: all of it;
        `fisher_fraction=1.0` is its setting), and each of its rows counts
        with the root of its sample weight. Ties count as flat. On JAX a weight
        that the loss does not depend on counts as flat; the other backends
        leave it out.

    Cost:
        One copy of the weights during an update (PyTorch keeps its memory)
        and a few operations on each; one byte per weight is kept, with
        `curvature_momentum` four. `benchmarks/step_time.py` measures it.

    References:
        - Wang, He, Wang, Wang, Huang, Wang, Li, E, Wu, 2024, "Improving
          Generalization and Convergence by Enhancing Implicit
          Regularization", arXiv:2405.20763
    """

    sees_unperturbed_weights_only = True
    plain_gradient_hint = (
        '. Or use curvature="gradient" or curvature="second_moment" around an '
        "optimizer of plain gradients, which works in any training loop"
    )

    def __init__(
        self,
        inner_optimizer: str | dict | keras.optimizers.Optimizer = "adamw",
        flat_fraction: float = 0.6,
        boost: float | keras.optimizers.schedules.LearningRateSchedule = 2.0,
        update_every: int = 10,
        start_step: int | str = 0,
        curvature: str = "fisher",
        curvature_momentum: float = 0.0,
        fisher_fraction: float = 0.25,
        boost_schedule: str = "constant",
        reference_learning_rate: float | None = None,
        boost_weight_decay: bool = True,
        label_sampler: Callable[[Any, Any], Any] | None = None,
        exclude: Sequence[str | keras.Variable] | None = None,
        seed: int | None = None,
        name: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(inner_optimizer, name=name, **kwargs)
        self._boost = Strength(
            "boost", boost, boost_schedule, reference_learning_rate
        )
        self.flat_fraction = checked_fraction("flat_fraction", flat_fraction)
        self.update_every = checked_count("update_every", update_every, 1)
        self.curvature = checked_choice("curvature", curvature, CURVATURES)
        self.curvature_momentum = checked_fraction(
            "curvature_momentum", curvature_momentum, zero=True, one=False
        )
        self.fisher_fraction = checked_fraction(
            "fisher_fraction", fisher_fraction
        )
        self.boost_weight_decay = checked_boolean(
            "boost_weight_decay", boost_weight_decay
        )
        self.label_sampler = checked_sampler(label_sampler, curvature)
        self._draws_labels = (
            curvature == "fisher"
            and self.label_sampler is None
            and type(self).fisher_roots is IRE.fisher_roots
        )
        self.exclude = as_patterns("exclude", exclude)
        self.seed = checked_count("seed", seed, 0, optional=True)
        self.start_step = start_step
        self._first = first_step(start_step, self.inner_optimizer)
        self._boost.check(self.inner_optimizer)
        check_inner(self.inner_optimizer, curvature, self.curvature_momentum)

    def build(self, variables: Iterable[keras.Variable]) -> None:
        if self.built:
            return
        variables = list(variables)
        super().build(variables)
        excluded = excluded_variables("exclude", self.exclude, False, variables)
        included = [
            not (left_out or v.overwrite_with_gradient)
            for v, left_out in zip(variables, excluded)
        ]
        self._mask = FlatMask(
            self,
            variables,
            included,
            self.flat_fraction,
            self.curvature_momentum,
        )
        self._start = BoostStart(self, self._first)
        self._always_moves = always_moves(self.inner_optimizer)
        generator = keras.random.SeedGenerator(self.seed)
        # Keras tracks variables, not the objects that hold them.
        self._label_seed = generator.state
        self._fisher_pass = FisherPass(generator, self.label_sampler)

    @property
    def wants_oracle(self) -> bool:
        return self.curvature == "fisher" or wants_oracle(self.inner_optimizer)

    # ---- When -------------------------------------------------------------

    def start_boost(self) -> None:
        """Boosts from the next update on; for `start_step="manual"`."""
        if self.start_step != "manual":
            raise ValueError(
                'The start is already set. Make IRE with start_step="manual" '
                f"to set it later. Received: start_step={self.start_step!r}"
            )
        if not self.built:
            raise ValueError("Build the optimizer, or train, first")
        self._start.set(self.completed_updates())

    @property
    def has_started(self) -> bool:
        """Whether `start_boost` was called, or the start is set anyway."""
        if not self.built:
            return self._first is not None
        return self._start.is_set

    # ---- Curvature --------------------------------------------------------

    def estimate(self, oracle: GradientOracle) -> list[Any]:
        note = None
        step = self.known_updates()
        if self._draws_labels:
            # Checked at the first step, not when labels are first drawn.
            check_losses(oracle.model)
        if self._draws_labels and self.fisher_fraction == 1.0:
            # The Fisher pass sees what the training pass has seen.
            oracle.keep_forward()
        gradients = super().estimate(oracle)
        if self.curvature == "fisher":
            refuse_fisher_on_replicas()
            note = self._refresh(
                step,
                lambda: self.fisher_roots(
                    oracle, keras.ops.convert_to_tensor(step, "int32")
                ),
                oracle.variables,
            )
        elif self.curvature == "gradient":
            # At w, which is not where the gradients of SAM are taken.
            if devices.replicas() > 1:  # no exchange inside a condition
                oracle.gradient()
            note = self._refresh(
                step,
                lambda: (oracle.gradient_beside(), 1.0),
                oracle.variables,
            )
        oracle.notes[self] = (note,)
        return gradients

    def _refresh(self, step, roots_and_size, variables):
        """Whether a refresh is due, and the state of the mask after it."""

        def refreshed():
            roots, size = roots_and_size()
            roots = self.in_built_order(roots, variables)
            return self._mask.refreshed(roots, size)

        base = innermost(self.inner_optimizer)
        due = self._start.is_due(step, self.update_every, base)
        if isinstance(due, bool):
            return due, refreshed() if due else self._mask.values()
        return due, keras.ops.cond(due, refreshed, self._mask.values)

    def drawing(self, step: Any) -> AbstractContextManager:
        """Yields a seed for `keras.random`, a new one at every update."""
        return self._fisher_pass.drawing_from(self._fisher_pass.seed_at(step))

    def fisher_roots(
        self, oracle: GradientOracle, step: Any
    ) -> tuple[list[Any], Any]:
        """What `curvature="fisher"` squares to scores; runs when it is due.

        Args:
            oracle: The `GradientOracle` of the batch.
            step: Int32 scalar tensor, updates made so far.

        Returns:
            List of tensors, one per trainable variable, `None` for one that is
            left out of the ranking; and a scalar by which the squares are
            multiplied in averages: the gradient at sampled labels, and the
            number of labels. A subclass may rank by something else.
        """
        if self.fisher_fraction < 1.0:
            oracle = oracle.head(self.fisher_fraction)
        return self._fisher_pass.roots(oracle, self._fisher_pass.seed_at(step))

    # ---- The step ---------------------------------------------------------

    def apply_in_order(
        self, gradients: list[Any], variables: list[keras.Variable]
    ) -> None:
        step = self.known_updates()
        due, state = self._after_refresh(step, gradients, variables)
        started = self._start.has_come(step)
        flat = [self._mask.flat(i, state) for i in range(len(variables))]
        if self._boost.is_zero or started is False:
            flat = []  # and no copy of the weights
        strength = self._boost.at(self._start.count(step), self.inner_optimizer)
        base, decays = innermost(self.inner_optimizer), [None] * len(variables)
        if not self.boost_weight_decay:
            decays = decay_rates(base, variables, gradients)
        boost = Boost(variables, flat, self._mask.room)
        super().apply_in_order(gradients, variables)
        # Not in a step that a loss scaler drops, or a part of an update.
        moved = self._always_moves or self.known_updates() > step
        self._mask.assign(state, due, moved)
        boost.finish(updates.all_hold([moved, started]), strength, decays)

    def _after_refresh(self, step, gradients, variables):
        note = self.handed_over and self.handed_over[0]
        if note is not None:
            return note
        if self.curvature == "second_moment":
            base = innermost(self.inner_optimizer)
            return self._refresh(
                step,
                lambda: (second_moment_roots(base, variables), 1.0),
                variables,
            )
        gradients = devices.sum_shares(gradients)
        scale = 1.0 / self.scale_loss(1.0)
        return self._refresh(step, lambda: (gradients, scale**2), variables)

    def diagnostics(self) -> dict[str, Any]:
        """Figures of the last refresh, read from the device.

        Returns:
            Dict: `flat_fraction`; `sharp_overlap`, the part of the sharp
            weights that stayed sharp; `curvature_trace`, the sum of the new
            scores (for `"fisher"` an estimate of the trace of the Fisher
            matrix); `refreshes` and `skipped_refreshes`, ints;
            `flat_fractions`, from the path of a variable to the flat part of
            its weights.
        """
        if not self.built:
            raise ValueError("There are no figures before the first step")
        return self._mask.figures(keras_internals.built_variables(self))

    def stability_metrics(self) -> dict[str, Any]:
        """For `StabilityMonitor`: `diagnostics()` and the mask's churn.

        `mask_churn` is the part of the sharp weights that the last refresh
        made flat; 0 before the second.
        """
        figures = self.diagnostics()
        compared = figures["refreshes"] > 1
        figures["mask_churn"] = compared * (1.0 - figures["sharp_overlap"])
        return figures

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        sampler = keras.saving.serialize_keras_object(self.label_sampler)
        config.update(
            {
                "flat_fraction": self.flat_fraction,
                "boost": self._boost.config(),
                "update_every": self.update_every,
                "start_step": self.start_step,
                "curvature": self.curvature,
                "curvature_momentum": self.curvature_momentum,
                "fisher_fraction": self.fisher_fraction,
                "boost_schedule": self._boost.schedule,
                "reference_learning_rate": self._boost.reference,
                "boost_weight_decay": self.boost_weight_decay,
                "label_sampler": sampler,
                "exclude": self.exclude,
                "seed": self.seed,
            }
        )
        return config
