"""What the processes of a PyTorch process group exchange.

Each of them trains the same model on rows of its own. All functions below but
`synchronise_themselves` are collectives: every process must call them, in
the same order, with tensors of the same shapes. Numbers that decide something
come back alike on all of them.
"""

import math

import numpy as np

from keras_stab.backend.devices import BACKEND
from keras_stab.backend.devices import rank
from keras_stab.backend.devices import ranks

if BACKEND == "torch":
    import torch
    import torch.distributed as distributed


class Packing:
    """Many tensors side by side: one vector for each dtype and device.

    A collective for each tensor would wait for the network that often.

    Args:
        likes: Tensors of the shapes and, in full precision, the dtypes.
    """

    def __init__(self, likes):
        self._likes = likes
        self._kinds = {}
        for i, like in enumerate(likes):
            half = like.dtype in (torch.float16, torch.bfloat16)
            dtype = torch.float32 if half else like.dtype
            self._kinds.setdefault((dtype, like.device), []).append(i)

    def pack(self, stacks, rows):
        """Matrices `[rows, P]`; a missing stack is zeros.

        Args:
            stacks: List of tensors `[n, *shape]` with n up to `rows`, the
                others being zeros, or `None`.
        """
        matrices = []
        for (dtype, device), places in self._kinds.items():
            whole = all(
                stacks[i] is not None and len(stacks[i]) == rows for i in places
            )
            new = torch.empty if whole else torch.zeros
            length = sum(self._likes[i].numel() for i in places)
            matrix = new((rows, length), dtype=dtype, device=device)
            start = 0
            for i in places:
                size = self._likes[i].numel()
                if stacks[i] is not None:
                    stack = stacks[i].detach().reshape(len(stacks[i]), size)
                    matrix[: len(stack), start : start + size] = stack
                start += size
            matrices.append(matrix)
        return matrices

    def unpack(self, vectors):
        """The tensors, from one vector for each dtype and device."""
        tensors = [None] * len(self._likes)
        for places, vector in zip(self._kinds.values(), vectors):
            sizes = [self._likes[i].numel() for i in places]
            pieces = torch.split(vector[: sum(sizes)], sizes)
            for i, piece in zip(places, pieces):
                tensors[i] = piece.reshape(self._likes[i].shape)
        return tensors


def mean_over_rows(gradients, likes, loss, rows):
    """The mean over the rows of all processes, from means over their own.

    Args:
        gradients: List of tensors; `None` stays where all processes have it.
        likes: Tensors of the same shapes.
        loss: Scalar tensor, averaged too.
        rows: Int, the rows of this process.

    Returns:
        The gradients, the loss.
    """
    packing = Packing(likes)
    sums = packing.pack([g if g is None else g[None] for g in gradients], 1)
    head = _numbers(
        [rows, *(g is not None for g in gradients), 0.0], likes[0].device
    )
    head[-1] = rows * loss.detach() if rows else 0.0
    distributed.all_reduce(head)
    means = []
    for (vector,) in sums:
        # Made above, so that its memory may be written over.
        vector = vector.mul_(rows) if rows else vector.zero_()
        distributed.all_reduce(vector)
        means.append(vector.div_(head[0].to(vector.dtype)))
    known = [True] * len(gradients)
    if any(g is None for g in gradients):
        known = head[1:-1].tolist()
    means = [
        m.to(like.dtype) if present else None
        for m, like, present in zip(packing.unpack(means), likes, known)
    ]
    return means, (head[-1] / head[0]).to(loss.dtype)


def cut_sums(matrix):
    """From `[K, P]` on each process to this one's columns of the sum.

    Args:
        matrix: Tensor; P is padded to a multiple of the processes.

    Returns:
        Tensor `[K, P / W]`.
    """
    parts = _in_columns(matrix)
    mine = torch.empty_like(parts[0])
    _reduce_scatter(mine.view(-1), parts.view(-1))
    return mine


def cut_groups(matrix):
    """From `[m, P]` on each process to this one's columns of `[W m, P]`."""
    parts = _in_columns(matrix)
    mine = torch.empty_like(parts)
    distributed.all_to_all_single(mine, parts)
    return mine.flatten(0, 1)


def _in_columns(matrix):
    """`[W, K, P / W]`, padded with zeros."""
    groups, length = matrix.shape
    width = math.ceil(length / ranks())
    missing = width * ranks() - length
    if missing:
        matrix = torch.nn.functional.pad(matrix, (0, missing))
    parts = matrix.reshape(groups, ranks(), width).transpose(0, 1)
    return parts.contiguous()


def whole(columns):
    """The vector `[P]`, padded, of which each process has a part `[P / W]`."""
    vector = columns.new_empty((ranks() * len(columns),))
    _all_gather(vector, columns.contiguous())
    return vector


def sum_numbers(numbers, like):
    """The sum over all processes of a few numbers, a float64 array.

    Args:
        numbers: List of numbers and small tensors, which are made flat.
        like: Tensor on the device that the collective needs.
    """
    parts = [
        part.detach().to(like.device, torch.float64).flatten()
        if torch.is_tensor(part)
        else _numbers(np.ravel(part), like.device)
        for part in numbers
    ]
    total = torch.cat(parts)
    distributed.all_reduce(total)
    return total.cpu().numpy()


def numbers_of_all(numbers, like):
    """Array `[W, n]`: the n numbers of each process."""
    own = _numbers(numbers, like.device)
    everyone = own.new_empty((ranks() * len(own),))
    _all_gather(everyone, own)
    return everyone.reshape(ranks(), -1).cpu().numpy()


def sum_each(tensors):
    """The sum over all processes of each tensor, in float64."""
    flat = torch.cat([t.detach().double().flatten() for t in tensors])
    distributed.all_reduce(flat)
    pieces = torch.split(flat, [math.prod(t.shape) for t in tensors])
    return [piece.reshape(t.shape) for piece, t in zip(pieces, tensors)]


def largest(tensors):
    """The largest value on any process, entry by entry; `None` stays."""
    answer = list(tensors)
    for i, tensor in enumerate(tensors):
        if tensor is not None:
            answer[i] = tensor.detach().double()
            operation = distributed.ReduceOp.MAX
            distributed.all_reduce(answer[i], op=operation)
            answer[i] = answer[i].to(tensor.dtype)
    return answer


def one_hot_of_rank():
    """Array `[W]`, 1 for this process."""
    return np.eye(ranks())[rank()]


def synchronise_themselves(layers):
    """Whether a part of a layer sums its gradients over the processes."""
    kind = torch.nn.parallel.DistributedDataParallel
    return any(isinstance(m, kind) for each in layers for m in each.modules())


def _numbers(values, device):
    values = [float(value) for value in values]
    return torch.tensor(values, dtype=torch.float64, device=device)


# PyTorch 2.13 gives these two new names and warns of the old ones.


def _all_gather(output, own):
    name = "all_gather_single"
    if not hasattr(distributed, name):
        name = "all_gather_into_tensor"
    getattr(distributed, name)(output, own)


def _reduce_scatter(output, own):
    name = "reduce_scatter_single"
    if not hasattr(distributed, name):
        name = "reduce_scatter_tensor"
    getattr(distributed, name)(output, own)
