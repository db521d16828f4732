"""Two processes (gloo) give the gradients of one full batch."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from test_trainer import OBJECTIVES, TASKS, arguments, reference_gradients, relative_error


HERE = Path(__file__).parent
CASES = [
    (task, objective, batch, accumulation, 2 * batch * accumulation)
    for task, objective, (batch, accumulation) in product(TASKS, OBJECTIVES, [(4, 1), (1, 4)])
]


@pytest.mark.slow
def test_two_processes_equal_one_full_batch(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    worker = [str(HERE / "distributed_worker.py"), str(tmp_path), json.dumps(CASES)]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *worker], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    for number, (task, objective, _, _, count) in enumerate(CASES):
        build, data, settings = TASKS[task]
        args = arguments(tmp_path, **settings, **OBJECTIVES[objective])
        found = torch.load(tmp_path / f"{number}.pt")
        expected = reference_gradients(build().train(), data(count), args)
        gradients = {name.removeprefix("module."): g for name, g in found["gradients"].items()}
        error = relative_error(gradients, expected)
        assert error <= (2e-5 if task == "token" else 1e-5), (CASES[number], error)
        if objective != "robust-through":
            assert found["log"]["loss"] == pytest.approx(found["log"]["objective"], rel=1e-5)
