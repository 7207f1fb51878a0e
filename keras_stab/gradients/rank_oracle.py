"""The oracle of a batch whose rows lie on several processes."""

import functools

import keras

from keras_stab.backend import devices
from keras_stab.backend import processes
from keras_stab.gradients import rows
from keras_stab.gradients.by_loss import count_losses
from keras_stab.gradients.engines import warn_of_empty_groups
from keras_stab.gradients.exchanged import ExchangedGradients
from keras_stab.gradients.exchanged import check_agreement
from keras_stab.gradients.oracle import GradientOracle
from keras_stab.gradients.pooling import shift_seeds

# Seeds of a process: beyond those of every group and of other noise.
_NOISE_OF_A_RANK = 65


def oracle_for(model, x, y, sample_weight):
    """The oracle of a train step."""
    kind = RankOracle if devices.ranks() > 1 else GradientOracle
    return kind(model, x, y, sample_weight)


class RankOracle(GradientOracle):
    """Answers for the rows of all processes, each of which asks alike.

    Each evaluates its own rows. Gradients and the loss are means over the rows
    of all, however many each has; moving statistics are pooled, as those of
    groups are. Predictions and metrics are those of its own rows.
    """

    def __init__(self, model, x, y=None, sample_weight=None):
        super().__init__(model, x, y, sample_weight)
        self._shift = devices.rank() * _NOISE_OF_A_RANK
        self.non_trainable = shift_seeds(
            self.non_trainable_variables, self.non_trainable, self._shift
        )
        self._is_pooled = False

    def gradient_of_outputs(self, loss):
        gradients = super().gradient_of_outputs(loss)
        return self._over_ranks(self._outcome, gradients)[1]

    @property
    def outcome(self):
        outcome = super().outcome
        root, current = self._root, self._root._current
        if not root._is_pooled:
            current._outcome = outcome = self._pooled(outcome)
            root._is_pooled = True
        return outcome

    def _evaluate(self):
        return self._over_ranks(*super()._evaluate())

    def _evaluate_and_keep(self):
        return self._over_ranks(*super()._evaluate_and_keep())

    def _over_ranks(self, evaluation, gradients):
        check_agreement(self.model, self.values, "gradient", 1)
        gradients, loss = processes.mean_over_rows(
            gradients, self.values, evaluation.loss, self._rows()
        )
        return evaluation._replace(loss=loss), gradients

    def _groups(self, groups, *arguments):
        ask = functools.partial(super()._groups, groups, *arguments)
        question = "replicas" if "replicas" in arguments else "groups"
        exchanged = self._exchanged(question, groups, ask)
        warn_of_empty_groups(self.model, exchanged)
        return exchanged

    def _losses(self):
        count = count_losses(self.model)
        exchanged = self._exchanged("losses", count, super()._losses)
        exchanged.rows = exchanged.sizes[0]
        return exchanged

    def _exchanged(self, question, groups, ask):
        """The gradients of the groups of all processes."""
        aligned = question == "replicas"
        check_agreement(self.model, self.values, question, groups)
        own = groups // devices.ranks() if aligned else groups
        stacks, sizes = [None] * len(self.values), [0] * own
        answer = error = loss = None
        try:
            answer = ask()
            stacks, sizes, loss = answer.stacks(), answer.sizes, self.loss
        except Exception as raised:
            # Told to the others, which would wait for this one.
            error = raised
        exchanged = ExchangedGradients(
            self.values, stacks, sizes, aligned, loss, error
        )
        exchanged.plan = answer.plan
        loss = keras.ops.convert_to_tensor(exchanged.loss, dtype=loss.dtype)
        self._outcome = self._outcome._replace(loss=loss)
        return exchanged

    def _pooled(self, outcome):
        """The outcome of a step, with the stored state that all share."""
        variables = self.non_trainable_variables
        state = shift_seeds(variables, outcome.state, -self._shift)
        state = self.state_pool().over_ranks(
            self.non_trainable, state, self._rows()
        )
        return outcome._replace(
            state=state, replacements=processes.largest(outcome.replacements)
        )

    def _rows(self):
        return rows.batch_size(*self.batch)
