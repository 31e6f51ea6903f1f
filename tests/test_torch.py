"""What PyTorch users do with their models: compile whole ones, autocast, copy, pickle, checkpoint, replicate."""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

import lowbit
from helpers import batch, outputs, outputs_by_module, tiny

STAGES = ("float", "prepared", "prepared pair", "ternary", "binary", "pair", "fused")


def made(stage: str, **changes: object) -> torch.nn.Module:
    """A tiny model at a stage; one layer, no dropout."""
    model = tiny(num_hidden_layers=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **changes)
    if stage == "float":
        model.set_attn_implementation("lowbit")
        return model
    model = lowbit.prepare(model, lowbit.BinaryConfig() if stage == "binary" else lowbit.TernaryConfig())
    if "pair" in stage:
        model = lowbit.split(model)
    return model if stage.startswith("prepared") else lowbit.convert(model, fused=stage == "fused")


def one_graph(model: torch.nn.Module, **options: object) -> torch.nn.Module:
    """The model traced as a whole by Dynamo; the graph runs as eager code, which gives the same bits."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    return torch.compile(model, backend="eager", fullgraph=True, **options)


def traced_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


# Those of one kind are traced by the same lines; what Inductor makes of them is tested in test_compile.py.
@pytest.mark.parametrize("stage", ["prepared pair", "fused"])
def test_a_whole_model_is_one_graph_for_all_shapes(stage: str) -> None:
    model = made(stage)
    compiled = one_graph(model, dynamic=True)
    # A trace does not know how much of a batch is padding: a fused model is traced by its modules.
    for rows, length in ((3, 11), (2, 24), (5, 17)):
        inputs = batch(rows=rows, length=length)
        run = outputs_by_module if stage == "fused" else outputs
        assert all(map(torch.equal, outputs(compiled, inputs), run(model, inputs)))
    assert traced_graphs() == 1


@pytest.mark.parametrize("stage", STAGES)
def test_autocast_runs_linears_in_its_dtype(stage: str) -> None:
    model, inputs = made(stage), batch()
    (expected,) = outputs(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        (got,) = outputs(model, inputs)
    assert got.dtype == torch.bfloat16
    assert not torch.equal(got.float(), expected)
    assert (got.float() - expected).norm() < 0.05 * expected.norm()  # 8 bits of mantissa, a few operations deep
    assert torch.equal(outputs(model, inputs)[0], expected)


def test_training_under_autocast_gives_float32_gradients_near_those_without() -> None:
    model, inputs = made("prepared").train(), {**batch(), "labels": torch.tensor([0, 1, 2])}
    exact = gradients(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs).loss
    model.zero_grad()
    loss.backward()
    got = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert {grad.dtype for grad in got.values()} == {torch.float32}
    flat, reference = (torch.cat([grad.flatten() for grad in all_.values()]) for all_ in (got, exact))
    assert torch.cosine_similarity(flat, reference, 0) > 0.98


def gradients(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("stage", ["prepared", "prepared pair", "ternary", "lengths"])
def test_gradient_checkpointing_changes_no_bit(stage: str) -> None:
    model = made("prepared" if stage == "lengths" else stage).train()
    if stage == "lengths":
        lowbit.set_length(model, lowbit.LengthConfig(keep=(0.5,)))
    inputs = {**batch(), "labels": torch.tensor([0, 1, 2])}
    expected = gradients(model, inputs)
    assert any(grad.any() for grad in expected.values())
    calls = []
    linear = model.base_model.encoder.layer[0].intermediate.dense
    linear.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        calls.clear()
        got = gradients(model, inputs)
        assert len(calls) == 2  # run again for the backward pass
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("stage", STAGES)
def test_inference_mode_and_copies(stage: str) -> None:
    model, inputs = made(stage), batch()
    expected = outputs(model, inputs)[0]
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, expected)
    with_gradients = model(**inputs).logits  # nothing is left behind that autograd cannot take
    assert (with_gradients - expected).norm() < 0.05 * expected.norm()  # by its modules, whose codes may be others
    file = io.BytesIO()
    torch.save(model, file)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(io.BytesIO(file.getvalue()), weights_only=False),
        copy.deepcopy(lowbit.compile(copy.deepcopy(model), backend="eager")),
        torch.nn.DataParallel(copy.deepcopy(model)),
    ]
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.zero_()
    assert not torch.equal(outputs(model, inputs)[0], expected)
    for copied in copies:
        assert torch.equal(outputs(copied, inputs)[0], expected)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize("stage", STAGES)
def test_a_state_dict_needs_no_pickle(stage: str) -> None:
    model, inputs, file = made(stage), batch(), io.BytesIO()
    torch.save(model.state_dict(), file)
    other = made(stage)
    assert not torch.equal(outputs(other, inputs)[0], outputs(model, inputs)[0])
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert torch.equal(outputs(other, inputs)[0], outputs(model, inputs)[0])


def test_loaded_under_inference_mode(tmp_path: Path) -> None:
    model, inputs = made("ternary"), batch()
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        loaded = type(model).from_pretrained(tmp_path)
        for _ in range(2):
            assert torch.equal(loaded(**inputs).logits, outputs(model, inputs)[0])
    assert torch.equal(outputs(loaded, inputs)[0], outputs(model, inputs)[0])


@pytest.mark.parametrize("stage", ["prepared", "prepared pair"])
def test_accelerate_trains_a_prepared_model_as_torch_does(stage: str) -> None:
    from accelerate import Accelerator

    plain, inputs = made(stage).train(), {**batch(), "labels": torch.tensor([0, 1, 2])}
    wrapped = copy.deepcopy(plain)
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(wrapped, torch.optim.SGD(wrapped.parameters(), lr=0.1))
    reference = torch.optim.SGD(plain.parameters(), lr=0.1)
    before = copy.deepcopy(plain.state_dict())
    for _ in range(2):
        accelerator.backward(prepared(**inputs).loss)
        plain(**inputs).loss.backward()
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
    got, expected = accelerator.unwrap_model(prepared).state_dict(), plain.state_dict()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert any(not torch.equal(before[name], expected[name]) for name in expected)
    packed = lowbit.convert(accelerator.unwrap_model(prepared)).eval()
    assert torch.equal(outputs(packed, batch())[0].isfinite(), torch.ones(3, 3, dtype=torch.bool))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_the_trainer_takes_8_bit_optimizers(tmp_path: Path) -> None:
    teacher = tiny(num_hidden_layers=1)
    student = lowbit.prepare(copy.deepcopy(teacher), lowbit.TernaryConfig())
    before = copy.deepcopy(student.state_dict())
    rows = [{**{name: value[0] for name, value in batch().items()}, "labels": torch.tensor(1)} for _ in range(4)]
    args = TrainingArguments(
        str(tmp_path), optim="adamw_bnb_8bit", learning_rate=1e-3, max_steps=2, use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = lowbit.DistillationTrainer(student, teacher=teacher, args=args, train_dataset=rows)
    trainer.train()
    states = trainer.optimizer.optimizer.state
    assert any(state["state1"].dtype == torch.uint8 for state in states.values())
    for name, weight in student.state_dict().items():
        if weight.dim() == 2 and "embeddings" not in name:  # two steps of Adam: each by the learning rate at most
            step = (weight - before[name]).abs()
            assert 0 < step.max() < 2.1e-3, name
