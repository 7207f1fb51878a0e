"""The gradients of K groups whose rows lie on several processes.

They are exchanged by slices: each process gets its part of the weights of all
K, adds its part to the Gram matrix and combines its part, which one gather
makes whole.
"""

import keras
import numpy as np

from keras_stab.backend import devices
from keras_stab.backend import group_weights
from keras_stab.backend import processes
from keras_stab.backend import products
from keras_stab.gradients import rows
from keras_stab.gradients.groups import GroupGradients
from keras_stab.memory import remembered
from keras_stab.numerics.norms import common_dtype

_QUESTIONS = ("gradient", "groups", "replicas", "plain", "losses")


class ExchangedGradients(GroupGradients):
    """`GroupGradients` of which each process holds a slice.

    Args:
        likes: Tensors, one per variable.
        stacks: Gradients of this process's groups, one tensor `[n, *shape]`
            per variable, or `None`.
        sizes: Its rows in each of them.
        aligned: Whether each group lies on one process: then these are the
            groups of all processes one after the other. Otherwise group k is
            the union of theirs.
        loss: Scalar tensor, the mean over its rows; or `None`.
        error: What this process raised in place of an answer, or `None`. It
            takes part nevertheless, so that all raise and none waits.
    """

    def __init__(self, likes, stacks, sizes, aligned, loss=None, error=None):
        self._likes = likes
        self._packing = processes.Packing(likes)
        matrices = self._packing.pack(stacks, len(sizes))
        own = np.array(sizes, "float64")
        if aligned:
            self._columns = [processes.cut_groups(m) for m in matrices]
            own = np.outer(processes.one_hot_of_rank(), own).ravel()
        else:
            for matrix in matrices:
                matrix *= products.beside(own, matrix)[:, None]
            self._columns = [processes.cut_sums(m) for m in matrices]
        groups = len(own)
        total = processes.sum_numbers(
            [
                products.total(
                    [products.inner_products(c) for c in self._columns]
                ),
                own,
                [stack is not None for stack in stacks],
                processes.one_hot_of_rank() * (error is not None),
                0.0 if loss is None else loss * sum(sizes),
            ],
            likes[0],
        )
        gram, counts, known, failed, loss_sum = np.split(
            total, np.cumsum([groups**2, groups, len(stacks), devices.ranks()])
        )
        _raise_on_all(failed, error)
        self.sizes = [int(n) for n in counts]
        self.rows = sum(self.sizes)
        self.present = rows.present(self.sizes)
        self.loss = loss_sum[0] / max(self.rows, 1)
        self._known = known > 0
        self._scales = np.ones(groups)
        if not aligned:
            self._scales = 1.0 / np.maximum(counts, 1.0)
        gram = gram.reshape(groups, groups) * np.outer(
            self._scales, self._scales
        )
        self._gram = gram.astype(common_dtype(likes))

    def gram(self):
        """Inner products of the group gradients, `(K, K)`.

        An array: they were read to find out whether a process has failed.
        """
        return self._gram

    def combine(self, weights, whole=True):
        """The combination `sum_k weights[k] g_k`, one tensor per variable.

        Args:
            weights, whole: As in `GroupGradients`; here it is always whole.
        """
        weights = weights * products.beside(self._scales, weights)
        parts = [group_weights.combine(weights, c) for c in self._columns]
        parts = [processes.whole(p) for p in parts]
        combined = self._packing.unpack(parts)
        return [
            keras.ops.cast(tensor, like.dtype) if known else None
            for tensor, like, known in zip(combined, self._likes, self._known)
        ]


def _raise_on_all(failed, error):
    if error is not None:
        raise error
    if failed.any():
        numbers = ", ".join(map(str, failed.nonzero()[0]))
        raise RuntimeError(
            "No step was made, because the groups of rows could not be "
            f"evaluated on every process. What was raised on process {numbers} "
            "says why"
        )


def check_agreement(owner, likes, question, groups):
    """Raises on all processes if they do not train one model alike.

    Once for a model and a question, since it reads from every process.

    Args:
        owner: The model, or what else remembers that it was asked.
        likes: The values of its weights.

    Returns:
        Whether this was the first time.
    """
    known = remembered(owner, "processes")
    if (question, groups) in known:
        return False
    squares = [
        keras.ops.sum(keras.ops.square(keras.ops.cast(v, "float64")))
        for v in likes
    ]
    own = [
        _QUESTIONS.index(question),
        groups,
        len(likes),
        sum(v.numel() for v in likes),
        float(sum(squares)),
    ]
    everyone = processes.numbers_of_all(own, likes[0])
    if np.any(everyone[:, :4] != everyone[0, :4]):
        received = "; ".join(
            f"{_QUESTIONS[int(q)]!r} of {int(k)} groups for {int(p)} weights "
            f"in {int(n)} variables on process {i}"
            for i, (q, k, n, p, _) in enumerate(everyone)
        )
        raise ValueError(
            "All processes must train the same model by the same method with "
            f"the same number of groups. Received: {received}"
        )
    sums = everyone[:, 4]
    if not np.isclose(sums, sums[0], 1e-6, 0.0, equal_nan=True).all():
        raise ValueError(
            "The processes hold different weights, which summed gradients "
            "would not bring together: call keras.utils.set_random_seed with "
            "the same seed on all of them before the model is made, or load "
            "the same weights. Received: squared norms of "
            + ", ".join(f"{s:.8g}" for s in sums)
        )
    known[question, groups] = True
    return True
