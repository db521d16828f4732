# Short answers whose confidence can be trusted: OLMoE-1B-7B fine-tuned on TriviaQA, judged on two other question sets.
#
# command:   python recipes/hub/short_answers.py
# then:      moecal evaluate runs/short_answers/answers.parquet
# hardware:  one GPU of 40 GB or more; 30 GB of memory on the machine, 35 GB of disk
# memory:    18 GiB per device (moecal plan)
# hours:     1 on one H100 (an estimate from the operations at a fifth of the peak rate, not measured)
# expect:    not yet run
"""Fine-tunes on answers, then has the model answer: a table with each answer's probability and whether it is right.

Every field of `MoECalSFTConfig` is an argument, for example `--objective erm --output_dir runs/short_answers_erm` for
the plain fine-tuning to compare with.
"""

from __future__ import annotations

import string
import sys
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, concatenate_datasets, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from hf_moecal import predict_answers
from hf_moecal.metrics import table_report
from hf_moecal.training.sft import MoECalSFTConfig, MoECalSFTTrainer


MODEL = "allenai/OLMoE-1B-7B-0924"
SETTINGS = {
    "objective": "robust_filtered",
    "eta": 2.0,
    "robust_warmup_ratio": 0.4,
    "train": "lora",
    "max_length": 128,
    "output_dir": "runs/short_answers",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 64,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 50,
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "report_to": "none",
}
TRIVIA = {"path": "mandarjoshi/trivia_qa", "name": "rc.nocontext"}
GROUPS = {  # where questions come from, and the column with what counts as right
    "trivia": ({**TRIVIA, "split": "validation[1000:4000]"}, "answer.aliases"),
    "natural": ({"path": "google-research-datasets/nq_open", "split": "validation"}, "answer"),
    "web": ({"path": "stanfordnlp/web_questions", "split": "test"}, "answers"),
}


def questions(spec: dict[str, str], column: str) -> Dataset:
    """Rows with a prompt, a completion to learn and all spellings that are right."""
    outer, *inner = column.split(".")

    def row(example: dict) -> dict:
        right = example[outer][inner[0]] if inner else example[outer]
        told = example[outer].get("value", right[0]) if inner else right[0]
        return {"prompt": f"Question: {example['question']}\nAnswer:", "completion": f" {told}", "right": right}

    dataset = load_dataset(**spec)
    return dataset.map(row, remove_columns=dataset.column_names)


def normalised(text: str) -> str:
    """As question-answering benchmarks compare: without case, punctuation and articles."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(word for word in kept.split() if word not in ("a", "an", "the"))


def is_right(answer: str, right: Sequence[str]) -> bool:
    return normalised(answer) in {normalised(spelling) for spelling in right}


def train(args: MoECalSFTConfig, model: str = MODEL) -> MoECalSFTTrainer:
    tokenizer = AutoTokenizer.from_pretrained(model)
    trainer = MoECalSFTTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype="bfloat16"),
        args,
        train_dataset=questions({**TRIVIA, "split": "train"}, "answer.aliases"),
        eval_dataset={"trivia": questions({**TRIVIA, "split": "validation[:1000]"}, "answer.aliases")},
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    trainer.save_training_record()
    return trainer


def answers(trainer: MoECalSFTTrainer) -> Dataset:
    """What the model answers to the questions of every group."""
    tables = []
    for name, where in GROUPS.items():
        asked = questions(*where).remove_columns("completion").rename_column("right", "completion")
        tables.append(
            predict_answers(
                trainer.model,
                asked,
                processing_class=trainer.processing_class,
                is_right=is_right,
                max_new_tokens=24,
                batch_size=128,
                group=name,
            )
        )
    return concatenate_datasets(tables)


def main(arguments: Sequence[str], model: str = MODEL) -> None:
    parser = HfArgumentParser(MoECalSFTConfig)
    parser.set_defaults(**SETTINGS)
    (args,) = parser.parse_args_into_dataclasses(list(arguments))
    trainer = train(args, model)
    if trainer.is_world_process_zero():
        table = answers(trainer)
        table.to_parquet(str(Path(args.output_dir) / "answers.parquet"))
        for name, found in table_report(table)["groups"].items():
            told = ", ".join(f"{figure} {found[figure]:.3f}" for figure in ("accuracy", "confidence", "ece", "auroc"))
            print(f"{name}: {told}, n {found['n']:,}")


if __name__ == "__main__":
    main(sys.argv[1:])
