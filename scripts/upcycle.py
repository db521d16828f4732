"""Turn a dense Llama checkpoint into a sparse Mixture-of-Experts checkpoint that plain transformers loads.

    python scripts/upcycle.py DENSE TARGET --experts 4 --top-k 2 --layers 15

The experts start as copies of the pretrained MLP ("sparse upcycling", arXiv:2212.05055). As the routing weights of a
token sum to one, the model then computes exactly what the dense one did, whatever the router says; that is checked on
real sentences before anything is saved. Then, in the last `--moe-layers` layers only, each expert weighs its neurons
anew: every column of its down projection is multiplied by 1 + noise * N(0, 1). All other layers stay exact.

Why neurons and not single weights: it changes which pretrained features an expert uses, not the features. Perplexity
on 16 movie sentences, the last of 30 layers of SmolLM2-135M-Instruct being four experts, top-2 (dense 135.3; one seed)
and how much two experts differ (distance of their outputs over the size of the mean):

    noise on neurons   0.2: 139.3, differ 20 %     0.3: 143.5, 30 %     0.5: 157.5, 51 %
    noise on weights   0.1: 143.3, differ 18 %     0.2: 159.1, 37 %     0.4: 233.9, 75 %
    neurons left out   25 %: 150.4, differ 52 %    50 %: 227.6, 95 %

Leaving neurons out is no worse for the difference it makes, but an expert starts without them; noise keeps them all.

Families:
    mixtral     every layer has experts. Before the last `--moe-layers` they are identical copies, which costs time
                (two MLPs a token with --top-k 2) and disk, and changes nothing else.
    qwen2_moe   layers before the last `--moe-layers` keep the one dense MLP (`mlp_only_layers`). Attention without
                bias is Llama's. The family's shared expert gets one neuron whose weights are zero: it adds zero, and
                its gradient is zero, so that it stays so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from fetch_data import MODEL_NAME, cache_dir
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
)


RECIPE = 1  # raise it whenever the code below would write other weights
RECORD = "upcycle.json"
FAMILIES = ("mixtral", "qwen2_moe")
# float32 rounding of w_1 y + w_2 y against y; measured 7e-5 on logits of size 20
TOLERANCE = 1e-3
# What a Llama config has in common with the two families.
SHARED = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act max_position_embeddings initializer_range rms_norm_eps rope_parameters attention_dropout "
    "tie_word_embeddings bos_token_id eos_token_id pad_token_id"
).split()


# ---------------------------------------------------------------- from dense to sparse


def load_dense(folder: str | Path, *, layers: int | None = None) -> LlamaForCausalLM:
    """The dense model in float32, cut after its first `layers` decoder layers.

    Raises:
        ValueError: not a Llama checkpoint without biases, or it has fewer layers than asked for.
    """
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
        raise ValueError(
            f"{folder} is a {config.model_type!r} checkpoint: give a dense 'llama' one without biases in its layers."
        )
    layers = config.num_hidden_layers if layers is None else layers
    if not 1 <= layers <= config.num_hidden_layers:
        raise ValueError(f"--layers {layers}: choose 1 to {config.num_hidden_layers}, the layers of {folder}.")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    return model.eval()


def moe_config(
    dense: PreTrainedConfig, *, family: str = "mixtral", experts: int = 4, top_k: int = 2, moe_layers: int = 1
) -> PreTrainedConfig:
    """The sparse config with the dense one's fields.

    Raises:
        ValueError: an unknown family, or numbers that do not fit together.
    """
    if family not in FAMILIES:
        raise ValueError(f"Unknown family {family!r}: choose from {', '.join(FAMILIES)}.")
    if not 1 <= top_k <= experts or experts < 2:
        raise ValueError(f"{experts} experts with top-k {top_k}: give at least 2 experts and 1 <= top-k <= experts.")
    if not 1 <= moe_layers <= dense.num_hidden_layers:
        raise ValueError(f"--moe-layers {moe_layers}: choose 1 to {dense.num_hidden_layers}, the layers kept.")
    fields = {name: getattr(dense, name) for name in SHARED} | {"num_experts_per_tok": top_k}
    if family == "mixtral":
        return MixtralConfig(**fields, num_local_experts=experts, sliding_window=None)
    return Qwen2MoeConfig(
        **fields,
        num_experts=experts,
        moe_intermediate_size=dense.intermediate_size,
        shared_expert_intermediate_size=1,
        norm_topk_prob=True,
        qkv_bias=False,
        mlp_only_layers=list(range(dense.num_hidden_layers - moe_layers)),
    )


@torch.no_grad()
def fill(model: PreTrainedModel, dense: LlamaForCausalLM, *, noise: float, moe_layers: int, seed: int) -> None:
    """Writes the dense weights into the sparse model; the last `moe_layers` layers' experts get the noise.

    Args:
        model: a model made from `moe_config`.
        dense: its dense source.
        noise: standard deviation of the factor (around 1) of every neuron of every expert; 0 leaves exact copies.
        moe_layers: how many of the last layers get the noise.
        seed: of the noise and of the routers.
    """
    if noise < 0:
        raise ValueError(f"--noise {noise}: it is a standard deviation, give 0 or more.")
    generator = torch.Generator().manual_seed(seed)
    source = dense.state_dict()
    first_varied = dense.config.num_hidden_layers - moe_layers
    for name, value in model.state_dict().items():
        mlp = name.split(".experts.")[0]
        if name in source:
            value.copy_(source[name])
        elif ".experts." in name:
            parts = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
            value.copy_(torch.cat([source[f"{mlp}.{part}.weight"] for part in parts]).expand_as(value))
            if name.endswith("down_proj") and int(name.split(".layers.")[1].split(".")[0]) >= first_varied:
                factors = torch.randn(value.shape[0], 1, value.shape[2], generator=generator)
                value.mul_(1 + noise * factors)
        elif ".shared_expert" in name:
            value.zero_()
        elif name.endswith(".mlp.gate.weight"):
            value.copy_(torch.randn(value.shape, generator=generator) * dense.config.initializer_range)
        else:
            raise AssertionError(f"nothing to fill {name} with")


# ---------------------------------------------------------------- checks


def batches(texts: list[str], tokenizer: Any, *, size: int = 16) -> list[dict[str, torch.Tensor]]:
    """Right-padded batches of similar length."""
    texts = sorted(texts, key=len)
    options = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": 128, "padding_side": "right"}
    return [dict(tokenizer(texts[at : at + size], **options)) for at in range(0, len(texts), size)]


@torch.no_grad()
def logits_of(model: PreTrainedModel, inputs: list[dict[str, torch.Tensor]], name: str) -> list[torch.Tensor]:
    """Logits of the real tokens, [tokens, vocabulary] for each batch."""
    steps = tqdm(inputs, desc=name, leave=False)
    return [model(**one, use_cache=False).logits[one["attention_mask"].bool()] for one in steps]


def perplexity(logits: list[torch.Tensor], inputs: list[dict[str, torch.Tensor]]) -> float:
    """exp of the mean negative log-likelihood of each token after the first of its text."""
    total, count = 0.0, 0
    for rows, one in zip(logits, inputs, strict=True):
        mask = one["attention_mask"].bool()
        first = torch.zeros_like(mask)
        first[:, 0] = True
        # Row i predicts token i + 1; that is wanted wherever token i + 1 does not open a text.
        wanted = ~first[mask][1:]
        labels = one["input_ids"][mask][1:][wanted]
        total += torch.nn.functional.cross_entropy(rows[:-1][wanted].float(), labels, reduction="sum").item()
        count += labels.numel()
    return float(torch.tensor(total / count, dtype=torch.float64).exp())


@torch.no_grad()
def expert_spread(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> float:
    """How much the last layer's experts differ: mean distance of two experts' outputs over the mean output's size."""
    experts = model.model.layers[-1].mlp.experts
    seen: list[torch.Tensor] = []
    hook = experts.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**inputs, use_cache=False)
    hook.remove()
    hidden = seen[0][inputs["attention_mask"].bool().flatten()]
    one = torch.ones(len(hidden), 1, dtype=hidden.dtype)
    count = experts.down_proj.shape[0]
    outputs = torch.stack([experts(hidden, torch.full_like(one, k, dtype=torch.long), one) for k in range(count)])
    pairs = [(outputs[a] - outputs[b]).norm(dim=-1) for a in range(count) for b in range(a)]
    return float((torch.stack(pairs).mean(0) / outputs.mean(0).norm(dim=-1)).mean())


def upcycle(
    dense: LlamaForCausalLM, inputs: list[dict[str, torch.Tensor]], *, noise: float, seed: int, **shape: Any
) -> tuple[PreTrainedModel, dict[str, float]]:
    """The sparse model and what was measured on the way.

    Args:
        dense: from `load_dense`.
        inputs: from `batches`.
        noise: see `fill`.
        seed: see `fill`.
        **shape: `family`, `experts`, `top_k` and `moe_layers` of `moe_config`.

    Raises:
        ValueError: without noise the logits are not the dense ones.
    """
    model = AutoModelForCausalLM.from_config(moe_config(dense.config, **shape), dtype=torch.float32).eval()
    reference = logits_of(dense, inputs, "dense")
    measured = {"perplexity_dense": perplexity(reference, inputs)}
    fill(model, dense, noise=0.0, moe_layers=shape["moe_layers"], seed=seed)
    copies = logits_of(model, inputs, "copies")
    difference = max((a - b).abs().max().item() for a, b in zip(reference, copies, strict=True))
    if not difference <= TOLERANCE:
        raise ValueError(f"without noise the logits differ from the dense model's by {difference:.2g}: not saved.")
    measured |= {"max_logit_difference_without_noise": difference}
    del reference, copies
    fill(model, dense, noise=noise, moe_layers=shape["moe_layers"], seed=seed)
    measured["perplexity_moe"] = perplexity(logits_of(model, inputs, "experts"), inputs)
    measured["expert_spread"] = expert_spread(model, inputs[0])
    return model, measured


# ---------------------------------------------------------------- files


def fingerprint(folder: Path) -> str:
    """SHA-256 over a checkpoint's config and weights."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def is_current(target: Path, made_from: dict[str, Any]) -> bool:
    """Whether the target was made by this script from the same source with the same arguments.

    Raises:
        ValueError: the target is something else or has been changed since, which is never overwritten.
    """
    if not target.exists():
        return False
    record = json.loads((target / RECORD).read_text()) if (target / RECORD).is_file() else {}
    if not record or record["written"] != fingerprint(target):
        state = "was changed after this script made it" if record else "was not made by this script"
        raise ValueError(f"{target} exists and {state}: give another target, or remove it.")
    return record["made_from"] == made_from


def save(model: PreTrainedModel, dense: Path, target: Path, record: dict[str, Any]) -> None:
    """Writes the checkpoint beside the target, reloads and compares it, then renames it into place."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(dense).save_pretrained(partial)
    record |= {"written": fingerprint(partial)}
    (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    again = AutoModelForCausalLM.from_pretrained(partial, dtype=model.dtype).state_dict()
    wrong = [name for name, value in model.state_dict().items() if not torch.equal(value, again[name])]
    if wrong:
        raise ValueError(f"{len(wrong)} tensors did not come back as saved, {wrong[0]} first: update transformers.")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)


def read_texts(path: Path, count: int = 32) -> list[str]:
    """The first texts of a Parquet file."""
    import pyarrow.parquet as pq

    if not path.is_file():
        raise ValueError(f"no sentences at {path}: run scripts/fetch_data.py, or give a Parquet file with --texts.")
    return pq.read_table(path, columns=["text"])["text"][:count].to_pylist()


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    models = cache_dir() / "models"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dense", nargs="?", type=Path, default=models / MODEL_NAME, help="dense Llama checkpoint")
    parser.add_argument("target", nargs="?", type=Path, default=models / "SmolLM2-135M-MoE", help="folder to write")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--layers", type=int, help="keep only the first decoder layers (default: all)")
    parser.add_argument("--moe-layers", type=int, default=1, help="last layers whose experts differ (default: 1)")
    parser.add_argument("--family", choices=FAMILIES, default="mixtral")
    parser.add_argument("--noise", type=float, default=0.3, help="of the experts' neurons (default: 0.3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--texts", type=Path, default=cache_dir() / "data" / "movie.parquet", help="for the checks")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Upcycle, check, save, and say what was measured."""
    if not (args.dense / "config.json").is_file():
        raise ValueError(f"no checkpoint at {args.dense}: run scripts/fetch_data.py, or give a dense Llama folder.")
    shape = {name: getattr(args, name) for name in ("family", "experts", "top_k", "moe_layers")}
    options = shape | {"noise": args.noise, "seed": args.seed}
    made_from = options | {"recipe": RECIPE, "layers": args.layers, "dense": fingerprint(args.dense)}
    if is_current(args.target, made_from):
        print(f"{args.target} is there already, made from the same weights with the same arguments.")
        return
    dense = load_dense(args.dense, layers=args.layers)
    inputs = batches(read_texts(args.texts), AutoTokenizer.from_pretrained(args.dense))
    model, measured = upcycle(dense, inputs, **options)
    original = AutoConfig.from_pretrained(args.dense)
    model.to(original.dtype or torch.float32)
    model.generation_config = dense.generation_config
    save(model, args.dense, args.target, {"made_from": made_from, "measured": measured})
    print(summary(model, args, measured, cut_from=original.num_hidden_layers))


def summary(model: PreTrainedModel, args: argparse.Namespace, measured: dict[str, float], *, cut_from: int) -> str:
    """What was made and measured, for a person."""
    layers = model.config.num_hidden_layers
    lines = [
        f"{args.target}: {args.family}, {layers} layers, {args.experts} experts, top-{args.top_k}, "
        f"{model.num_parameters() / 1e6:.0f} M parameters; reloads as saved",
        f"  copies against dense: largest logit difference {measured['max_logit_difference_without_noise']:.1e}",
        f"  perplexity: dense {measured['perplexity_dense']:.4g}, experts {measured['perplexity_moe']:.4g}",
        f"  two experts' outputs differ by {measured['expert_spread']:.0%} of their size",
    ]
    if layers < cut_from:
        lines.append(
            f"  cut to {layers} of {cut_from} layers, neither writes text any more: fine-tune it, e.g. to classify"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    try:
        run(parse(argv))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
