"""`import lowbit` is cheap, can be done again, needs neither triton nor a GPU; the kernels/ folder shadows nothing."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(program: str, cwd: Path = ROOT) -> str:
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_takes_less_than_0_3_s_more_than_torch() -> None:
    program = "import torch, time; t = time.perf_counter(); import lowbit; print(time.perf_counter() - t)"
    assert statistics.median(float(run(program)) for _ in range(3)) < 0.3


def test_import_loads_neither_transformers_nor_triton() -> None:
    program = "import lowbit, sys; print([m for m in ('transformers', 'triton', 'datasets') if m in sys.modules])"
    assert run(program) == "[]"


def test_everything_public_resolves_without_triton() -> None:
    program = """
import sys
sys.modules["triton"] = None
import torch, lowbit, lowbit_kernels
for module in (lowbit, lowbit_kernels):
    for name in module.__all__:
        assert getattr(module, name) is not None
packed = lowbit.nn.PackedLinear.from_float(torch.nn.Linear(100, 30))
print(tuple(packed(torch.randn(2, 100)).shape), lowbit.backend().startswith("cpu"))
"""
    assert run(program) == "(2, 30) True"


def test_functions_are_not_shadowed_by_their_modules() -> None:
    program = """
import lowbit, transformers.modeling_utils
print(all(callable(getattr(lowbit, n)) for n in ("slim", "convert", "prepare", "quantize", "split", "compile")))
"""
    assert run(program) == "True"


def test_everything_public_can_be_the_first_that_is_imported() -> None:
    """Before transformers, whose import brings in the plug-in: it meets files that are half done."""
    program = """
import importlib, os, sys
# Once for all; not yet what lowbit waits for.
import accelerate, datasets, scipy.optimize, torch._dynamo, torch.distributed.tensor, transformers
import lowbit
assert not {*lowbit._register._REGISTER} & {*sys.modules}
for name in sorted({*lowbit._HOME.values(), "length", "distill"}):
    if not os.fork():
        try:
            importlib.import_module(f"lowbit.{name}")
        except ImportError as error:
            print(name, error, flush=True)
        os._exit(0)
    os.wait()
"""
    assert run(program) == ""


def test_transformers_imports_at_the_repository_root() -> None:
    assert run("import transformers; transformers.BertModel; print('ok')") == "ok"


# ------------------------------------------------------------------------------------ imported again in one process

AGAIN = f"""
import importlib, sys, tempfile
sys.path.insert(0, {str(ROOT / "tests")!r})
import torch
import lowbit
from helpers import batch, outputs, tiny
from transformers import AutoModelForSequenceClassification as Auto

def drop(*names):
    for name in [*sys.modules]:
        if any(name == dropped or name.startswith(dropped + ".") for dropped in names):
            del sys.modules[name]

def same(a, b):
    return len(a) == len(b) > 0 and all(map(torch.equal, a, b))

def saved_and_loaded(model):
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        lowbit.verify(folder)
        return Auto.from_pretrained(folder)

def floats():
    torch.manual_seed(7)
    return tiny()

inputs, Ternary = batch(), lowbit.TernaryConfig
def stages():
    packed, fused = lowbit.quantize(floats(), lowbit.TernaryConfig()), lowbit.quantize(floats(), lowbit.TernaryConfig())
    shorter = lowbit.set_length(floats(), lowbit.LengthConfig((0.5, 0.3)))
    return dict(packed=packed, fused=lowbit.fuse(fused), prepared=lowbit.prepare(floats(), lowbit.TernaryConfig()),
                binary=lowbit.quantize(floats(), lowbit.BinaryConfig()), shorter=shorter)
old = stages()
before = {{name: outputs(model, inputs) for name, model in old.items()}}
def still():
    return all(same(outputs(model, inputs), before[name]) for name, model in old.items())
assert still()
"""

DROPS = {
    "both": "drop('lowbit', 'lowbit_kernels')",
    "lowbit": "drop('lowbit')",
    "kernels": "drop('lowbit_kernels'); import lowbit_kernels.linear.op, lowbit_kernels.encoder.cpu",
    "the plug-in": "drop('lowbit.plugin'); import lowbit.plugin",
    "shared part of the kernels": """
drop('lowbit_kernels._ops', 'lowbit_kernels.linear')
import lowbit_kernels.linear.op
""",
    "the package itself": "del sys.modules['lowbit']",
    "reload of a package": "importlib.reload(lowbit)",
    "reload of modules of kernels": """
for name in ("configs", "native", "_ops", "linear.cpu", "linear.codes", "linear.joint", "quantize.op", "encoder.cpu",
             "weights.op"):
    importlib.reload(sys.modules["lowbit_kernels." + name])
""",
}


@pytest.mark.parametrize("how", DROPS.values(), ids=DROPS)
def test_models_of_both_imports_run_save_and_load(how: str) -> None:
    program = f"""{AGAIN}
overload = torch.ops.lowbit_kernels.joint_linear.default
{how}
import lowbit
assert still()
new = stages()
assert still()
for name, model in new.items():
    assert same(outputs(model, inputs), before[name]), name
for name in ("packed", "prepared", "binary"):
    assert same(outputs(saved_and_loaded(new[name]).eval(), inputs), before[name]), name
    assert same(outputs(saved_and_loaded(old[name]).eval(), inputs), before[name]), name
assert torch.ops.lowbit_kernels.joint_linear.default is overload
print("fine")
"""
    assert run(program).splitlines()[-1] == "fine"


def test_tracing_after_a_second_import() -> None:
    program = f"""{AGAIN}
def traced(model):
    with torch.no_grad():
        return torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs).logits
expected = traced(old["packed"])
drop("lowbit", "lowbit_kernels")
torch.compiler.reset()
import lowbit
new = stages()
for models in (old, new):
    print("old" if models is old else "new")
    assert torch.equal(traced(models["packed"]), expected)
print("fine")
"""
    assert run(program).splitlines()[-1] == "fine"


def test_training_and_autocast_after_a_second_import() -> None:
    program = f"""{AGAIN}
with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
    rounded = old["packed"](**inputs).logits
drop("lowbit", "lowbit_kernels")
import lowbit
new = stages()
for models in (old, new):
    models["prepared"].train()(**inputs).logits.sum().backward()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(models["packed"](**inputs).logits, rounded)
from lowbit_kernels import quantize_per_token
torch.library.opcheck(torch.ops.lowbit_kernels.quantize_per_token.default, (torch.randn(3, 40), 8, True))
print(quantize_per_token(torch.empty(3, 40, device="meta"), 8)[0].device)
"""
    assert run(program).splitlines()[-1] == "meta"


VERBS = """
lowbit.fuse(old["packed"])
lowbit.convert(old["prepared"])
lowbit.split(old["prepared"])
lowbit.prepare(old["packed"], lowbit.TernaryConfig())
lowbit.quantize(old["shorter"], lowbit.TernaryConfig())
lowbit.set_length(old["fused"], lowbit.LengthConfig((0.5, 0.5)))
lowbit.set_length(old["shorter"], None)
lowbit.slim(old["prepared"], 0.5)
lowbit.compile(old["fused"])
lowbit.card.model_card(old["packed"])
old["packed"].dequantize()
lowbit.prepare(floats(), Ternary())
lowbit.DistillationTrainer(model=old["prepared"], teacher=floats())
"""


def test_what_an_earlier_import_made_is_one_clear_error() -> None:
    program = f"""{AGAIN}
drop("lowbit", "lowbit_kernels")
import lowbit
for verb in {VERBS.strip().splitlines()!r}:
    try:
        eval(verb)
    except ValueError as error:
        assert "was made by an earlier import of lowbit in this process" in str(error), (verb, error)
        assert "restart Python, or make or load it again" in str(error), (verb, error)
    else:
        raise AssertionError(verb)
assert still()
copied = type(old["packed"])(old["packed"].config)  # float: whatever the configuration says of another model
lowbit.quantize(copied, lowbit.TernaryConfig())
print("fine")
"""
    assert run(program).splitlines()[-1] == "fine"


def test_implementations_are_those_of_the_last_import_and_schemas_those_of_the_first() -> None:
    program = """
import sys, torch
from lowbit_kernels import _ops
define = lambda factor, module=_ops: module.define(
    "doubled(Tensor x) -> Tensor", cpu=lambda x: factor * x, fake=lambda x: x.new_empty(len(x) * factor))
first, ones = define(2), torch.ones(3)
print(first(ones).tolist(), first(ones.to("meta")).shape[0])
del sys.modules["lowbit_kernels"], sys.modules["lowbit_kernels._ops"]
from lowbit_kernels import _ops as again
assert again is not _ops
second = define(3, again)
print(second is first, first(ones).tolist(), first(ones.to("meta")).shape[0])
try:
    again.define("doubled(Tensor x, int factor) -> Tensor", cpu=None, fake=None)
except RuntimeError as error:
    print("restart Python" in str(error), first(ones).tolist())
"""
    assert run(program).splitlines() == ["[2.0, 2.0, 2.0] 6", "True [3.0, 3.0, 3.0] 9", "True [3.0, 3.0, 3.0]"]


WATCHED = "transformers.modeling_utils"
FINDERS = (
    "[finder for finder in sys.meta_path if type(finder).__module__ == 'lowbit._register'"
    f" and finder.trigger == {WATCHED!r}]"
)
DROP = "[sys.modules.pop(name) for name in [*sys.modules] if name.split('.')[0] == 'lowbit']"
REGISTERED = """
import transformers.modeling_utils
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as configs
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as quantizers
"""


@pytest.mark.parametrize(
    "again",
    [
        f"{DROP}; import lowbit; {DROP}; import lowbit",
        "importlib.reload(lowbit._register); importlib.reload(lowbit)",
    ],
)
def test_transformers_is_watched_once_and_registers_the_last_import(again: str) -> None:
    program = f"""
import importlib, sys
import lowbit
{again}
print(len({FINDERS}))
{REGISTERED}
print(len({FINDERS}), quantizers["lowbit"] is sys.modules["lowbit"].plugin.LowbitQuantizer, "lowbit" in configs)
"""
    assert run(program).splitlines() == ["1", "0 True True"]


def test_a_dropped_package_is_not_imported_by_transformers() -> None:
    program = f"""
import sys
import lowbit
{DROP}
{REGISTERED}
print([name for name in sys.modules if name.split(".")[0] == "lowbit"], {FINDERS}, "lowbit" in quantizers)
import lowbit
print("lowbit" in quantizers)
"""
    assert run(program).splitlines() == ["[] [] False", "True"]


def test_another_packages_quantizer_of_that_name_is_not_replaced() -> None:
    program = f"""
import sys
{REGISTERED}
from transformers.quantizers import HfQuantizer, register_quantizer
theirs = register_quantizer("lowbit")(type("Theirs", (HfQuantizer,), {{"__module__": "lowbits.quantizer"}}))
try:
    import lowbit
except ValueError as error:
    print(error, quantizers["lowbit"] is theirs)
"""
    assert run(program) == "Quantizer 'lowbit' already registered True"
