"""Every Triton kernel compiles for the GPUs that matter without spills and with tensor cores; no GPU is needed."""

from __future__ import annotations

import dataclasses
import importlib
import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter keeps Triton from compiling", allow_module_level=True)

from lowbit_kernels import aot, configs
from lowbit_kernels.layernorm import gpu as layernorm_gpu
from lowbit_kernels.linear import gpu as linear_gpu


def case_named(label: str, arch: int) -> int:
    return [case[0] for case in linear_gpu.aot_cases(arch)].index(label)


def index_of(layout: str, M: int, arch: int = 90) -> int:
    """The case of the tile that serves M tokens on any weight."""
    return case_named(f"linear {layout} {configs.untuned(f'{layout}_linear', linear_gpu.Tile, M, arch)}", arch)


@pytest.mark.parametrize("kind", linear_gpu.LAYOUTS)
@pytest.mark.parametrize("arch", [80, 90])
def test_the_linear_multiplies_on_int8_tensor_cores_without_spilling(arch: int, kind: str) -> None:
    result = aot.compile_case("linear.gpu", index_of(kind, 16, arch), arch)
    assert result.faults() == []
    assert result.products == (({80: "IMMA", 90: "IGMMA"}[arch],),) and 0 < result.shared < 99 * 1024


def test_int8_products_of_blackwell_use_tensor_cores_of_either_generation() -> None:
    """Warp-level products with Triton 3.6 and 3.7, those of the fifth generation with later ones."""
    result = aot.compile_case("linear.gpu", index_of("ternary", 16, 100), 100)
    assert result.products == (("IMMA", "UTCIMMA"),)
    assert result.faults() == [] and result.multiplications > 0


def test_decoded_weights_stay_in_registers_on_hopper() -> None:
    """The left operand of IGMMA; through shared memory each plane would be stored first (STSM or STS)."""
    case = linear_gpu.aot_cases(90)[index_of("ternary", 16)]
    signature, constants, warps, stages = case[2], {**case[3], "HAS_ZERO": False}, case[4], case[5]
    result = aot.compile_kernel("ternary", linear_gpu._linear_kernel, signature, constants, warps, stages, 90)
    assert "PRMT" not in result.opcodes  # bytes are never taken apart
    assert "STSM" not in result.opcodes
    assert result.opcodes["LDGSTS"] > 0


def test_the_loop_is_found_and_decodes_four_weights_in_two_instructions() -> None:
    tile = configs.untuned("ternary_linear", linear_gpu.Tile, 8192, 90)
    result = aot.compile_case("linear.gpu", index_of("ternary", 8192), 90)
    assert result.loop["IGMMA"] == result.multiplications
    assert not {"PRMT", "STS", "STSM", "LDG"} & set(result.loop)
    # Each word of packed bytes a thread has holds 4 planes: mask and flip are one LOP3 each, and 3 planes are shifted.
    words = tile.block_n * tile.block_b // (128 * tile.num_warps)
    assert 4 * words <= result.loop["LOP3"] + result.loop.get("SHF", 0) <= 8 * words
    assert sum(result.loop.values()) * 32 / tile.block_b < 80  # per 128 values of K


@pytest.mark.parametrize("arch", [80, 90])
def test_the_small_kernel_multiplies_four_at_a_time_without_exchanging_data(arch: int) -> None:
    result = aot.compile_case("linear.gpu", case_named("linear ternary small, 1 tokens", arch), arch)
    assert result.faults() == [] and result.products == (("IDP",),)
    # 64 words on 32 lanes: two words a lane, 4 planes each
    assert result.loop["IDP"] == result.multiplications == 8
    assert result.loop["LDG"] == 5 and not {"BAR", "STS", "LDS", "SHFL", "PRMT"} & set(result.loop)
    assert sum(result.loop.values()) < 12 * 8  # instructions for 8 bytes


@pytest.mark.parametrize("kind", linear_gpu.LAYOUTS)
def test_a_tile_shared_by_slices_does_not_spill(kind: str) -> None:
    smallest = configs.untuned(f"{kind}_linear", linear_gpu.Tile, 16, 90)
    result = aot.compile_case("linear.gpu", case_named(f"linear {kind} {smallest}, sliced", 90), 90)
    assert result.faults() == []
    assert result.opcodes["ATOMG"] > 0  # additions and the count of arrivals


@pytest.mark.parametrize("module", aot.MODULES)
def test_one_kernel_of_every_module_compiles(module: str) -> None:
    assert aot.compile_case(module, 0, 90).faults() == []


def test_every_kernel_of_every_module_is_in_the_table() -> None:
    for name in aot.MODULES:
        module = importlib.import_module(f"lowbit_kernels.{name}")
        kernels = {attribute for attribute in vars(module) if attribute.endswith("_kernel")}
        listed = {case[1].fn.__name__ for case in module.aot_cases(90)}
        assert listed == kernels


def test_faults_are_found_and_named() -> None:
    good = aot.Compiled(
        "kernel",
        90,
        registers=64,
        spilled=0,
        shared=1024,
        products=(("HGMMA",), ("IGMMA",)),
        opcodes={"HGMMA": 4, "IGMMA": 2},
        loop={},
    )
    assert good.multiplications == 6
    faults = {
        "": good,
        "spills 8 bytes": dataclasses.replace(good, spilled=8),
        "shared memory 102400 exceeds 101376": dataclasses.replace(good, arch=89, shared=100 * 1024),
        "no IGMMA instruction": dataclasses.replace(good, opcodes={"HGMMA": 4}),
        "no HGMMA instruction; no IGMMA instruction": dataclasses.replace(good, opcodes={}),
        "no IDP instruction": dataclasses.replace(good, products=(("IDP",),)),
        "no IMMA or UTCIMMA instruction": dataclasses.replace(good, products=(("IMMA", "UTCIMMA"),)),
    }
    for text, result in faults.items():
        assert "; ".join(result.faults()) == text
        assert text in aot.report([result])
    assert dataclasses.replace(good, products=(), opcodes={}).faults() == []
    for opcode in ("IMMA", "UTCIMMA"):  # one of them is enough
        either = dataclasses.replace(good, products=(("IMMA", "UTCIMMA"),), opcodes={opcode: 3})
        assert either.faults() == [] and either.multiplications == 3


@pytest.mark.parametrize("fused", [False, True])
def test_constants_that_are_no_arguments_are_options(fused: bool) -> None:
    case = layernorm_gpu.aot_cases(90)[0]
    assert case[3]["enable_fp_fusion"] is layernorm_gpu.row_tile(1024)["enable_fp_fusion"] is False
    label, kernel, signature, constants, warps, stages = case
    options = {**constants, "enable_fp_fusion": fused}
    assert ("FFMA" in aot.compile_kernel(label, kernel, signature, options, warps, stages, 90).opcodes) == fused


def test_known_spills_pass_with_that_version_only_and_are_shown() -> None:
    label = "gradient of key *fp32 D=64 up to 128, 8 bits"
    spilling = aot.Compiled(label, 90, registers=255, spilled=168, shared=0, products=(), opcodes={}, loop={})
    assert spilling.faults() == ["spills 168 bytes"]
    known = dataclasses.replace(spilling, known=aot.known_spill(label, 90, "3.6.0"))
    assert known.faults() == [] and "168" in aot.report([known]) and "known" in aot.report([known])
    assert dataclasses.replace(known, spilled=176).faults() == ["spills 176 bytes"]
    for other in (("linear ternary", 90, "3.6.0"), (label, 120, "3.6.0"), (label, 90, "3.7.1"), (label, 90, "3.8.0")):
        assert aot.known_spill(*other) == 0


def test_a_spilling_kernel_is_caught() -> None:
    case = linear_gpu.aot_cases(90)[index_of("split", 8192)]
    constants = {**case[3], "BLOCK_M": 256, "BLOCK_N": 128}  # more accumulators than a block of 4 warps has registers
    result = aot.compile_kernel("too large", linear_gpu._linear_kernel, case[2], constants, 4, 2, 80)
    assert any("spills" in fault for fault in result.faults())


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset"):
        aot.compile_case("linear.gpu", 0, 90)


def test_the_command_exits_with_0_and_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert aot.main(["--arch", "90", "--only", "embedding"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + len(aot.cases([90], "embedding")) > 1
