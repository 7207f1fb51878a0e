"""One worker of a torch.distributed process group; prints JSON.

Arguments: rank, number of workers, path of the rendezvous file.
"""

import json
import sys

import keras
import torch
import torch.distributed
import toy

import keras_stab
from keras_stab.optimizers.gradient_method import GradientMethod

ROWS = 32


def adam():
    return keras.optimizers.Adam(0.01)


def grain():
    return keras_stab.GRAIN(adam(), groups=4)


class WholeBatch(GradientMethod):
    """Asks the oracle for what the stock step would have used."""

    def estimate(self, oracle):
        oracle.notes[self] = True
        return oracle.gradient()


def train(optimizer, network=None):
    network = toy.model() if network is None else network
    return toy.train(network, optimizer, *toy.data(ROWS), ROWS, [3 * ROWS])


def refusal(optimizer):
    """The error of a `fit` and whether it left the weights as they were."""
    network = toy.model()
    before = [w.copy() for w in network.get_weights()]
    try:
        train(optimizer, network)
    except RuntimeError as error:
        return {
            "error": str(error),
            "untouched": all(
                (a == b).all() for a, b in zip(before, network.get_weights())
            ),
        }
    return {"error": None}


def synchronised(rank, workers):
    """GRAIN across batches in a DDP loop: each worker has its own rows."""
    network = toy.model(batch_norm=False)
    optimizer = keras_stab.GRAIN(adam(), groups=3, across="batches")
    optimizer.build(network.trainable_variables)
    module = torch.nn.parallel.DistributedDataParallel(network)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    x, y = toy.data(ROWS)
    for start in range(rank, len(x), ROWS):
        rows = slice(start, start + ROWS - rank, workers)
        network.zero_grad()
        loss(y[rows], module(torch.from_numpy(x[rows]))).backward()
        gradients = [v.value.grad for v in network.trainable_variables]
        with torch.no_grad():
            optimizer.apply(gradients, network.trainable_variables)
    return {
        "weights": [[w.tolist() for w in network.get_weights()]],
        "group_weights": [optimizer.diagnostics()["weights"]],
    }


def main(rank, workers, meeting):
    torch.set_num_threads(1)
    results = {}
    if workers == 1:
        results["no process group"] = train(grain())
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=workers
    )
    if workers == 1:
        results["grain"] = train(grain())
    else:
        results["grain"] = refusal(grain())
        results["whole batch"] = refusal(WholeBatch(adam()))
    results["across batches"] = synchronised(rank, workers)
    torch.distributed.destroy_process_group()
    print(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
