"""The stability benchmark for a GPU, tiny: it runs, and goes on."""

import json
import sys

import numpy as np
import pytest
import scripts

pytest.importorskip("keras_hub")

sys.path.insert(0, str(scripts.ROOT / "benchmarks"))

import stability_gpu  # noqa: E402
from stability import arms  # noqa: E402
from stability import catalogue  # noqa: E402
from stability import study  # noqa: E402


@pytest.fixture
def tasks(monkeypatch):
    monkeypatch.setattr(catalogue, "TASKS", dict(stability_gpu.QUICK))
    study.prepared.cache_clear()
    yield
    study.prepared.cache_clear()


def test_the_command_says_its_time_runs_and_goes_on(tasks, tmp_path, capsys):
    arguments = ["--quick", f"--folder={tmp_path}", f"--results={tmp_path}"]
    stability_gpu.main(arguments)
    first = capsys.readouterr().out.splitlines()
    # 3 arms, of 2 rates and 2 seeds each to tune, and 2 seeds to report.
    assert first[0].startswith("Fine-tuning: 18 runs")
    assert "5 runs of ResNet-20" in first[0]
    paths = [tmp_path / f"{name}.json" for name in stability_gpu.QUICK]
    before = [path.read_text() for path in paths]
    assert list(json.loads(before[1])["arms"]) == ["base", *arms.LARGE_BATCH]
    stability_gpu.main(arguments)
    again = capsys.readouterr().out.splitlines()
    assert again[0].startswith("Fine-tuning: 0 runs")
    assert "0 runs of ResNet-20" in again[0]
    assert again[1:] == first[1:]
    assert [path.read_text() for path in paths] == before


def test_a_model_that_is_put_back_keeps_nothing_of_runs_before(tasks):
    seeds = stability_gpu.RunSeeds(3, 4)

    def trained(task, rate):
        optimizer = study.maker("grain_4", rate, task)()
        study.keras.utils.set_random_seed(seeds.initialisation)
        model = task.models.rewound(optimizer)
        task.train(model, seeds, arms.ARMS["grain_4"])
        return task.score(model, "test")["predictions"]

    used, other = (catalogue.TASKS["sst2_all_layers"]() for _ in range(2))
    for task in (used, other):
        task.prepare(None, None)
    other.pretrained = used.pretrained
    # The first run of each builds layers, for which PyTorch draws numbers.
    trained(used, 1e-1)
    trained(other, 1e-3)
    first = trained(used, 1e-2)
    np.testing.assert_array_equal(first, trained(other, 1e-2))
    assert not np.array_equal(first, trained(used, 1e-1))
