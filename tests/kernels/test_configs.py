"""Tile tables: lookup order, damaged files, atomic saves, and a tuner that can be stopped (with a timer of our own)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowbit_kernels import configs, tune
from lowbit_kernels.linear import gpu as linear_gpu
from lowbit_kernels.linear.gpu import Tile

ROOT = Path(__file__).parents[2]
TABLES = sorted(configs.SHIPPED.glob("*.json"))
OP = "ternary_linear"
MINE, OTHER = Tile(32, 128, 64, 8, 4), Tile(16, 32, 32, 4, 2)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A user folder of the test's own."""
    monkeypatch.setenv("LOWBIT_CACHE_DIR", str(tmp_path))
    configs.reload()
    yield tmp_path
    configs.reload()


def entry(tile: Tile = MINE, op: str = OP, M: int = 64, N: int | None = None, K: int | None = None, **changes) -> dict:
    fields = dataclasses.asdict(tile)
    return {"op": op, "M": M, "N": N, "K": K, "tile": fields, "source": "aot", **changes}


def lookup(M: int = 64, N: int = 768, K: int = 768, arch: int | None = 90) -> Tile:
    return configs.lookup(OP, Tile, M, N, K, arch)


# --- lookup ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("M", "expected"), [(0, 1), (1, 1), (2, 16), (16, 16), (17, 64), (65, 128), (513, 2048), (32768, 32768)]
)
def test_a_bucket_is_the_next_size_up(M: int, expected: int) -> None:
    assert configs.bucket(M) == expected


def test_the_last_bucket_has_no_end() -> None:
    assert configs.bucket(10**9) == configs.BUCKETS[-1]
    assert lookup(M=10**9) == lookup(M=configs.BUCKETS[-1])


def test_the_users_own_shape_comes_first_then_the_users_bucket_then_the_package(cache: Path) -> None:
    shipped = lookup()
    assert shipped not in (MINE, OTHER)
    configs.save(cache / "sm_90.json", [entry(OTHER), entry(MINE, N=768, K=768)])
    assert lookup() == shipped  # files are read once
    configs.reload()
    assert lookup() == lookup(M=17) == MINE
    assert lookup(N=3072) == lookup(K=3072) == OTHER
    assert lookup(M=65) == configs.untuned(OP, Tile, 65, 90)
    assert lookup(arch=80) == lookup(arch=None) == configs.untuned(OP, Tile, 64, 80)
    assert configs.untuned(OP, Tile, 64, 90) == shipped
    assert MINE not in configs.shipped(OP, Tile, 90)


def test_a_family_comes_before_the_default_and_unknown_devices_take_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "SHIPPED", tmp_path / "shipped")
    configs.save(configs.SHIPPED / "default.json", [entry(OTHER), entry(OTHER, M=128)])
    configs.save(configs.SHIPPED / "sm_80.json", [entry(MINE)])
    assert lookup(arch=80) == lookup(arch=89) == MINE
    assert lookup(M=128, arch=80) == OTHER  # not in the family's file
    for arch in (70, 75, 90, 100, 120, 990, None):
        assert lookup(arch=arch) == OTHER
    assert configs.shipped(OP, Tile, 86) == [MINE]
    assert configs.shipped(OP, Tile, 120) == [OTHER]
    with pytest.raises(LookupError, match="no tile for soft_linear and M=64"):
        configs.lookup("soft_linear", Tile, 64, 1, 1, 90)


def test_a_users_file_is_for_one_capability(cache: Path) -> None:
    configs.save(cache / "sm_80.json", [entry(MINE)])
    assert lookup(arch=80) == MINE
    assert lookup(arch=89) != MINE  # less shared memory


def test_fields_that_a_tile_does_not_have_yet_are_ignored(cache: Path) -> None:
    known = entry(MINE)
    known["tile"] |= {"cluster": 2}
    configs.save(cache / "sm_90.json", [known])
    assert lookup() == MINE


def test_every_launch_after_the_first_reads_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = lookup(M=33)
    monkeypatch.setattr(Path, "read_text", lambda *_args, **_keywords: pytest.fail("a file was read"))
    assert lookup(M=40) is first


def test_import_reads_no_table(cache: Path) -> None:
    (cache / "sm_90.json").write_text("{")
    program = """
import builtins, io, sys
import torch
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
import lowbit_kernels
lowbit_kernels.ternary_linear
print([name for name in opened if name.endswith(".json")], "lowbit_kernels.configs" in sys.modules)
"""
    path = ":".join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == "[] True", result.stderr


# --- damaged files ---------------------------------------------------------------------------------------------------

GOOD = {"version": configs.VERSION, "entries": [entry()]}
DAMAGED = [
    "",
    "{",
    "[" * 100_000,
    "null",
    "[]",
    json.dumps(GOOD)[:-9],
    json.dumps({**GOOD, "version": 2}),
    json.dumps({**GOOD, "entries": None}),
    *(
        json.dumps({**GOOD, "entries": [bad]})
        for bad in (
            7,
            {},
            entry(op=3),
            entry(M=65),
            entry(M=None),
            entry(N=768),
            entry(N="768", K=768),
            entry(source="guess"),
            entry(source="tuned"),
            {**entry(), "tile": [16, 64]},
            {**entry(), "tile": {"block_m": 16}},
            *(
                {**entry(), "tile": {**entry()["tile"], **wrong}}
                for wrong in ({"block_m": 48}, {"block_n": "16"}, {"block_b": 16}, {"num_warps": -4}, {"num_stages": 0})
            ),
        )
    ),
]


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_user_file_warns_once_and_the_package_serves(cache: Path, text: str) -> None:
    configs.save(cache / "sm_90.json", [entry(MINE)])
    assert lookup() == MINE  # what damage is compared with
    configs.reload()
    (cache / "sm_90.json").write_text(text)
    with pytest.warns(RuntimeWarning, match=r"sm_90\.json.*delete the file") as caught:
        assert lookup() == configs.untuned(OP, Tile, 64, 90)
        for N in range(5):
            assert lookup(N=N) == configs.untuned(OP, Tile, 64, 90)
    assert len(caught) == 1


def test_bytes_that_are_no_text_and_a_folder_are_damage_too(cache: Path) -> None:
    (cache / "sm_90.json").write_bytes(b"\xff\xfe\x00")
    (cache / "sm_80.json").mkdir()
    for arch in (90, 80):
        with pytest.warns(RuntimeWarning, match="is not used"):
            assert lookup(arch=arch) == configs.untuned(OP, Tile, 64, arch)


def test_no_user_folder_is_no_warning(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lookup(arch=90) == configs.untuned(OP, Tile, 64, 90)
    monkeypatch.delenv("LOWBIT_CACHE_DIR")
    monkeypatch.setenv("HOME", "/nowhere")
    assert configs.user_table(89) == Path("/nowhere/.cache/lowbit/sm_89.json")


def test_a_tile_names_what_it_does_not_accept() -> None:
    with pytest.raises(ValueError, match="block_n=24, accepted: powers of two from 16"):
        Tile(16, 24, 32, 4, 3)
    with pytest.raises(ValueError, match="num_stages=0"):
        Tile(16, 16, 32, 4, 0)


# --- files -----------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_read_back_one_line_an_entry(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.json"
    entries = [entry(OTHER, M=M, N=N, K=N) for N in (1024, 768, None) for M in (128, 1)]
    configs.save(path, entries)
    table = configs.read(path)
    assert list(table.values()) == entries[::-1]
    assert len(path.read_text().splitlines()) == len(entries) + 2
    configs.save(path, table.values())
    assert configs.read(path) == table


def test_a_save_that_fails_leaves_the_old_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    configs.save(path, [entry(MINE)])
    before = path.read_bytes()

    def full(target: Path, text: str, **_keywords: object) -> None:
        target.write_bytes(text.encode()[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        configs.save(path, [entry(OTHER), entry(OTHER, M=1)])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_no_moment_shows_half_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, replace, seen = tmp_path / "table.json", os.replace, []
    configs.save(path, [entry(MINE)])

    def watched(source: Path, target: Path) -> None:
        seen.append((len(configs.read(target)), len(configs.read(source))))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    configs.save(path, [entry(MINE), entry(MINE, M=1)])
    assert seen == [(1, 2)] and len(configs.read(path)) == 2


# --- what the package has --------------------------------------------------------------------------------------------


def test_the_package_has_its_tables() -> None:
    assert [path.stem for path in TABLES] == ["default", "sm_80", "sm_90"]


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_table_serves_every_layout_and_bucket(path: Path) -> None:
    table = configs.read(path)
    for layout in linear_gpu.LAYOUTS:
        for rows in configs.BUCKETS:
            tile = configs.tile(Tile, table[f"{layout}_linear", rows, None, None])
            assert 16 <= tile.block_m <= max(16, rows)
    for item in table.values():
        if item["source"] == "tuned":
            assert item["device"] and item["triton"] and item["torch"] and item["us"] > 0
        else:
            assert "us" not in item  # never timed


def test_wheels_and_editable_installs_have_the_tables() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    package = ROOT / tools["package-dir"]["lowbit_kernels"]
    declared = {path for pattern in tools["package-data"]["lowbit_kernels"] for path in package.glob(pattern)}
    assert {package / "configs" / path.name for path in TABLES} <= declared


# --- tuning ----------------------------------------------------------------------------------------------------------

CASES = [tune.Case(layout, N, 768, M) for layout in ("ternary", "split") for N in (768, 3072) for M in (1, 64)]


def fake_measure(case: tune.Case) -> dict:
    tiles = tune.candidates(case, 227 * 1024)
    best = tiles[hash(case.M + case.N) % len(tiles)]
    return tune.fastest(tiles, tiles[0], lambda tile: 5.0 if tile == best else 9.0)


def test_the_fastest_tile_wins_and_a_tie_changes_nothing() -> None:
    assert tune.fastest([MINE, OTHER], MINE, {MINE: 7.001, OTHER: 3.333}.get) == {
        "tile": entry(OTHER)["tile"],
        "us": 3.33,
        "untuned_us": 7.0,
    }
    assert tune.fastest([OTHER], MINE, lambda _tile: 2.0)["tile"] == entry(MINE)["tile"]
    measured = tune.fastest([OTHER], MINE, {MINE: float("inf"), OTHER: 3.0}.get)
    assert measured["tile"] == entry(OTHER)["tile"] and measured["untuned_us"] is None
    with pytest.raises(RuntimeError, match="none of 2 tiles works"):
        tune.fastest([OTHER], MINE, lambda _tile: float("inf"))


def test_tuned_tiles_are_what_the_kernel_takes(cache: Path) -> None:
    assert tune.tune(CASES, fake_measure, configs.user_table(90)) == len(CASES)
    configs.reload()
    for case in CASES:
        expected = fake_measure(case)["tile"]
        assert linear_gpu.choose_tile(case.layout, case.M, case.N, case.K, 90) == Tile(**expected)
    assert linear_gpu.choose_tile("binary", 64, 768, 768, 90) == configs.untuned("binary_linear", Tile, 64, 90)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    output, calls = tmp_path / "table.json", []
    configs.save(output, [entry(MINE, M=1, N=768, K=768), entry(OTHER, M=512)])  # not timed: to be measured, to be kept

    def measure(case: tune.Case) -> dict:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(case)
        return fake_measure(case)

    with pytest.raises(KeyboardInterrupt):
        tune.tune(CASES, measure, output)
    assert calls == CASES[:3] and len(configs.read(output)) == 3 + 1
    calls.clear()
    calls.extend([None] * 4)  # three are passed
    assert tune.tune(CASES, measure, output) == 5
    assert calls[4:] == CASES[3:]
    assert tune.tune(CASES, lambda _case: pytest.fail("measured again"), output) == 0
    assert tune.tune(CASES[:2], fake_measure, output, again=True) == 2
    table = configs.read(output)
    assert len(table) == len(CASES) + 1 and table[OP, 512, None, None] == entry(OTHER, M=512)


def test_the_deadline_is_looked_at_between_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[Tile] = []

    def microseconds(tile: Tile) -> float:
        timed.append(tile)
        return 1.0

    clock = iter(range(100))
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(clock))
    with pytest.raises(tune.TimeUp):
        tune.fastest([OTHER, Tile(32, 32, 32, 4, 3), Tile(64, 32, 32, 4, 3)], MINE, microseconds, deadline=2)
    assert timed == [MINE, OTHER]

    def measure(case: tune.Case) -> dict:
        if case == CASES[2]:
            raise tune.TimeUp
        return fake_measure(case)

    monkeypatch.undo()
    assert tune.tune(CASES, measure, tmp_path / "table.json") == 2  # what was measured stays
    assert len(configs.read(tmp_path / "table.json")) == 2


def test_no_shape_begins_after_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(clock))
    found = {"tile": entry(MINE)["tile"], "us": 1.0}
    assert tune.tune(CASES, lambda _case: found, tmp_path / "table.json", deadline=3) == 3


def test_candidates_fit_the_device_and_the_case() -> None:
    for case in (tune.Case(layout, 768, 768, M) for layout in linear_gpu.LAYOUTS for M in configs.BUCKETS):
        small, large = (tune.candidates(case, shared) for shared in (99 * 1024, 227 * 1024))
        assert set(small) <= set(large) and 10 < len(small) <= len(large) <= 80 and len(set(large)) == len(large)
        assert all(tile.block_m <= max(16, 2 * case.M) for tile in large)
    assert len(tune.candidates(CASES[0]._replace(M=2048), 227 * 1024)) > len(
        tune.candidates(CASES[0]._replace(M=2048), 99 * 1024)
    )


def test_every_untuned_large_tile_is_a_candidate() -> None:
    for layout in linear_gpu.LAYOUTS:
        assert configs.untuned(f"{layout}_linear", Tile, 8192, 90) in tune.candidates(
            tune.Case(layout, 3072, 768, 8192), 227 * 1024
        )


def test_the_report_shows_what_the_table_holds(tmp_path: Path) -> None:
    output = tmp_path / "table.json"
    tune.tune(CASES[:2], fake_measure, output)
    lines = tune.report(CASES, output).splitlines()
    assert len(lines) == 1 + 2
    assert re.fullmatch(r"ternary_linear +1 +768 +768 +5\.00 +(9|5)\.00  \d+x\d+x\d+ \dw \ds", lines[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    assert tune.main(["--layout", "ternary", "--shapes", "768,768", "--minutes", "1"]) == 2
    error = capsys.readouterr().err
    assert "CUDA device" in error and error.count("\n") == 1
    assert list(cache.iterdir()) == []


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device by name only; tiles take as long as they are high."""
    pytest.importorskip("triton")
    properties = SimpleNamespace(shared_memory_per_block_optin=227 * 1024)
    monkeypatch.setattr(tune, "INTERPRET", False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA Fake")
    monkeypatch.setattr(configs, "device_arch", lambda _device: 90)
    monkeypatch.setattr(tune, "gpu_timer", lambda case, compilers, tiles: lambda tile: 1.0 + tile.block_m)


def test_the_command_fills_the_users_table(hopper: None, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--layout", "binary", "--shapes", "70,300", "768,768", "--tokens", "2048", "64"]
    assert tune.main(arguments) == 0
    table = configs.read(cache / "sm_90.json")
    assert list(table) == [("binary_linear", M, N, K) for N, K in ((70, 300), (768, 768)) for M in (64, 2048)]
    assert {(item["device"], item["torch"]) for item in table.values()} == {("NVIDIA Fake", torch.__version__)}
    assert "4 shapes measured" in capsys.readouterr().out
    assert linear_gpu.choose_tile("binary", 2000, 70, 300, 90).block_m == 64  # the least that is tried
    assert tune.main(arguments) == 0
    assert "0 shapes measured" in capsys.readouterr().out
    assert tune.main([*arguments, "--again", "--minutes", "0"]) == 0
    assert configs.read(cache / "sm_90.json") == table


def test_the_command_begins_with_most_tokens(hopper: None, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[int, int]] = []

    def timer(case: tune.Case, *_: object):
        order.append((case.M, case.N))
        return lambda tile: 1.0

    monkeypatch.setattr(tune, "gpu_timer", timer)
    assert tune.main(["--layout", "binary", "--shapes", "70,300", "768,768", "--tokens", "64", "2048"]) == 0
    assert order == [(2048, 70), (2048, 768), (64, 70), (64, 768)]


def test_a_tile_that_fails_is_left_out_and_the_others_are_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    triton_testing = pytest.importorskip("triton.testing")
    wrong, unlaunchable, uncompilable = (Tile(16, 32, 32, 4, stages) for stages in (3, 4, 5))

    class Inputs:
        def __init__(self, case: tune.Case, device: str) -> None:
            pass

        def run(self, tile: Tile) -> None:
            pass

        def right(self, tile: Tile) -> bool:
            if tile == unlaunchable:
                raise RuntimeError("out of resource: shared memory")
            return tile != wrong

    def submit(binary: Tile) -> SimpleNamespace:
        def result() -> None:
            if binary == uncompilable:
                raise RuntimeError("PassManager::run failed")

        return SimpleNamespace(result=result)

    tiles = [MINE, wrong, unlaunchable, uncompilable, OTHER]
    recorded = iter(tiles)
    monkeypatch.setattr(tune, "Inputs", Inputs)
    monkeypatch.setattr(tune.ahead, "recording", lambda arch: contextlib.nullcontext([next(recorded)]))
    monkeypatch.setattr(triton_testing, "do_bench_cudagraph", lambda run, **_: 0.004)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    microseconds = tune.gpu_timer(CASES[0], SimpleNamespace(arch=90, submit=submit), tiles)
    assert [microseconds(tile) for tile in tiles] == [4.0, *[float("inf")] * 3, 4.0]
    told = capsys.readouterr().err
    assert all(reason in told for reason in ("wrong numbers", "out of resource", "PassManager"))


def test_the_command_refuses_tables_it_cannot_continue(
    hopper: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.json").write_text("{")
    for arguments, message in (
        (["--output", str(tmp_path / "mine.json")], "cannot be continued"),
        (["--family", "sm_80"], "NVIDIA Fake takes its tiles from sm_90 and default"),
    ):
        with pytest.raises(SystemExit, match="2"):
            tune.main(arguments)
        assert message in capsys.readouterr().err
    assert (tmp_path / "mine.json").read_text() == "{"


def test_an_interrupted_command_says_how_to_go_on(
    hopper: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_case: tune.Case, *_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "gpu_timer", interrupt)
    assert tune.main([]) == 130
    assert "same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--shapes", "768x768"], ["--shapes", "0,768"], ["--tokens", "3"]])
def test_bad_arguments_are_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        tune.main(arguments)
    assert arguments[1] in capsys.readouterr().err


@pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a GPU or TRITON_INTERPRET=1",
)
@pytest.mark.parametrize("layout", linear_gpu.LAYOUTS)
def test_triton_tiles_are_checked_before_they_are_timed(layout: str) -> None:
    inputs = tune.Inputs(tune.Case(layout, 70, 300, 16), "cuda" if torch.cuda.is_available() else "cpu")
    assert inputs.right(OTHER) and inputs.right(MINE)
    assert inputs.expected.isfinite().all()
    inputs.expected[3, 5] *= 1.001  # a unit of float16's last place
    assert not inputs.right(OTHER)
