"""Layer maps: the published ones by name, lists, files; one error for another depth."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest

from lowbit.distill.layer_maps import NAMED, LayerMap, resolve

# name, L, N -> rows and how they are combined, as the papers list them.
PUBLISHED: list[tuple[str, int, int, Any, str]] = [
    ("uniform", 4, 12, [3, 6, 9, 12], "one"),
    ("uniform", 3, 3, [1, 2, 3], "one"),
    ("top", 4, 12, [9, 10, 11, 12], "one"),
    ("bottom", 4, 12, [1, 2, 3, 4], "one"),
    ("last", 3, 12, [None, None, 12], "one"),
    ("skip", 6, 12, [2, 4, 6, 8, 10, None], "one"),  # BERT-PKD
    ("skip", 6, 24, [4, 8, 12, 16, 20, None], "one"),
    ("pkd_last", 6, 12, [7, 8, 9, 10, 11, None], "one"),
    ("pkd_last", 3, 12, [10, 11, None], "one"),
    ("none", 2, 5, [None, None], "one"),
    ("groups", 2, 6, [[1, 2, 3], [4, 5, 6]], "concat"),  # CKD, 6 -> 2
    ("overlap", 2, 6, [[1, 2, 3, 4], [3, 4, 5, 6]], "concat"),
    ("overlap", 3, 6, [[1, 2, 3], [2, 3, 4, 5], [4, 5, 6]], "concat"),
    ("cross", 2, 6, [[1, 3, 5], [2, 4, 6]], "concat"),
    ("buckets", 2, 4, [[1, 2], [3, 4]], "attend"),  # ALP-KD
    ("all", 2, 3, [[1, 2, 3], [1, 2, 3]], "attend"),
]


@pytest.mark.parametrize(("name", "student", "teacher", "rows", "combine"), PUBLISHED)
def test_named_maps_are_the_published_ones(name: str, student: int, teacher: int, rows: Any, combine: str) -> None:
    assert resolve(name, student, teacher) == LayerMap(tuple(rows), combine, teacher)


def test_every_name_is_tested() -> None:
    assert {name for name, *_ in PUBLISHED} == NAMED.keys()


def test_lists_and_tables_say_what_a_layer_map_says(tmp_path: Path) -> None:
    expected = LayerMap(((0,), (), (2, 5)), "mean", 6)
    rows: Any = [0, None, [2, 5]]
    assert resolve({"rows": rows, "combine": "mean", "teacher_layers": 6}, 3, 6) == expected
    expected.save(tmp_path / "map.json")
    for path in (tmp_path / "map.json", str(tmp_path / "map.json")):
        assert resolve(path, 3, 6) == expected
    assert resolve(expected, 3, 6) is expected
    assert resolve([2, [], 3], 3, 6) == LayerMap(((2,), (), (3,)))
    assert resolve({"name": "groups", "combine": "mean"}, 1, 2) == LayerMap(((1, 2),), "mean", 2)
    assert expected.taught() == [(1, (0,)), (3, (2, 5))]
    assert pickle.loads(pickle.dumps(expected)) == copy.deepcopy(expected) == expected


# What is given for a student of 2 and a teacher of 4 layers, and what the error says.
REFUSED: list[tuple[Any, str]] = [
    ([1], r"for 1 student layers .* this student has 2, the teacher 4\. Pass a map with a row"),
    ([1, 2, 3], "for 3 student layers"),
    ([1, 5], "a teacher of at least 5; this student has 2, the teacher 4"),
    (LayerMap(((1,), (2,)), teacher_layers=12), "a teacher of 12; this student has 2, the teacher 4"),
    ("unifrom", r"layer map 'unifrom'; accepted: uniform, top, .* or the path of a JSON file"),
    ({"name": "unifrom"}, "unifrom is not known"),
    ({"name": "groups", "by": 2}, "by is not known"),
    ({"rows": [1, 2], "by": 2}, r"accepted: uniform, .* or a table with 'rows'"),
    (3, "accepted: uniform"),
    ([[1, 2], [3]], "with several layers need combine='mean'"),
    ([[2, 1], 3], r"\[2, 1\] is no row; accepted: a teacher layer"),
    ([-1, 3], "-1 is no row"),
    ([True, 3], "True is no row"),
    (["1", 3], "'1' is no row"),
    ({"rows": [[1, 2], 3], "combine": "sum"}, "combine='sum'; accepted: one, mean, concat, attend"),
    ({"rows": [1, 7], "teacher_layers": 4}, "name layers that a teacher of 4 has not"),
]


@pytest.mark.parametrize(("spec", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_another_depth_or_no_map_is_one_error(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(spec, 2, 4)


@pytest.mark.parametrize("name", ["uniform", "skip", "groups", "overlap", "cross", "buckets"])
def test_names_that_need_even_layers_say_which_are(name: str) -> None:
    message = r"Some: 3 student layers do not divide 4 teacher layers evenly; take a student of 1, 2, 4 layers, or"
    with pytest.raises(ValueError, match=message):
        resolve(name, 3, 4, "Some")


@pytest.mark.parametrize("name", ["top", "bottom", "pkd_last"])
def test_a_teacher_of_fewer_layers_has_no_top(name: str) -> None:
    with pytest.raises(ValueError, match="this student has 4, the teacher 2"):
        resolve(name, 4, 2)


@pytest.mark.parametrize("text", ["", "{", '{"rows": 3}', '{"map": [1]}', "3", '{"rows": [[3, 1]]}', "[[[1]]]"])
def test_a_file_that_holds_no_map_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(ValueError, match=r"map\.json holds no layer map"):
        resolve(tmp_path / "map.json", 1, 3)
