"""Exported programs and packages hold torch's own ops only, and compute what the packed model does."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lowbit
import lowbit_kernels
from helpers import batch, outputs_by_module, tiny
from lowbit.deploy import exporting
from lowbit_kernels.decompositions import TABLE
from lowbit_kernels.embedding import op as embedding_op
from lowbit_kernels.linear import cpu as linear_cpu

SHAPES = ((1, 1), (1, 17), (3, 11), (5, 40))


def packed() -> torch.nn.Module:
    return lowbit.quantize(tiny(num_hidden_layers=1), lowbit.TernaryConfig())


def inputs(rows: int, length: int) -> dict[str, torch.Tensor]:
    given = batch(rows=rows, length=length)
    given["attention_mask"][:, 0] = 1
    return {**given, "token_type_ids": torch.randint(0, 2, (rows, length))}


def logits(model: torch.nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**given).logits


@pytest.mark.parametrize("layout", ["ternary", "binary", "split"])
@pytest.mark.parametrize("zero_point", [False, True])
def test_the_product_has_the_same_bits_in_torchs_own_ops(layout: str, zero_point: bool) -> None:
    M, K, sizes = 5, 150, (7, 9)
    planes = 2 if layout == "split" else 1
    codes = [torch.randint(0, 2, (planes, N, K), dtype=torch.int8) * 2 - 1 for N in sizes]
    packs = {
        "ternary": lambda c: lowbit_kernels.pack_ternary(c[0] * torch.randint(0, 2, c[0].shape, dtype=torch.int8)),
        "binary": lambda c: lowbit_kernels.pack_binary(c[0]),
        "split": lambda c: lowbit_kernels.pack_split(*c),
    }
    given = [packs[layout](each) for each in codes]
    scales = [torch.rand(planes, N).squeeze(0) if planes == 1 else torch.rand(2, N) for N in sizes]
    scales[1] = scales[1][..., :1]  # one a tensor
    x, zero = torch.randint(-128, 128, (M, K), dtype=torch.int8), torch.randint(-9, 9, (M,), dtype=torch.int32)
    arguments = (x, given, scales, zero if zero_point else None, layout)
    assert torch.equal(TABLE[linear_cpu.scaled_op](*arguments), linear_cpu.scaled_op(*arguments))


@pytest.mark.parametrize("bits", [1, 2, 8, "split"])
def test_the_embedding_has_the_same_bits_in_torchs_own_ops(bits: int | str) -> None:
    width = {1: 32, 2: 64, 8: 150, "split": 64}[bits]
    high = 170 if bits == 2 else 127  # a byte of ternary codes 2, 2, 2, 2 is 170
    table = torch.randint(0, high, (20, width), dtype=torch.int8 if bits == 8 else torch.uint8)
    scale = torch.rand(2, 20) if bits == "split" else torch.rand(20)
    arguments = torch.randint(0, 20, (6,)), table, scale, 2 if bits == "split" else bits, 150, torch.float32
    assert torch.equal(TABLE[embedding_op.embedding_op](*arguments), embedding_op.embedding_op(*arguments))


def test_a_program_of_torchs_own_ops_for_any_batch_and_length() -> None:
    model = packed()
    program = exporting.program(lowbit.fuse(copy.deepcopy(model)))
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert not [target for target in targets if "lowbit" in str(target)]
    run = program.module()
    for rows, length in SHAPES:
        given = inputs(rows, length)
        assert torch.equal(run(**given)["logits"], outputs_by_module(model, given)[0])


def test_what_cannot_be_exported_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str, model: torch.nn.Module, path: str = "model.pt2") -> None:
        with pytest.raises(ValueError, match=message):
            lowbit.export(model, tmp_path / path)

    refused("takes a packed model, this one is float", tiny())
    refused("takes a packed model, this one is prepared", lowbit.prepare(tiny(), lowbit.TernaryConfig()))
    refused("in eval mode", packed().train())
    refused("ends in '.pt2'", packed(), "model.bin")
    refused("drops tokens", lowbit.set_length(packed(), lowbit.LengthConfig(keep=(0.5,))))
    refused("compiles for the CPU", packed().to("meta"))
    refused("reads \\[B, choices, S\\]", lowbit.quantize(tiny("BertForMultipleChoice"), lowbit.TernaryConfig()))
    with pytest.raises(FileNotFoundError, match="is no folder"):
        lowbit.export(packed(), tmp_path / "none" / "model.pt2")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(RuntimeError, match="needs a C\\+\\+ compiler"):
        lowbit.export(packed(), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif("LOWBIT_AOTI" not in os.environ, reason="compiles for minutes; make aoti")
def test_a_package_runs_in_a_process_without_lowbit(tmp_path: Path) -> None:
    model, path = packed(), tmp_path / "model.pt2"
    batches = [inputs(*shape) for shape in SHAPES]
    torch.save([(given, logits(model, given)) for given in batches], tmp_path / "expected.pt")
    assert lowbit.export(model, path) == path
    assert sorted(each.name for each in tmp_path.iterdir()) == ["expected.pt", "model.pt2"]
    code = f"""
import sys, torch
run = torch._inductor.aoti_load_package({str(path)!r})
for given, expected in torch.load({str(tmp_path / "expected.pt")!r}):
    got = run(**given)["logits"]
    assert (got - expected).norm() < 0.02 * expected.norm(), (got, expected)
assert not {{"lowbit", "lowbit_kernels", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
