"""What of Trainer cannot be combined with an objective over the whole batch is refused; what looks so, is exact."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import (
    DataLoaderDispatcher,
    IterableDatasetShard,
    prepare_data_loader,
    skip_first_batches,
)
from accelerate.state import GradientState
from torch.utils.data import DataLoader, IterableDataset
from transformers import DataCollatorWithFlattening

from hf_moecal import MoECalArguments, MoECalTrainer
from hf_moecal.readouts.attached import AttachedReadout
from hf_moecal.training.compatibility import check_distribution, checked_loader
from hf_moecal.training.optimizer_batch import without_repeats
from tests.training.helpers import (
    OBJECTIVES,
    Gradients,
    arguments,
    classification_data,
    classification_model,
    collate,
    language_data,
    language_model,
    losses_one_by_one,
    reference_gradients,
    relative_error,
)


def trainer_with(folder, args=None, **kwargs):
    return MoECalTrainer(
        model=classification_model(), args=args or arguments(folder, objective="robust"),
        train_dataset=classification_data(), data_collator=collate, **kwargs,
    )  # fmt: skip


def test_what_replaces_the_loss_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`compute_loss_func` would replace the objective"):
        trainer_with(tmp_path, compute_loss_func=lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum())
    with pytest.raises(ValueError, match="`label_smoothing_factor=0.1` has no effect on objective='robust'"):
        arguments(tmp_path, objective="robust", label_smoothing_factor=0.1)
    assert MoECalArguments("out", objective="label_smoothing", report_to="none").label_smoothing_factor == 0.1


def test_data_parallel_is_refused(tmp_path):
    args = arguments(tmp_path, objective="robust")
    args._n_gpu = 2  # as one process on a machine with two GPUs finds
    with pytest.raises(ValueError, match=r"drives 2 GPUs \(DataParallel\), which hides .* `accelerate launch`"):
        trainer_with(tmp_path, args)


@pytest.mark.parametrize("kind", ["tp", "cp", "sp"])
def test_parallelism_inside_an_example_is_refused(tmp_path, monkeypatch, kind):
    trainer = trainer_with(tmp_path)
    check_distribution(trainer)
    monkeypatch.setattr(trainer, f"get_{kind}_size", lambda: 2)
    with pytest.raises(ValueError, match="parallelism lets 2 processes share one example, .* use data parallelism"):
        check_distribution(trainer)


def test_sharding_that_hides_the_experts_is_refused(tmp_path, monkeypatch):
    trainer = trainer_with(tmp_path)
    monkeypatch.setattr(trainer, "is_distributed_loading_by_transformers", True)
    with pytest.raises(ValueError, match="load it whole and let accelerate shard it"):
        check_distribution(trainer)
    monkeypatch.setattr(trainer, "is_distributed_loading_by_transformers", False)
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    monkeypatch.setattr(trainer, "accelerator", SimpleNamespace(is_fsdp2=False))
    with pytest.raises(ValueError, match="FSDP1 hides the weights .* `fsdp_version: 2`"):
        check_distribution(trainer)


class Stream(IterableDataset):
    def __iter__(self):
        yield from range(13)


def test_streams_whose_repeated_rows_are_unknown_are_refused():
    for drop_last in (False, True):
        shard = IterableDatasetShard(Stream(), batch_size=2, num_processes=2, drop_last=drop_last)
        accelerator = SimpleNamespace(num_processes=2, device="cpu", gather=lambda count: torch.cat([count, count]))
        if drop_last:
            checked_loader(DataLoader(shard, batch_size=2), accelerator)
        else:
            with pytest.raises(ValueError, match="an iterable dataset repeats rows at its end, .* `dispatch_batches`"):
                checked_loader(DataLoader(shard, batch_size=2), accelerator)


def test_repeated_rows_of_a_dispatched_stream_lose_their_labels():
    """5 rows left for two processes: 3 each, of which the last one's last is the first row once more."""
    loader = DataLoaderDispatcher.__new__(DataLoaderDispatcher)
    vars(loader).update(end_of_dataloader=True, remainder=5)
    batches = [{"labels": torch.arange(3)}, {"labels": torch.arange(3)}]
    for rank, expected in ((0, [0, 1, 2]), (1, [0, 1, -100])):
        state = SimpleNamespace(active_dataloader=loader)
        accelerator = SimpleNamespace(num_processes=2, process_index=rank, gradient_state=state)
        last = without_repeats(batches[1], accelerator)
        assert last["labels"].tolist() == expected
    assert batches[1]["labels"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("rows", [3, 12, 13, 14, 15])
@pytest.mark.parametrize(("split", "even", "drop"), [
    (False, True, False), (True, True, False), (False, True, True), (True, False, False)
])  # fmt: skip
def test_each_row_counts_once_in_an_epoch(split, even, drop, rows, skip):
    """Over two processes, each of which takes two rows at a time, also where an epoch is resumed."""
    seen = []
    for rank in range(2):
        dataset = [{"labels": torch.tensor(i)} for i in range(rows)]
        plain = DataLoader(dataset, batch_size=4 if split else 2, drop_last=drop)
        loader = prepare_data_loader(
            plain, num_processes=2, process_index=rank, split_batches=split, even_batches=even, put_on_device=False
        )
        state = GradientState()
        accelerator = SimpleNamespace(num_processes=2, process_index=rank, gradient_state=state)
        for batch in skip_first_batches(loader, skip):
            batch = without_repeats(batch, accelerator)
            seen += [label for label in batch["labels"].tolist() if label != -100]
    assert sorted(seen) == list(range(4 * skip, rows - rows % 4 if drop else rows))


def packed(count=8):
    return [{"input_ids": row["input_ids"].tolist(), "labels": row["labels"].tolist()} for row in language_data(count)]


@pytest.mark.parametrize("objective", ["robust", "filtered"])
@pytest.mark.parametrize("example", ["sequence", "token"])
def test_packed_sequences_train_as_they_do_alone(tmp_path, example, objective):
    """Without padding: one row per micro-batch, in which `position_ids` say where each sequence begins."""
    settings = dict(task="lm", example=example, tau_regret=0.4, **OBJECTIVES[objective])
    args = arguments(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, **settings)
    seen = Gradients()
    trainer = MoECalTrainer(
        model=language_model(), args=args, train_dataset=packed(), eval_dataset=packed(),
        data_collator=DataCollatorWithFlattening(), callbacks=[seen],
    )  # fmt: skip
    trainer.train()
    expected = reference_gradients(language_model().train(), language_data(), args)
    assert relative_error(seen.found, expected) <= 2e-5


@pytest.mark.parametrize("changes", [{}, dict(batch_eval_metrics=True), dict(eval_do_concat_batches=False)])
@pytest.mark.parametrize("example", ["sequence", "token"])
def test_packed_sequences_evaluate_as_they_do_alone(tmp_path, example, changes):
    found = []
    for rows, collator in ((packed(), DataCollatorWithFlattening()), (language_data(), collate)):
        args = arguments(
            tmp_path, task="lm", objective="robust", per_device_eval_batch_size=3, example=example, **changes
        )
        trainer = MoECalTrainer(model=language_model(), args=args, eval_dataset=rows, data_collator=collator)
        found.append(trainer.evaluate())
    names = [prefix + name for prefix in ("eval_", "eval_sequence_") for name in ("nll", "ece", "brier", "n")]
    for name in ("eval_loss", *names):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5), name


def test_packed_sequences_have_no_class(tmp_path):
    rows = [{"input_ids": row["input_ids"].tolist(), "labels": [row["labels"]]} for row in classification_data()]
    args = arguments(tmp_path, objective="robust")
    trainer = MoECalTrainer(
        model=classification_model(), args=args, train_dataset=rows, data_collator=DataCollatorWithFlattening()
    )
    with pytest.raises(ValueError, match="Classification needs one integer label per sequence"):
        trainer.train()


def test_labels_of_a_first_token_are_predicted_by_nobody(tmp_path):
    """Also where the collator leaves them in."""
    rows = packed(2)
    seen = Gradients()

    def joined(features):
        ids = [torch.tensor(f["input_ids"]) for f in features]
        return {
            "input_ids": torch.cat(ids)[None], "labels": torch.cat(ids)[None],
            "position_ids": torch.cat([torch.arange(len(i)) for i in ids])[None],
        }  # fmt: skip

    args = arguments(tmp_path, task="lm", objective="robust", gradient_accumulation_steps=1)
    MoECalTrainer(
        model=language_model(), args=args, train_dataset=rows, data_collator=joined, callbacks=[seen]
    ).train()
    expected = [{"input_ids": torch.tensor(r["input_ids"]), "labels": torch.tensor(r["input_ids"])} for r in rows]
    assert relative_error(seen.found, reference_gradients(language_model().train(), expected, args)) <= 1e-5


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("task", ["classification", "lm"])
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"])
def test_virtual_tokens_are_refused_and_prefixes_are_exact(tmp_path, task, kind):
    import peft

    build, data = (language_model, language_data) if task == "lm" else (classification_model, classification_data)
    config = getattr(peft, kind)(task_type="CAUSAL_LM" if task == "lm" else "SEQ_CLS", num_virtual_tokens=3)
    model, rows = peft.get_peft_model(build(), config).eval(), data()

    def trainer(**changes):
        args = arguments(tmp_path, task=task, **changes)
        return MoECalTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows, data_collator=collate)

    if kind == "PrefixTuningConfig":
        expected = losses_one_by_one(model, rows, per_token=False).mean().item()
        assert trainer(objective="robust").evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
        with pytest.raises(ValueError, match="PREFIX_TUNING gives each layer a cache .*objective='robust'"):
            trainer(objective="robust_filtered")
        return
    with pytest.raises(ValueError, match="_TUNING puts virtual tokens before each sequence"):
        trainer(objective="robust")
    batch = collate(rows[:2])
    with AttachedReadout(model, rows=task == "lm"), pytest.raises(ValueError, match="makes sequences of .* positions"):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
