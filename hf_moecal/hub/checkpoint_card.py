"""The card of a checkpoint folder, made of what lies in it and of what is published already."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..calibration.record import FILE_NAME, read_json, read_record
from ..model.classifier import is_added
from ..model.loading import ADAPTER_CONFIG
from .card_sources import is_local_path
from .checkpoint_files import fresh_evaluation, load_training_settings
from .model_card import eval_results, merge_card, metadata_of, render_section


if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"


def make_card(
    model_dir: Path, *, repo_id: str, published: str | None, figures: Iterable[str] = (), license: str | None = None
) -> str:
    """The card to publish, from the records in the folder, the folder's README.md and the published one.

    Args:
        model_dir: folder of the checkpoint.
        repo_id: where it is published.
        published: the card that is there, if there is one.
        figures: paths of the reliability diagrams in the repository.
        license: entered where neither card names one.

    Raises:
        ValueError: a record in the folder is malformed, or of other weights.
    """
    record = read_record(model_dir) if (model_dir / FILE_NAME).exists() else None
    evaluation, task = fresh_evaluation(model_dir), task_of(model_dir)
    section = render_section(
        record=record,
        training=load_training_settings(model_dir),
        evaluation=evaluation,
        figures=list(figures),
        repo_id=repo_id,
        added_head=_added_head(model_dir),
    )
    local = model_dir / CARD
    library = "peft" if (model_dir / ADAPTER_CONFIG).exists() else "transformers"
    return merge_card(
        local=local.read_text(encoding="utf-8") if local.is_file() else None,
        remote=published,
        section=section,
        results=eval_results(evaluation, task_type=task),
        model_name=repo_id.split("/")[-1],
        defaults={"library_name": library, "pipeline_tag": task, **({} if license is None else {"license": license})},
    )


def _added_head(model_dir: Path) -> str | None:
    """The family of a classifier whose head transformers does not have."""
    path = model_dir / "config.json"
    config = read_json(path) if path.is_file() else {}
    architecture, family = (config.get("architectures") or [""])[0], config.get("model_type", "")
    return family if is_added(architecture, family) and not config.get("auto_map") else None


def task_of(model_dir: Path) -> str:
    """What the Hub calls the checkpoint's task, by its config's architecture or its adapter's task type."""
    if (model_dir / ADAPTER_CONFIG).is_file():
        kind = str(read_json(model_dir / ADAPTER_CONFIG).get("task_type"))
    else:
        kind = (json.loads((model_dir / "config.json").read_text()).get("architectures") or [""])[0]
    language = kind.lower().replace("_", "").endswith(("causallm", "lmheadmodel"))
    return "text-generation" if language else "text-classification"


def license_of_base(api: HfApi, model_dir: Path) -> str | None:
    """What the base model's card names, if the checkpoint says which that is and its card can be read."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    base = load_training_settings(model_dir).get("base_model")
    if (model_dir / ADAPTER_CONFIG).is_file():
        base = read_json(model_dir / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        return None
    if is_local_path(base):
        local = Path(base) / CARD
        return metadata_of(local.read_text(encoding="utf-8")).get("license") if local.is_file() else None
    try:
        card = published_card(api, base, None)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):  # private, gone, no name on the Hub
        return None
    return None if card is None else metadata_of(card).get("license")


def published_card(api: HfApi, repo_id: str, commit: str | None) -> str | None:
    """The text of a repository's card; `None` where it has none."""
    from huggingface_hub.errors import RemoteEntryNotFoundError

    with tempfile.TemporaryDirectory() as folder:
        try:
            path = api.hf_hub_download(repo_id, CARD, revision=commit, local_dir=folder)
        except RemoteEntryNotFoundError:  # and not its base, which also says that the Hub could not be reached
            return None
        return Path(path).read_text(encoding="utf-8")
