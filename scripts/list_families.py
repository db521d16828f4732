"""Writes the table of supported MoE families from a real run over the installed transformers.

    python scripts/list_families.py [--output FAMILIES.md]

Every causal-LM MoE family that transformers' auto mappings know is built as a tiny random model, probed at its MoE
layers, and listed with the paths that its certificates chose, or with the reason why its experts cannot be consulted.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from tiny_moe import families, headless_families, tiny_batch, tiny_model

from hf_moecal import UnsupportedMoEError, probe_experts


@dataclass(frozen=True)
class Family:
    """One row of the table."""

    name: str
    head: str
    last: str
    earlier: str
    error: float
    router: bool
    reason: str = ""


@torch.no_grad()
def probe(name: str) -> Family:
    head = "hf_moecal" if name in headless_families() else "transformers"
    inputs = {"input_ids": tiny_batch()["input_ids"], "use_cache": False}
    try:
        model = tiny_model(name, every_layer=True)
        with probe_experts(model, "all") as seen:
            model(**inputs)
        certificates = [seen.certificate_of(layer.index) for layer in seen.layers]
        classifier = tiny_model(name, classifier=True, every_layer=True)
        with probe_experts(classifier) as pooled:
            classifier(**inputs)
    except UnsupportedMoEError as error:
        return Family(name, head, "", "", float("nan"), False, str(error))
    of_classifier = pooled.certificate_of(pooled.layers[0].index)
    relative = max(certificate.error / certificate.scale for certificate in [*certificates, of_classifier])
    return Family(name, head, certificates[-1].path, certificates[0].path, relative, _knows_router(seen))


def _knows_router(seen: object) -> bool:
    try:
        seen.router_shares(torch.tensor([3]), layer=-1 % len(seen.layers))
    except UnsupportedMoEError:
        return False
    return True


def table(rows: list[Family]) -> str:
    """The rows as Markdown."""
    supported = [row for row in rows if not row.reason]
    count = {path: sum(row.last == path for row in supported) for path in ("delta", "gather", "prefix")}
    lines = [
        f"{len(supported)} of the {len(rows)} causal-LM MoE families of transformers {transformers.__version__} are "
        f"supported; at the last MoE layer {count['delta']} take the path `delta`, {count['gather']} `gather` and "
        f"{count['prefix']} `prefix`. The error is the largest difference from brute force, relative to the largest "
        "logit, of the language model and of the classifier. The path depends on the configuration and is measured on "
        "every model anew.",
        "",
        f"{sum(row.head == 'transformers' for row in supported)} of them have a sequence-classification head in "
        "transformers; to the others hf_moecal adds transformers' own generic one ([classifiers.md](classifiers.md)).",
        "",
        "| family | last MoE layer | an earlier one | error | full router distribution | classification head of |",
        "|---|---|---|---|---|---|",
    ]
    for row in supported:
        known = "yes" if row.router else "no"
        lines.append(f"| `{row.name}` | {row.last} | {row.earlier} | {row.error:.0e} | {known} | {row.head} |")
    lines += ["", "Not supported, with the reason that the error gives:", ""]
    lines += [f"- `{row.name}`: {row.reason}" for row in rows if row.reason]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="file to write; standard output otherwise")
    output = parser.parse_args().output
    transformers.logging.set_verbosity_error()
    text = table([probe(name) for name in sorted(families())])
    if output is None:
        print(text, end="")
    else:
        output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
