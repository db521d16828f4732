"""One process, two under DDP and two under FSDP2 (gloo) give the gradients of one full batch, however it is split."""

import functools
import json
import math
import os
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hf_moecal.model.lora import add_lora
from tests.readouts import helpers as test_readout
from tests.tasks import helpers as test_choice
from tests.training.distributed_worker import run
from tests.training.helpers import (
    OBJECTIVES,
    TASKS,
    arguments,
    balance_of,
    losses_one_by_one,
    measures_one_by_one,
    objective_of,
    relative_error,
)


HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


@functools.cache
def examples_of(task, count):
    """A model, the losses of its examples, each forwarded alone, with graph, and their measures."""
    build, data, settings = TASKS[task]
    model, per_token = build().train(), settings.get("example") == "token"
    return model, losses_one_by_one(model, data(count), per_token), measures_one_by_one(model, data(count), per_token)


def thresholds(measures):
    """Between the two neighbours that are farthest apart: some examples pass, others do not, none by rounding."""
    found = []
    for values in zip(*measures, strict=True):
        ordered = sorted(values)
        gap, low, high = max((b - a, a, b) for a, b in zip(ordered, ordered[1:], strict=False))
        found.append((low + high) / 2)
        assert gap > 1e-4
    regret, spread = found
    if all(r > regret or d > spread for r, d in measures):
        spread = 2.0  # disagreement is never larger
    return dict(tau_regret=regret, tau_disagreement=spread)


def case(task, objective, *, batch=2, accumulation=4, count=None, processes=2, **more):
    count = batch * accumulation * processes if count is None else count
    settings = {**more.pop("settings", {}), **OBJECTIVES[objective], "per_device_train_batch_size": batch}
    if objective == "filtered" and task in TASKS:
        measures = examples_of(task, count)[2]
        settings |= thresholds([m for i, m in enumerate(measures) if i not in more.get("unlabelled", ())])
    return dict(
        task=task, count=count, settings={**settings, "gradient_accumulation_steps": accumulation}, **more
    )  # fmt: skip


def matrix(processes):
    for task, objective, batch, accumulation in product(TASKS, OBJECTIVES, (1, 2), (1, 4)):
        one = batch * accumulation * processes == 1 and task != "token"
        if not (one and objective == "filtered"):  # one example is relevant or not
            yield case(task, objective, batch=batch, accumulation=accumulation, processes=processes)


STREAMING = dict(settings=dict(normalizer="streaming"))
TILTED = [name for name in OBJECTIVES if name != "erm"]


def special_cases():
    """By what they show. The last micro-batches of 13 and of 5 rows are filled up with rows that came before."""
    by_itself = dict(accelerator_config={"even_batches": False})
    filters = dict(tau_regret=0.3, tau_disagreement=0.035)
    return {
        "matrix": list(matrix(2)),
        "uneven": [
            case(task, objective, count=count, **how)
            for task, count, objective, how in product(TASKS, (13, 5), ("erm", "filtered"), ({}, STREAMING))
            if how == {} or objective != "erm"
        ],
        "unevenly loaded": [case("sequence", "filtered", count=15, settings=by_itself)],
        "refused": [case("sequence", "robust", count=13, settings=by_itself, refused=True)],
        "unlabelled": [
            case("classification", objective, count=16, unlabelled=rows, settings=dict(normalizer=normalizer))
            for objective, rows, normalizer in product(
                ("robust", "filtered"), ([2, 3, 6, 7], [0, 1]), ("two_pass", "streaming")
            )
        ],
        "clipped": [case(task, "filtered", settings=dict(max_grad_norm=0.01)) for task in TASKS],
        "streaming": [case(task, objective, **STREAMING) for task, objective in product(TASKS, TILTED)],
        "overflowing": [case("classification", "robust", settings=dict(normalizer="streaming", eta=60.0))],
        "checkpointed": [
            case("sequence", "filtered", settings=dict(activation_checkpointing=True, normalizer=normalizer))
            for normalizer in ("two_pass", "streaming")
        ],
        "noisy": [
            case(task, objective, model=dict(attention_dropout=0.3, router_jitter_noise=0.3), **how)
            for task, objective, how in product(("classification", "token"), ("robust", "filtered"), ({}, STREAMING))
        ],
        "balanced": [case("classification", name, settings=dict(router_aux_loss_coef=0.5)) for name in TILTED],
        "adapter": [
            case("sequence", objective, settings=dict(train="lora", normalizer=normalizer))
            for objective, normalizer in (("filtered", "two_pass"), ("robust", "streaming"))
        ],
        "choice": [
            *(case("choice", name, count=16, settings=filters) for name in ("robust-through", "filtered")),
            # The last micro-batch of the second process holds repeated rows alone.
            *(
                case("choice", "robust-through", count=13, batch=1, accumulation=7, settings=how)
                for how in ({}, dict(normalizer="streaming"))
            ),
        ],
        "without labels": [
            case("classification", name, count=16, batch=1, unlabelled=list(range(8)), settings=dict(max_steps=2))
            for name in ("erm", "robust", "filtered")
        ],
        "mixture": [
            mixture_case("classification", "filtered", expert_loss_weight=0.5),
            mixture_case("sequence", "robust-through"),
        ],
    }


def mixture_case(task, objective, **settings):
    _, examples = test_readout.examples_of(task, "soft")
    settings["tau_regret"] = test_readout.between(examples[:, 1].detach())
    settings["tau_disagreement"] = float(examples[:, 2].detach().quantile(0.8))
    found = case(task, objective, count=8, accumulation=2)
    return {**found, "settings": {**found["settings"], "readout": "soft_mixture", **settings}}


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def trained(request, tmp_path_factory):
    """All cases of a kind, trained by two processes in one launch: by name, pairs of the case and what was seen."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    groups = special_cases()
    if kind == "fsdp2":
        groups["mixture"] = [dict(groups["mixture"][0], refused=True)]
    (folder / "cases.json").write_text(json.dumps([c for cases in groups.values() for c in cases]))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    command += ["--rdzv_endpoint", "127.0.0.1:0", str(HERE / "distributed_worker.py")]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, kind, str(folder), str(folder / "cases.json")], env=environment, capture_output=True, text=True,
        timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    numbers = iter(range(10**6))
    found = {
        name: [(c, torch.load(folder / f"{next(numbers)}.pt", weights_only=False)) for c in cases]
        for name, cases in groups.items()
    }
    for case, seen in [pair for pairs in found.values() for pair in pairs]:
        if case.get("refused"):
            assert "refused" in seen, case
            continue
        assert seen["processes"] == 2
        assert (seen["kind"] == "DistributedType.FSDP") == (kind == "fsdp2")
        assert seen["sharded"] == (set(seen["gradients"]) if kind == "fsdp2" else set())
    return kind, found


def check(pair, expected):
    case, seen = pair
    error = relative_error(seen["gradients"], expected)
    assert error <= (2e-5 if case["task"] == "token" else 1e-5), (case, error)


def full_batch(case, folder):
    """Gradients and value of the objective over all examples of the case, each forwarded alone."""
    args = arguments(folder, **{**TASKS[case["task"]][2], **case["settings"]})
    model, losses, measures = examples_of(case["task"], case["count"])
    kept = [i for i in range(len(losses)) if i not in case.get("unlabelled", ())]
    value = objective_of(losses[kept], [measures[i] for i in kept], args)
    model.zero_grad()
    value.backward(retain_graph=True)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, value.item()


def check_full_batch(pair, folder):
    expected, value = full_batch(pair[0], folder)
    check(pair, expected)
    for name in ("loss", "objective"):
        assert pair[1]["log"][name] == pytest.approx(value, rel=1e-4), pair[0]


def test_one_process(tmp_path):
    for case in matrix(1):
        check_full_batch((case, run("one", tmp_path, case)), tmp_path)


@pytest.mark.parametrize("name", ["matrix", "streaming", "checkpointed", "overflowing"])
def test_gradients_equal_one_full_batch(trained, tmp_path, name):
    _, found = trained
    for pair in found[name]:
        check_full_batch(pair, tmp_path)
    if name == "overflowing":
        ((case, seen),) = found[name]
        assert [position for position, _, _ in seen["ranks"][0]["replayed"]] == [0, 1, 2, 3] * 2


def test_repeated_rows_do_not_count(trained, tmp_path):
    _, found = trained
    for pair in found["uneven"]:
        check_full_batch(pair, tmp_path)
        rows = Counter(len(batch["inputs"]["input_ids"]) for rank in pair[1]["ranks"] for batch in rank["batches"])
        assert set(rows) == {2} and rows[2] == {13: 8, 5: 4}[pair[0]["count"]], "nothing was repeated"


def test_uneven_loading_is_exact_or_refused(trained, tmp_path):
    """Without repeated rows, processes may have unequal last micro-batches, but not unequal numbers of them."""
    _, found = trained
    (pair,), ((_, refused),) = found["unevenly loaded"], found["refused"]
    sizes = [[len(batch["inputs"]["input_ids"]) for batch in rank["batches"]] for rank in pair[1]["ranks"]]
    assert sizes == [[2, 2, 2, 2], [2, 2, 2, 1]]
    check_full_batch(pair, tmp_path)
    assert "The processes have [4, 3] micro-batches, so one would wait for ever" in refused["refused"]


def test_a_process_without_labels_takes_part(trained, tmp_path):
    _, found = trained
    for pair in found["unlabelled"]:
        check_full_batch(pair, tmp_path)


def test_a_batch_without_labels_is_skipped_by_every_process(trained, tmp_path):
    """The first of two: the weights of the second are those of the start."""
    _, found = trained
    for pair in found["without labels"]:
        expected, _ = full_batch(pair[0], tmp_path)
        check(pair, expected)
        assert pair[1]["log"]["skipped_steps"] == 1


def test_clipping_scales_the_exact_gradient(trained, tmp_path):
    _, found = trained
    for pair in found["clipped"]:
        expected, _ = full_batch(pair[0], tmp_path)
        norm = math.sqrt(sum(float(g.square().sum()) for g in expected.values()))
        assert norm > 0.01
        check(pair, {name: g * 0.01 / norm for name, g in expected.items()})


def losses_of(model, inputs, per_token):
    """Losses of a batch as it was run, padding and all."""
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    logits = model(**inputs, use_cache=False).logits
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels, reduction="none")
    losses = []
    for row, label in zip(logits[:, :-1], labels[:, 1:], strict=True):
        own = F.cross_entropy(row[label != -100], label[label != -100], reduction="none")
        losses.append(own if per_token else own.mean()[None])
    return torch.cat(losses)


def test_both_passes_see_the_same_noise_and_the_gradient_is_that_of_its_losses(trained, tmp_path):
    """The reference runs each micro-batch of each process from the random state in which it was trained."""
    _, found = trained
    for case, seen in found["noisy"]:
        build, _, settings = TASKS[case["task"]]
        args = arguments(tmp_path, **{**settings, **case["settings"]})
        model, losses, measures = build(**case["model"]).train(), [], []
        for rank in seen["ranks"]:
            states = {bytes(batch["random"].numpy()) for batch in rank["batches"]}
            assert len(states) == len(rank["batches"]), "two micro-batches drew the same noise"
            weighed = {}
            for position, with_gradient, columns in rank["replayed"]:
                if args.normalizer == "two_pass" and position > 0:
                    before = weighed.setdefault(position, columns)
                    assert with_gradient == (before is not columns), "measured once, then trained once"
                    assert columns[0] == pytest.approx(before[0], abs=2e-6)
                weighed[position] = columns
            for position, batch in enumerate(rank["batches"]):
                torch.set_rng_state(batch["random"])
                losses.append(losses_of(model, batch["inputs"], args.example == "token"))
                assert losses[-1].tolist() == pytest.approx(weighed[position][0], abs=1e-5)
                measures += list(zip(*weighed[position][1:], strict=True))
        objective_of(torch.cat(losses), measures, args).backward()
        check((case, seen), {n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def test_the_routers_balance_is_the_mean_over_micro_batches_and_processes(trained, tmp_path):
    _, found = trained
    for case, seen in found["balanced"]:
        expected, value = full_batch(case, tmp_path)
        twin = TASKS[case["task"]][0]().train()
        batches = [batch["inputs"] for rank in seen["ranks"] for batch in rank["batches"]]
        balance = torch.stack([balance_of(twin, batch) for batch in batches]).mean()
        (0.5 * balance).backward()
        for name, parameter in twin.named_parameters():
            expected[name] = expected[name] + (0 if parameter.grad is None else parameter.grad)
        check((case, seen), expected)
        assert seen["log"]["router_aux_loss"] == pytest.approx(balance.item(), rel=1e-5)
        assert seen["log"]["loss"] == pytest.approx(value + 0.5 * balance.item(), rel=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_an_adapter_trains_exactly(trained, tmp_path):
    _, found = trained
    for case, seen in found["adapter"]:
        build, data, settings = TASKS[case["task"]]
        args = arguments(tmp_path, **{**settings, **case["settings"]})
        adapted = add_lora(build())
        adapted.load_state_dict(seen["start"])
        inner = adapted.base_model.model.train()
        rows = data(case["count"])
        measures = measures_one_by_one(inner, rows, False)
        objective_of(losses_one_by_one(inner, rows, False), measures, args).backward()
        expected = {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}
        assert seen["gradients"].keys() == expected.keys() and all("lora_" in name for name in expected)
        check((case, seen), expected)


def test_multiple_choice_trains_exactly(trained, tmp_path):
    _, found = trained
    for case, seen in found["choice"]:
        args = arguments(tmp_path, task="choice", **case["settings"])
        rows = test_choice.examples(case["count"])
        value, expected = test_choice.reference_gradients(TASKS["sequence"][0]().train(), rows, args, "per_token")
        check((case, seen), expected)
        assert seen["log"]["loss"] == pytest.approx(value, rel=1e-4)


def test_mixtures_train_exactly_or_are_refused(trained, tmp_path):
    kind, found = trained
    if kind == "fsdp2":
        ((_, seen),) = found["mixture"]
        assert "sends gradients through experts that run again outside their layer" in seen["refused"]
        return
    for case, seen in found["mixture"]:
        twin, examples = test_readout.examples_of(case["task"], "soft")
        args = arguments(tmp_path, **{**TASKS[case["task"]][2], **case["settings"]})
        value = test_readout.reference(examples, args)
        twin.zero_grad()
        value.backward(retain_graph=True)
        check((case, seen), {n: p.grad.clone() for n, p in twin.named_parameters() if p.grad is not None})
        assert seen["log"]["loss"] == pytest.approx(value.item(), rel=1e-4)
