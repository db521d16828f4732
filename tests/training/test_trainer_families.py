"""One Robust Filtered step on every supported family: the logged objective is that of the definition."""

import pytest
import torch
from torch import nn

from hf_moecal import MoECalTrainer, find_moe_layers
from hf_moecal.objectives import robust_filtered, routing_relevance
from tests.tiny_moe import classifier_families, families, tiny_model
from tests.training.helpers import arguments, collate


UNSUPPORTED = {"doge", "jetmoe"}


class Recording(MoECalTrainer):
    """Keeps what was measured and weighed."""

    def _close(self, model: nn.Module) -> None:
        super()._close(model)
        self.window = self._optimizer_batch


def step(model, rows, folder, **settings):
    args = arguments(folder, tau_disagreement=0.05, tau_regret=0.05, **settings)
    trainer = Recording(model=model, args=args, train_dataset=rows, data_collator=collate)
    trainer.train()
    columns = [torch.cat(values).flatten() for values in zip(*trainer.window.measured, strict=True)]
    losses, regret, disagreement = columns
    relevant = routing_relevance(regret, disagreement, tau_regret=0.05, tau_disagreement=0.05)
    expected = robust_filtered(losses, relevant, eta=args.eta).item()
    assert trainer.state.log_history[0]["objective"] == pytest.approx(expected, rel=1e-6)
    assert torch.isfinite(torch.stack(columns)).all()
    assert (disagreement > 0).any() == (find_moe_layers(model)[-1].top_k > 1)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def rows(vocabulary, *, classes=None):
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(4):
        ids = torch.randint(3, vocabulary, (16,), generator=generator)
        made.append({"input_ids": ids, "labels": i % classes if classes else ids.clone()})
    return made


@pytest.mark.slow
@pytest.mark.parametrize("example", ["sequence", "token"])
@pytest.mark.parametrize("family", sorted(set(families()) - UNSUPPORTED))
def test_language_models(tmp_path, family, example):
    model = tiny_model(family)
    vocabulary = model.config.get_text_config().vocab_size
    data = [{**row, "labels": row["labels"].index_fill(0, torch.arange(12), -100)} for row in rows(vocabulary)]
    settings = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, task="lm", example=example)
    step(model, data, tmp_path, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(classifier_families()) - UNSUPPORTED))
def test_classifiers(tmp_path, family):
    model = tiny_model(family, classifier=True)
    vocabulary = model.config.get_text_config().vocab_size
    data = rows(vocabulary, classes=model.config.num_labels)
    step(model, data, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
