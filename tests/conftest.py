"""What every test file needs before Keras is imported."""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

# torch before TensorFlow: the other order can crash when both are loaded,
# which KerasHub does on every backend.
import torch

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent))
# Guides and the site's build import what they share, as scripts do.
sys.path.insert(1, str(Path(__file__).parents[1] / "guides"))
sys.path.insert(2, str(Path(__file__).parents[1] / "docs"))

# Most of the time on JAX goes into compiling, and many tests compile the same
# step: one cache for all processes of this run, and for none after it.
if os.environ["KERAS_BACKEND"] == "jax" and (
    "JAX_COMPILATION_CACHE_DIR" not in os.environ
):
    cache = tempfile.mkdtemp(prefix="keras_stab_tests_")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    # Nor is quick code worth the time that it takes to make; `make test-all`
    # compiles as users do.
    if os.environ.get("HYPOTHESIS_PROFILE") != "search":
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import keras  # noqa: E402

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    # Sums split over threads are not the same from run to run, to the last
    # bit. Operations may still run side by side, so that races show.
    tf.config.threading.set_intra_op_parallelism_threads(1)

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import support  # noqa: E402
from marks import ON_TORCH  # noqa: E402
from support import pytest_addoption  # noqa: E402,F401
from support import pytest_configure  # noqa: E402,F401

# What scripts set as they are imported holds for their own processes: one that
# asked for a thread once left other tests' processes with one device.
ENVIRONMENT = dict(os.environ)

# The same examples every time, so that a failure is one of the change that
# was made; `HYPOTHESIS_PROFILE=search` looks for new ones (make test-all).
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.register_profile("search", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


# Files whose tests ask nothing of a backend (pages, statistics, arguments), or
# run whole scripts. On the others they run with the slow tests.
ON_THE_QUICKEST_BACKEND = {
    "test_arguments",
    "test_averaging_guide",
    "test_benchmarks",
    "test_compare_scores",
    "test_demo",
    "test_did_it_help",
    "test_finding",
    "test_fine_tuning",
    "test_game_guides",
    "test_guides",
    "test_installation",
    "test_landscape",
    "test_large_batch",
    "test_main",
    "test_many_devices",
    "test_pages",
    "test_recipes",
    "test_report_statistics",
    "test_spikes_guide",
    "test_stability_benchmark",
    "test_stability_gpu",
    "test_stability_report",
    "test_stability_tasks",
}


# Whose cases are chosen by their own tables, or take no time.
ALL_CASES = {"test_contract", "test_distribution", "test_package"}


def _leave_to_the_quickest(items):
    """Marks as slow what PyTorch tests for every backend.

    Of a test with many cases the first and the last one stay.
    """
    cases = {}
    for item in items:
        cases.setdefault((item.path, item.originalname), []).append(item)
    for (path, _), own in cases.items():
        if path.stem in ON_THE_QUICKEST_BACKEND:
            left = own
        elif path.stem in ALL_CASES:
            left = []
        else:
            left = [i for i in own if not i.get_closest_marker("slow")][1:-1]
        for item in left:
            item.add_marker(pytest.mark.slow)


# Before that of the plugin for several processes, which reads the groups.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """What runs in one process: a file, or one test of the contract.

    The tests of a file may share what takes long to make; those of the
    contract take as long as all others together and share nothing, nor do
    those of several devices but on PyTorch.
    """
    os.environ.clear()
    os.environ.update(ENVIRONMENT)
    support.pytest_collection_modifyitems(config, items)
    if not ON_TORCH:
        _leave_to_the_quickest(items)
    for item in items:
        group = item.path.stem
        if group == "test_contract":
            group = item.originalname
        elif group == "test_distribution" and not ON_TORCH:
            group = item.name
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_finish(session):
    in_groups = getattr(session.config.option, "loadgroup", False)
    if in_groups and not all("@" in item.nodeid for item in session.items):
        raise pytest.UsageError(
            "pytest-xdist left groups of tests apart: install the versions of "
            "constraints.txt"
        )


@pytest.fixture(autouse=True)
def clean_state():
    """Seeds, precision policy and installed step as a new process has them."""
    keras.utils.set_random_seed(1337)
    yield
    keras.config.set_dtype_policy("float32")


@pytest.fixture(scope="module")
def quick_compilation():
    """Compiles in less time on JAX, for small models that take none to run.

    Not where bits are compared: fused operations round in other ways.
    """
    if keras.backend.backend() != "jax":
        yield
        return
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
