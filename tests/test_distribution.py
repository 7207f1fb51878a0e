"""Several devices: each backend's own way to use them gives one answer.

Virtual devices are set up before a backend starts, hence in other processes
(`tests/workers`). Each backend collects its own checks.
"""

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
import pytest
from reference import min_norm_by_enumeration

WORKERS = Path(__file__).parent / "workers"

# Measured: 4e-7 for weights, plain Adam 3e-7; group weights 1e-5 at most.
WEIGHTS = 1e-5
GROUP_WEIGHTS = 1e-4


def start(script, *arguments, **environment):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        **environment,
    }
    return subprocess.Popen(
        [sys.executable, str(WORKERS / script), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(process):
    try:
        output, errors = process.communicate(timeout=400)
    finally:
        process.kill()  # it has ended, unless the time was up
    assert process.returncode == 0, errors[-4000:]
    return json.loads(output.splitlines()[-1])


def flat(arrays):
    return np.concatenate([np.ravel(a) for a in arrays])


def largest_difference(a, b, name, epoch=slice(None)):
    """Over one entry of two runs, nested lists of numbers."""
    a, b = (flat(keras.tree.flatten(run[name][epoch])) for run in (a, b))
    return np.max(np.abs(a - b))


def assert_same_run(a, b, weights=WEIGHTS, group_weights=GROUP_WEIGHTS):
    assert np.all(np.isfinite(flat(keras.tree.flatten(a["weights"]))))
    assert largest_difference(a, b, "weights") < weights
    assert largest_difference(a, b, "loss") < 1e-5
    assert a["accuracy"] == pytest.approx(b["accuracy"], abs=1e-6)
    if a["group_weights"]:
        assert largest_difference(a, b, "group_weights") < group_weights
        first = slice(0, 1)
        assert largest_difference(a, b, "group_weights", first) < 1e-5


# ---- JAX: keras.distribution ----------------------------------------------


def on_eight_devices(*runs):
    # Compiling takes most of the time of so small a model.
    flags = [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
    ]
    process = start("jax_distribution.py", *runs, XLA_FLAGS=" ".join(flags))
    result = answer(process)
    assert result["devices"] == 8
    return result


def data_and_model_parallel_give_the_result_of_one_device(folder):
    runs = on_eight_devices(
        "adam:one",
        "adam:data",
        "adam:model",
        "grain:one",
        "grain:data",
        "grain:model",
        "grain:blocks",
        "scaled:data",
    )
    for name in ("adam", "grain"):
        for distribution in ("data", "model"):
            assert_same_run(runs[f"{name}:one"], runs[f"{name}:{distribution}"])
    assert_same_run(runs["grain:one"], runs["scaled:data"])
    # The comparison sees other groups of the same rows, as devices that
    # solved for themselves would have, and another optimizer.
    one = runs["grain:one"]
    first = slice(0, 1)
    other = largest_difference(
        one, runs["grain:blocks"], "group_weights", first
    )
    assert other > 0.05
    assert largest_difference(one, runs["adam:one"], "weights") > 0.01
    assert _axes(runs["grain:model"], "hidden/kernel") == [None, "model"]
    assert _axes(runs["grain:data"], "hidden/kernel") == [None, None]


def so_do_other_groups_and_methods_with_slots_of_their_own(folder):
    iterates = [f"{name}:{how}" for name in SLOTS for how in ("one", "model")]
    runs = on_eight_devices(
        *iterates,
        "game:one",
        "game:data",
        "uneven:one",
        "uneven:data",
        "batches:one",
        "batches:data",
        "batches:model",
        "ire:one",
        "ire:data",
        "ire:model",
    )
    for distribution in ("data", "model"):
        assert_same_run(runs["ire:one"], runs[f"ire:{distribution}"])
    assert _axes(runs["ire:model"], "hidden_kernel_flat") == [None, "model"]
    assert_same_run(runs["uneven:one"], runs["uneven:data"])
    assert_same_run(runs["batches:one"], runs["batches:data"])
    assert_same_run(runs["batches:one"], runs["batches:model"])
    # Each window is cut as its variable is; the K gradients stay together.
    sharded = runs["batches:model"]
    assert _axes(sharded, "head/kernel") == ["model", None]
    assert _axes(sharded, "head_kernel_window") == [None, "model", None]
    assert _axes(sharded, "hidden_kernel_window") == [None, None, "model"]
    assert _axes(sharded, "gamma_window") == [None, "model"]
    assert _axes(sharded, "beta_window") == [None, None]
    _check_iterates(runs)
    for kind, weights in runs["game:one"].items():
        difference = flat(weights) - flat(runs["game:data"][kind])
        assert np.max(np.abs(difference)) < WEIGHTS


# What each method keeps of every variable. Under DataParallel they are tried
# with the contract.
SLOTS = {
    "rapp": ["anchor"],
    "cegplus": ["iterate", "forward"],
    "adaptive": ["iterate", "forward"],
    "lookahead": ["slow"],
    "extragradient": ["anchor"],
    "optimistic": ["last_update"],
    "past": ["iterate"],
}


def _check_iterates(runs):
    for name, slots in SLOTS.items():
        sharded = runs[f"{name}:model"]
        assert_same_run(runs[f"{name}:one"], sharded)
        for slot in slots:
            assert _axes(sharded, f"hidden_kernel_{slot}") == [None, "model"]
            assert _axes(sharded, f"head_kernel_{slot}") == ["model", None]
            assert _axes(sharded, f"beta_{slot}") == [None]
    assert_apart([runs[f"{name}:one"] for name in SLOTS])


def assert_apart(runs):
    """So that the comparison could see one method in the place of another."""
    for i, run in enumerate(runs):
        for other in runs[:i]:
            assert largest_difference(run, other, "weights") > 10 * WEIGHTS


def _axes(run, name):
    (found,) = [v for path, v in run["axes"].items() if path.endswith(name)]
    return found


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def on_devices(count, *arguments):
    flags = (
        f"--xla_force_host_platform_device_count={count} "
        "--xla_backend_optimization_level=0"
    )
    return start("jax_equality.py", *arguments, XLA_FLAGS=flags)


def groups_of_devices_and_processes_are_those_of_one_device(folder):
    """On four devices, and on two processes that have two of them each."""
    over = "GRAIN, one pass", "GRAIN, fewer groups"
    whole = "GRAIN, replicas", "GRAIN, 2 per replica"
    names = over[0], whole[0]
    port = free_port()
    processes = [
        on_devices(4, "--limits", *over, *whole),
        *[
            on_devices(2, "--processes", str(rank), "2", port, *names)
            for rank in range(2)
        ],
    ]
    try:
        alone, *both = [answer(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for engines in alone["equality"].values():
        assert max(engines.values()) < WEIGHTS
    assert_apart([{"weights": [w]} for w in alone["weights"].values()])
    assert both[0] == both[1]
    for name in names:
        difference = flat(both[0]["weights"][name])
        difference = difference - flat(alone["weights"][name])
        assert np.max(np.abs(difference)) < WEIGHTS
    _check_limits(alone["limits"])


def _check_limits(limits):
    assert limits["plan"] == [4, "contiguous", 4]
    assert "with other `groups`" in limits["saved"]
    assert "a state of 4 groups, expected 8" in limits["saved"]
    assert "groups=17 on each of 4 devices" in limits["many"]
    assert "a state of 1 groups for 4" in limits["built before"]
    # Keras deals a batch out to the devices and says that it cannot.
    assert limits["uneven"] == limits["uneven, stock"]
    assert "should evenly divide" in limits["few rows"]
    assert limits["fewer rows than groups"] is None
    found = limits["not finite"]
    assert found["nonfinite"] == 1.0
    assert sorted(found["weights"])[0] == 0.0
    assert sum(found["weights"]) == pytest.approx(1.0, abs=1e-5)


# ---- TensorFlow: tf.distribute.MirroredStrategy ---------------------------


def mirrored_strategy_takes_the_stock_steps(folder):
    result = answer(
        start(
            "mirrored.py",
            "stock_steps",
            "refusals",
            "sharpness",
            "averaging",
            "iterates",
            "curvature_of_gradients",
        )
    )
    for policy, runs in result["stock_steps"].items():
        for name in runs:
            assert_same_run(runs["stock"], runs[name], weights=1e-6)
            assert runs["stock"].get("scale") == runs[name].get("scale")
        assert ("scale" in runs["stock"]) == (policy == "mixed_float16")
    errors = result["refusals"]
    assert "cannot update under a tf.distribute" in errors["across batches"]
    assert "drop_remainder=True" in errors["synchronised"]
    assert 'Use curvature="second_moment", or "gradient"' in errors["fisher"]
    assert "Use interval=1" in errors["interval"]
    assert errors["synchronised, stock"] is None
    for what in ("joint step", "diagnostics"):
        assert "whole model at once" in errors[what]
    boosted = result["sharpness"]
    assert_same_run(boosted["one"], boosted["two"])
    for runs in result["curvature_of_gradients"].values():
        assert_same_run(runs["one"], runs["two"])
    averaged = result["averaging"]
    assert_same_run(averaged["one"], averaged["two"])
    assert largest_difference(*averaged.values(), "average") < WEIGHTS
    # It is not the last weights.
    two = averaged["two"]
    difference = flat(two["average"][0][0]) - flat(two["weights"][-1][0])
    assert np.max(np.abs(difference)) > 10 * WEIGHTS
    for name, runs in result["iterates"].items():
        assert_same_run(runs["one"], runs["two"], weights=1e-6)
        assert largest_difference(*runs.values(), "evaluated") < 1e-6
        two = runs["two"]
        difference = flat(two["evaluated"][0]) - flat(two["weights"][-1])
        apart = np.max(np.abs(difference)) > 10 * WEIGHTS
        # That one has no other weights to evaluate than those it trains.
        assert apart == (name != "optimistic")
    assert_apart([runs["two"] for runs in result["iterates"].values()])


def mirrored_strategy_forms_groups_over_all_replicas(folder):
    result = answer(
        start("mirrored.py", "global_groups", "mixed_precision", "batch_norm")
    )
    groups = result["global_groups"]
    assert_same_run(groups["one"], groups["two"])
    _check_mixed_precision(groups["one"], result["mixed_precision"])
    _check_batch_norm(result["batch_norm"])


def _check_mixed_precision(single, mixed):
    first = slice(0, 1)
    assert largest_difference(single, mixed, "weights", first) < 1e-3
    steps = slice(0, 2)
    assert largest_difference(single, mixed, "group_weights", steps) < 1e-3
    # An overflow that one replica alone has seen skips the step on both.
    assert mixed["weights"][1] == mixed["weights"][0]
    assert mixed["scale"] == 2.0**14


def _check_batch_norm(run):
    parts = np.stack([flat(part) for part in run["parts"]])
    groups = (parts[:4] + parts[4:]) / 2
    expected = min_norm_by_enumeration(groups @ groups.T)
    assert run["group_weights"][0] == pytest.approx(expected, abs=1e-5)
    # What replica 0 alone would have found is something else.
    alone = min_norm_by_enumeration(parts[:4] @ parts[:4].T)
    assert np.max(np.abs(expected - alone)) > 0.05
    kernel, gamma, beta, mean, variance, *head = run["weights"][0]
    np.testing.assert_allclose(
        flat([kernel, gamma, beta, *head]),
        flat(run["before"]) - 0.1 * expected @ groups,
        atol=1e-6,
    )
    # Pooled over the groups. Keras lets each replica keep statistics of its
    # own and shows those of the first.
    rows = np.array(run["hidden"])[:16]
    np.testing.assert_allclose(mean, 0.01 * rows.mean(axis=0), atol=1e-6)
    expected_variance = 0.99 + 0.01 * rows.var(axis=0)
    np.testing.assert_allclose(variance, expected_variance, atol=1e-6)


def groups_of_replicas_are_contiguous_ones_of_one_device(folder):
    runs = answer(start("mirrored.py", "own_groups"))["own_groups"]
    # The row of the last epoch that is not finite is on the first replica.
    dropped = runs.pop("dropped")
    assert dropped["weights"] == [0.0, 1.0]
    assert dropped["nonfinite"] == 1.0
    assert "2 devices: groups whole on a device" in dropped["plan"]
    assert "At most 64 groups" in runs.pop("error")
    mixed = runs.pop("mixed")
    _check_mixed_precision(mixed["one"], mixed["two"])
    broken = runs["not finite"]
    assert np.isnan(broken["one"].pop("loss") + broken["two"].pop("loss")).any()
    for run in broken.values():
        run["loss"] = [0.0]  # the reported one has that row in it
    for pair in runs.values():
        assert_same_run(pair["one"], pair["two"])
    del runs["uneven"]  # of other length
    assert_apart([pair["two"] for pair in runs.values()])


# ---- JAX: several processes -----------------------------------------------


def processes_pool_the_rows_that_each_of_them_passes(folder):
    """Also in what is no training, with rows as `fit` takes them."""
    port = free_port()
    alone = start("jax_processes.py", "-1", "2", port)
    both = [start("jax_processes.py", str(rank), "2", port) for rank in (0, 1)]
    try:
        expected, *found = [answer(process) for process in (alone, *both)]
    finally:
        for process in both:
            process.kill()
    for own in found:
        for name in ("row", "batch"):
            assert "must pass equally many batches" in own.pop(name)
        for part, wanted in expected.items():
            np.testing.assert_allclose(
                numbers(own[part]), numbers(wanted), rtol=2e-3, atol=1e-3
            )
    assert str(found[0]) == str(found[1])


def numbers(result):
    return np.array(keras.tree.flatten(result), "float64")


# ---- PyTorch: torch.distributed -------------------------------------------


def in_process_group(workers, folder, *names):
    """Starts workers, who talk over the loopback interface alone."""
    loopback = [n for _, n in socket.if_nameindex() if n.startswith("lo")][0]
    meeting = str(folder / f"meeting_of_{workers}")
    return [
        start(
            "torch_workers.py",
            str(rank),
            str(workers),
            meeting,
            *names,
            GLOO_SOCKET_IFNAME=loopback,
        )
        for rank in range(workers)
    ]


@functools.cache
def alone_and_both():
    """What one process answers, and what two of a group do."""
    compared = "equality", "uneven", "half_precision"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        processes = [
            *in_process_group(1, folder, *compared, "group_of_one"),
            *in_process_group(
                2, folder, *compared, "bad_input", "resumed", "apart"
            ),
        ]
        try:
            alone, *both = [answer(process) for process in processes]
        finally:
            for process in processes:
                process.kill()
    return alone, both


def processes_train_as_one_device(folder):
    alone, both = alone_and_both()
    for place in ("in fit", "in a loop"):
        for name, expected in alone["equality"][place].items():
            runs = [worker["equality"][place][name] for worker in both]
            assert_trained_alike(expected, *runs)
        # Another engine, not another method.
        alone["equality"][place].pop("GRAIN, microbatch", None)
        assert_apart(list(alone["equality"][place].values()))
    for name in alone["equality"].keys() - {"in fit", "in a loop"}:
        runs = [worker["equality"][name] for worker in both]
        assert_trained_alike(alone["equality"][name], *runs)
    for name, expected in alone["uneven"].items():
        runs = [worker["uneven"][name] for worker in both]
        assert_trained_alike(expected, *runs)
    for worker in both:
        assert worker["half_precision"] == {"untouched": True, "scale": 2.0**14}
    # A group of one process changes no bit.
    assert alone["group_of_one"]["alone"] == alone["group_of_one"]["grouped"]


def assert_trained_alike(expected, first, second):
    """Two workers hold the same state, which is that of one device."""
    for name in ("weights", "state", "loss", "group_weights"):
        assert first[name] == second[name]
    assert np.all(np.isfinite(flat(first["weights"])))
    assert largest_difference(expected, first, "weights") < WEIGHTS
    if first["loss"]:
        assert largest_difference(expected, first, "loss") < 1e-5
    if expected["group_weights"]:
        difference = largest_difference(expected, first, "group_weights")
        assert difference < GROUP_WEIGHTS


def processes_raise_together_and_resume_alike(folder):
    _, both = alone_and_both()
    for worker in both:
        errors = worker["bad_input"]
        for name in ("sizes", "groups", "method"):
            assert (
                "must train the same model" in errors[f"other {name}"]["error"]
            )
        for name in ("other weights", "no number"):
            assert "hold different weights" in errors[name]["error"]
        assert "no_sync" in errors["already summed"]["error"]
        assert "use groups=1" in errors["groups of a gradient"]["error"]
        assert "process group first" in errors["built before"]["error"]
        assert all(e["untouched"] for e in errors.values() if "untouched" in e)
        assert errors["not finite"]["nonfinite"] == 1.0
        for run in worker["resumed"].values():
            assert run["found"] == run["expected"]
        warnings = worker["apart"]
        assert [len(warnings[name]) for name in warnings] == [1, 1, 0, 0, 0]
    few = [worker["bad_input"]["few rows"]["error"] for worker in both]
    assert "What was raised on process 1 says why" in few[0]
    assert "normalise a group of one row" in few[1]
    dropped = [worker["bad_input"]["not finite"] for worker in both]
    for name in ("weights", "state", "group_weights"):
        assert dropped[0][name] == dropped[1][name]
    assert np.all(np.isfinite(flat(dropped[0]["weights"])))


# ---- Groups of losses, on every backend -----------------------------------


def losses_of_all_devices_are_those_of_one(folder):
    """On TensorFlow with a last batch that replicas have unequal parts of."""
    if keras.backend.backend() == "torch":
        loopback = [n for _, n in socket.if_nameindex() if n.startswith("lo")]
        meeting = str(folder / "meeting")
        processes = [
            start(
                "two_tasks.py",
                *(str(rank), str(count), meeting),
                GLOO_SOCKET_IFNAME=loopback[0],
            )
            for rank, count in ((0, 1), (0, 2), (1, 2))
        ]
        alone, *both = [answer(process) for process in processes]
        assert both[0] == both[1]
        runs = {
            rule: {"one": alone[rule]["one"], "two": both[0][rule]["one"]}
            for rule in alone
        }
    else:
        flags = (
            "--xla_force_host_platform_device_count=4 "
            "--xla_backend_optimization_level=0"
        )
        runs = answer(start("two_tasks.py", XLA_FLAGS=flags))
    # On JAX the compiler sums all K, elsewhere each device gets its slices.
    how = {"jax": "layer by layer"}.get(keras.backend.backend(), "cut along")
    for by_device in runs.values():
        one = by_device.pop("one")
        assert by_device and "one device" in one["plan"]
        for several in by_device.values():
            assert "groups over all devices" in several["plan"]
            assert how in several["plan"]
            assert largest_difference(one, several, "weights") < WEIGHTS
            assert largest_difference(one, several, "loss") < 1e-5
            difference = largest_difference(one, several, "group_weights")
            assert difference < GROUP_WEIGHTS
            if keras.backend.backend() == "jax":
                assert largest_difference(one, several, "measured") < 1e-4
    assert_apart([next(iter(d.values())) for d in runs.values()])


CHECKS = {
    "jax": [
        processes_pool_the_rows_that_each_of_them_passes,
        groups_of_devices_and_processes_are_those_of_one_device,
        data_and_model_parallel_give_the_result_of_one_device,
        pytest.param(
            so_do_other_groups_and_methods_with_slots_of_their_own,
            marks=pytest.mark.slow,
        ),
        losses_of_all_devices_are_those_of_one,
    ],
    "tensorflow": [
        mirrored_strategy_takes_the_stock_steps,
        mirrored_strategy_forms_groups_over_all_replicas,
        groups_of_replicas_are_contiguous_ones_of_one_device,
        losses_of_all_devices_are_those_of_one,
    ],
    "torch": [
        processes_train_as_one_device,
        processes_raise_together_and_resume_alike,
        losses_of_all_devices_are_those_of_one,
    ],
}


@pytest.mark.parametrize("check", CHECKS[keras.backend.backend()])
def test_several_devices(check, tmp_path):
    check(tmp_path)
