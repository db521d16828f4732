"""Labels as people write them become classes, or one sentence says which mapping to give."""

import numpy as np
import pytest

from hf_moecal.model.labels import class_numbers, read_mapping


MOODS = {"unhappy": 0, "happy": 1}
STARS = {"1": 0, "2": 1, "3": 2, "4": 3, "5": 4}


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (["happy", "unhappy"], MOODS, [1, 0]),  # not the order of the alphabet
        ([" Happy ", "UNHAPPY"], MOODS, [1, 0]),
        (["积极", "消极"], {"消极": 0, "积极": 1}, [1, 0]),
        ([1, 0, -100], MOODS, [1, 0, -100]),
        (["1", "0"], MOODS, [1, 0]),
        ([1.0, 0.0], {}, [1, 0]),
        (np.array([1, 0]), {}, [1, 0]),
        ([True, False], {"false": 0, "true": 1}, [1, 0]),
        ([5, 1, 3], STARS, [4, 0, 2]),  # five is no class, so these are names
        (["LABEL_1"], {"LABEL_0": 0, "LABEL_1": 1}, [1]),
    ],
)
def test_numbers_and_names(labels, names, expected):
    assert class_numbers(labels, names) == expected


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([1, None], MOODS, r"row 1 \(from 0\) has no label"),
        ([1.0, float("nan")], MOODS, r"row 1 \(from 0\) has no label"),
        ([0.7], MOODS, "holds 0.7, which is no class"),
        ([0, "happy"], MOODS, r"mixes numbers and texts: row 1 \(from 0\) holds 'happy'"),
        (
            ["positive", "happy"],
            MOODS,
            r"0: unhappy, 1: happy. Say which.*--labels 'positive=\?' happy=1 ",
        ),
        (["happy"], {"Happy": 0, "HAPPY": 1}, r"--labels 'happy=\?'"),
        ([1, 4, 2], STARS, "numbers that are classes, and other classes' names too"),
        ([True], MOODS, r"--labels 'true=\?'"),
    ],
)
def test_what_is_no_class_is_refused(labels, names, message):
    with pytest.raises(ValueError, match=message):
        class_numbers(labels, names)


def test_a_mapping_says_it_all():
    assert class_numbers([1, 4, 5], STARS, mapping={1: 0, 4: 0, 5: 1}) == [0, 0, 1]
    assert class_numbers([True, False], {}, mapping={True: 1, False: 0}) == [1, 0]
    with pytest.raises(ValueError, match=r"`labels` says 0: bad. Say which.*bad=0 'good=\?'"):
        class_numbers(["bad", "good"], MOODS, mapping={"bad": 0})
    assert read_mapping(["good=happy", "a=b=0"], MOODS) == {"good": 1, "a=b": 0}
    assert read_mapping(["bad, good,fine"], MOODS) == {"bad": 0, "good": 1, "fine": 2}
    for items, message in [(["good"], "LABEL=CLASS"), (["good=?"], "LABEL=CLASS"), (["a=0", "a=1"], "says twice")]:
        with pytest.raises(ValueError, match=message):
            read_mapping(items, MOODS)
