"""PyTorch: counts what is handed to `torch.distributed`, in four processes."""

import functools

import keras
import torch
import torch.distributed

from traffic import cases

KINDS = {
    "all_reduce": "all-reduce",
    "all_gather_into_tensor": "all-gather",
    "all_gather_single": "all-gather",
    "all_gather": "all-gather",
    "all_to_all_single": "all-to-all",
    "reduce_scatter_tensor": "reduce-scatter",
    "reduce_scatter_single": "reduce-scatter",
    "broadcast": "broadcast",
}


def measure(model, arm, rank):
    """Bytes of the second step, as this rank hands them over."""
    network = cases.make_model(model, arm)
    x, y = cases.make_data(model)
    share = cases.ROWS // cases.DEVICES
    rows = slice(rank * share, (rank + 1) * share)
    x, y = x[rows], y[rows]
    found = []
    if arm.options is None:
        step = _loop_with_ddp(network, found)
    else:
        step = network.train_on_batch
    step(x, y)
    found.clear()
    with _counted(found):
        step(x, y)
    return cases.summary(cases.number_of_weights(network), found)


def _loop_with_ddp(network, found):
    """The step of a loop of one's own, gradients averaged by PyTorch."""
    module = torch.nn.parallel.DistributedDataParallel(network)
    network.optimizer.build(network.trainable_variables)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def summed(state, bucket):
        size = bucket.buffer().nbytes
        found.append(("all-reduce", 1, size))
        mean = bucket.buffer().div_(cases.DEVICES)
        work = torch.distributed.all_reduce(mean, async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    module.register_comm_hook(None, summed)

    def step(x, y):
        network.zero_grad()
        loss(y, module(torch.from_numpy(x))).backward()
        gradients = [v.value.grad for v in network.trainable_variables]
        with torch.no_grad():
            network.optimizer.apply(gradients, network.trainable_variables)

    return step


class _counted:
    """Within it, collectives are noted in a list."""

    def __init__(self, found):
        self._found = found

    def __enter__(self):
        # Those that this version of PyTorch has.
        self._own = {
            name: getattr(torch.distributed, name)
            for name in KINDS
            if hasattr(torch.distributed, name)
        }
        for name, function in self._own.items():
            setattr(torch.distributed, name, self._noting(name, function))

    def __exit__(self, *_):
        for name, function in self._own.items():
            setattr(torch.distributed, name, function)

    def _noting(self, name, function):
        @functools.wraps(function)
        def noting(result, *args, **kwargs):
            parts = result if isinstance(result, list) else [result]
            size = sum(part.nbytes for part in parts)
            if not kwargs.get("async_op"):  # the hook above notes its own
                self._found.append((KINDS[name], 1, size))
            return function(result, *args, **kwargs)

        return noting
