"""The benchmark's model: SmolLM2-135M whose last kept layer is a mixture, its experts specialists of the sources."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from benchmark.data import Sets, source_of, tokenizer
from benchmark.settings import Budget, Task
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, get_cosine_schedule_with_warmup
from upcycle import load_dense, moe_config

from hf_moecal import find_moe_layers
from hf_moecal.cli.recipe import expand
from hf_moecal.model.freezing import set_trainable
from hf_moecal.model.prefix_cache import PrefixCache
from hf_moecal.probes.router import find_routers
from hf_moecal.probes.routing import bind_experts, hooked
from hf_moecal.readouts.committee import member_names


ROUTER_RATE = 10.0  # learning rate of the router, as a multiple
_ALONE, _OWN_SHARE = 0.5, 0.75  # weight of the experts' own losses; share of the specialist that the router learns
_WARM_UP = 10
DENSE = "${MOECAL_CACHE}/models/SmolLM2-135M-Instruct"


def upcycled(budget: Budget) -> PreTrainedModel:
    """A classifier with all layers but the last from the dense model; [`draw`] makes the last.

    One model serves all tasks, however many experts they want, so that its frozen states are computed once.
    """
    dense = load_dense(expand(DENSE), layers=budget.layers)
    config = moe_config(dense.config, family="qwen2_moe")
    config.pad_token_id = tokenizer().pad_token_id
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    model.model.load_state_dict(dense.model.state_dict(), strict=False)
    model.pretrained = {"mlp": dense.model.layers[-1].mlp, "norm": dense.model.norm}
    return model


@torch.no_grad()
def draw(model: PreTrainedModel, *, experts: int, neurons: int, num_labels: int, seed: int) -> None:
    """Gives the model a new last MoE block, final norm and head.

    Each expert has its own neurons of the pretrained MLP, scaled to its size; they are dealt out without repetition as
    long as there are enough. One expert with all of them is the dense model.
    """
    generator = torch.Generator().manual_seed(seed)
    config = copy.deepcopy(model.config)
    config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size = experts, min(2, experts), neurons
    layer = model.model.layers[-1]
    layer.mlp = block = type(layer.mlp)(config)
    pretrained = dict(model.pretrained["mlp"].named_parameters())
    width = pretrained["gate_proj.weight"].shape[0]
    decks = -(-experts * neurons // width)
    dealt = torch.cat([torch.randperm(width, generator=generator) for _ in range(decks)])
    for expert, own in enumerate(dealt[: experts * neurons].split(neurons)):
        gate, up = (pretrained[f"{name}_proj.weight"][own] for name in ("gate", "up"))
        block.experts.gate_up_proj[expert] = torch.cat([gate, up])
        block.experts.down_proj[expert] = pretrained["down_proj.weight"][:, own] * (width / neurons)
    for parameter in [*block.shared_expert.parameters(), *block.shared_expert_gate.parameters()]:
        parameter.zero_()
    std = model.config.initializer_range
    block.gate.weight.normal_(0, std, generator=generator)
    model.model.norm.weight.copy_(model.pretrained["norm"].weight)
    model.score = nn.Linear(model.config.hidden_size, num_labels, bias=False)
    model.score.weight.normal_(0, std, generator=generator)
    model.num_labels = model.config.num_labels = num_labels
    set_trainable(model, "last_moe_layer")


def parameter_groups(model: nn.Module, rate: float) -> list[dict[str, Any]]:
    """What trains, the router of each member ten times as fast."""
    stands_for = member_names(model)
    routers = {id(p) for router in find_routers(model).values() for p in router.parameters()}
    named = dict(model.named_parameters())
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in named.items():
        if parameter.requires_grad:
            groups[id(named[stands_for.get(name, name)]) in routers].append(parameter)
    return [
        {"params": groups[False], "lr": rate, "weight_decay": 0.01},
        {"params": groups[True], "lr": ROUTER_RATE * rate, "weight_decay": 0.0},
    ]


def specialise(model: PreTrainedModel, task: Task, sets: Sets, budget: Budget, *, cache: str, seed: int) -> None:
    """Trains each expert on its own source, the last one on all, and the router on which source a row is from.

    "Branch, train, mix" in one model: every row is routed to its source's specialist and to the shared expert, with
    the router's weights; the router learns to name them; each of the two also predicts alone.
    """
    labels, ids = torch.tensor(sets.train["label"][:]), sets.train["input_ids"][:]
    source = torch.tensor(source_of(sets.train, task))
    per_epoch = len(labels) // budget.batch
    optimizer = torch.optim.AdamW(parameter_groups(model, budget.learning_rate), fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, _WARM_UP, budget.specialise_epochs * per_epoch)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    with PrefixCache(model, cache) as prefix:
        with prefix.replaying(_batch(ids[:1])):
            pass  # the cache compares whole with replayed forwards once, before routing is forced
        with _forced(model) as forced:
            for _ in range(budget.specialise_epochs):
                for chosen in torch.randperm(len(labels), generator=generator).split(budget.batch)[:per_epoch]:
                    with prefix.replaying(_batch([ids[row] for row in chosen])) as short:
                        loss = _specialist_loss(model, short, forced, source[chosen], labels[chosen], task.experts - 1)
                        loss.backward()
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()


def _batch(rows: list[list[int]]) -> dict[str, Tensor]:
    return dict(tokenizer().pad({"input_ids": rows}, return_tensors="pt"))


def _specialist_loss(
    model: nn.Module, batch: dict[str, Tensor], forced: _Forced, own: Tensor, labels: Tensor, shared: int
) -> Tensor:
    both = torch.stack([own, torch.full_like(own, shared)], dim=1)
    losses = []
    for experts in (both[:, :1].expand(-1, 2), both[:, 1:].expand(-1, 2), both):
        forced.experts = experts
        losses.append(F.cross_entropy(model(**batch).logits, labels))
    return losses[2] + _ALONE * (losses[0] + losses[1]) / 2 + forced.router_loss()


class _Forced:
    """The experts that a batch is sent to, and what the router scored."""

    experts: Tensor
    scores: Tensor

    def weights(self) -> Tensor:
        return self.scores.gather(1, self.experts).softmax(-1)

    def router_loss(self) -> Tensor:
        target = self.scores.new_tensor([_OWN_SHARE, 1 - _OWN_SHARE]).expand(len(self.experts), -1)
        return -(target * self.scores.log_softmax(-1).gather(1, self.experts)).sum(-1).mean()


@contextmanager
def _forced(model: nn.Module) -> Iterator[_Forced]:
    (layer,), forced = find_moe_layers(model), _Forced()
    (router,) = find_routers(model).values()

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        forced.scores = output[0] if isinstance(output, tuple) else output

    def send(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        hidden, _, _ = bind_experts(module, args, kwargs)
        return (hidden, forced.experts[: len(hidden)], forced.weights()[: len(hidden)]), {}

    handles = [router.register_forward_hook(keep), layer.module.register_forward_pre_hook(send, with_kwargs=True)]
    with hooked(handles):
        yield forced
