"""What the probe costs: a training step with it, as a ratio to one without, beside brute force.

    python scripts/benchmark_probe.py [--vocabulary 1000 32000] [--top-k 2 4] [--json]
    python scripts/benchmark_probe.py --readouts [--batch 16]    # a classifier's mixtures against its native readout

The second is on a model of the demo's size (15 layers of SmolLM2-135M, experts in the last, which alone trains), with
4 experts and with 64 of an eighth of the size; a step is forward and backward without a cache of the frozen layers.

All variants take turns, and each ratio is the median over rounds of a variant's time to that of a step without probe
in the same round, timed before and after the others. On a CPU the clock counts the process's own seconds, which other
processes do not stretch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, Qwen2MoeConfig
from transformers import Qwen2MoeForSequenceClassification as Classifier

from hf_moecal import probe_experts
from hf_moecal.model.freezing import set_trainable
from hf_moecal.probes import ExpertProbe
from hf_moecal.readouts.attached import AttachedReadout
from hf_moecal.readouts.mixture import Readout


BATCH, LENGTH, HIDDEN, LAYERS, EXPERTS = 4, 256, 256, 8, 8


def build(vocabulary: int, top_k: int, device: str) -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=top_k,
        experts_implementation="grouped_mm",
    )
    model = MixtralForCausalLM(config).to(device).train()
    model.set_experts_implementation("grouped_mm")
    return model


def variants(probe: ExpertProbe | None, model: MixtralForCausalLM, ids: Tensor, top_k: int) -> dict[str, Callable]:
    last = torch.arange(1, BATCH + 1, device=ids.device) * LENGTH - 1
    everything = torch.arange(BATCH * LENGTH, device=ids.device)
    labels = ids.flatten().roll(-1)

    def forward() -> Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    def paused() -> None:
        with probe.paused():
            forward().backward()

    def hooks() -> None:
        forward().backward()

    def last_token() -> None:
        loss = forward()
        with torch.no_grad():
            probe.disagreement_and_regret(last, labels[last])
        loss.backward()

    def last_token_with_gradient() -> None:
        loss = forward()
        (loss + sum(value.sum() for value in probe.disagreement_and_regret(last, labels[last]))).backward()

    def all_tokens() -> None:
        loss = forward()
        with torch.no_grad():
            probe.disagreement_and_regret(everything, labels)
        loss.backward()

    def all_tokens_with_gradient() -> None:
        loss = forward()
        (loss + sum(value.mean() for value in probe.disagreement_and_regret(everything, labels))).backward()

    def brute_force() -> None:
        with probe.paused():
            loss = forward()
            with torch.no_grad():  # one whole forward for each of the k experts, all tokens rerouted at once
                for _ in range(top_k):
                    model(input_ids=ids, use_cache=False)
            loss.backward()

    def brute_force_with_gradient() -> None:
        with probe.paused():
            sum([forward() for _ in range(1 + top_k)]).backward()

    return {
        function.__name__: function
        for function in (
            paused,
            hooks,
            last_token,
            last_token_with_gradient,
            all_tokens,
            all_tokens_with_gradient,
            brute_force,
            brute_force_with_gradient,
        )
    }


def bare(model: MixtralForCausalLM, ids: Tensor) -> None:
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def measure(vocabulary: int, top_k: int, *, rounds: int, device: str) -> dict[str, float]:
    """Seconds of a step without probe, and every variant as a ratio to it: medians over the rounds."""
    model = build(vocabulary, top_k, device)
    ids = torch.randint(0, vocabulary, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1)).to(device)
    seconds: dict[str, list[float]] = {}
    for step in range(rounds + 1):
        times = {"no_probe": timed(lambda: bare(model, ids), model)}
        with probe_experts(model) as probe:
            bare(model, ids)
            probe.certificate  # noqa: B018  computed once, before the clock runs
            for name, function in variants(probe, model, ids, top_k).items():
                times[name] = timed(function, model)
        times["no_probe"] = (times["no_probe"] + timed(lambda: bare(model, ids), model)) / 2
        if step:  # the first round warms up
            for name, value in times.items():
                seconds.setdefault(name, []).append(value)
    base = seconds["no_probe"]
    ratios = {name: [value / own for value, own in zip(values, base, strict=True)] for name, values in seconds.items()}
    medians = {name: statistics.median(values) for name, values in ratios.items() if name != "no_probe"}
    return {"seconds_without_probe": statistics.median(base), **medians}


def classifier(experts: int, top_k: int, device: str) -> Classifier:
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        moe_intermediate_size=1536 if experts == 4 else 192,
        shared_expert_intermediate_size=1,
        num_hidden_layers=15,
        mlp_only_layers=list(range(14)),
        num_attention_heads=9,
        num_key_value_heads=3,
        num_experts=experts,
        num_experts_per_tok=top_k,
        num_labels=2,
        pad_token_id=0,
    )
    model = Classifier(config).to(device)
    set_trainable(model, "last_moe_layer")
    return model


def measure_readout(experts: int, top_k: int, mixed: int | None, *, batch: int, rounds: int, device: str) -> dict:
    """A training step and a prediction by the soft mixture as ratios to those by the native readout."""
    model = classifier(experts, top_k, device)
    ids = torch.randint(1, 49152, (batch, 32), generator=torch.Generator().manual_seed(1)).to(device)
    labels = torch.arange(batch, device=device) % 2
    kinds = {"native": Readout(), "soft_mixture": Readout("soft_mixture", mixed)}

    def step() -> None:
        torch.nn.functional.cross_entropy(model.train()(input_ids=ids).logits, labels).backward()

    def prediction() -> None:
        with torch.no_grad():
            model.eval()(input_ids=ids)

    found: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        for function in (step, prediction):
            times = []
            for kind in ("native", "soft_mixture", "native"):
                with AttachedReadout(model, kinds[kind]) as attached:
                    if kind != "native":
                        function()  # each attachment is certified once, before the clock runs
                        assert attached.mixed.shares.shape[1] == (mixed or experts)
                    times.append(timed(function, model))
            if turn:  # the first round warms up
                found.setdefault(function.__name__, []).append(2 * times[1] / (times[0] + times[2]))
                found.setdefault(f"native {function.__name__}, seconds", []).append((times[0] + times[2]) / 2)
    return {name: statistics.median(values) for name, values in found.items()}


def timed(function: Callable, model: PreTrainedModel) -> float:
    model.zero_grad(set_to_none=True)
    start = clock()
    function()
    return clock() - start


def clock() -> float:
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[1000, 32000])
    parser.add_argument("--top-k", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--readouts", action="store_true", help="what a classifier's mixtures cost")
    parser.add_argument("--batch", type=int, default=16, help="sequences of 32 tokens, with --readouts")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.readouts:
        for experts, top_k, mixed in ((4, 2, None), (64, 8, 8)):
            print(f"{experts} experts, top {top_k}, {mixed or 'all'} mixed", flush=True)
            settings = {"batch": options.batch, "rounds": options.rounds, "device": options.device}
            for name, value in measure_readout(experts, top_k, mixed, **settings).items():
                print(f"  {name:28s} {value:.3f}", flush=True)
        return
    results = [
        {"vocabulary": v, "top_k": k, **measure(v, k, rounds=options.rounds, device=options.device)}
        for v in options.vocabulary
        for k in options.top_k
    ]
    if options.json:
        print(json.dumps(results, indent=2))
        return
    for result in results:
        print(f"vocabulary {result['vocabulary']}, top {result['top_k']} of {EXPERTS}")
        for name, value in list(result.items())[2:]:
            print(f"  {name.replace('_', ' '):28s} {value:.3f}")


if __name__ == "__main__":
    main()
