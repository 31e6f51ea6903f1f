"""transformers' own generic model tests, run on lowbit's BERT: what still holds of a model once it is packed.

The tests are `ModelTesterMixin` of transformers' `tests/test_modeling_common.py`, unchanged: saving and loading,
outputs, gradients, embeddings, attention implementations. They are in transformers' source archive:

    pip download --no-binary :all: --no-deps transformers==5.23.0 && tar xf transformers-5.23.0.tar.gz
    pip install parameterized
    python -m benchmarks.transformers_suite --source transformers-5.23.0

Each test is run three times: on BERT as it is ("float": what fails here fails without lowbit), on models that
`lowbit.prepare` makes trainable in low bits right after they are constructed ("prepared"), and on models packed by
`lowbit.quantize` ("packed"). Models that a test loads from files are what the files say. Writes
benchmarks/results/transformers-suite.json and docs/transformers-suite.md.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import importlib.util
import json
import platform
import re
import subprocess
import sys
import tempfile
import types
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers.models import bert

import lowbit
from lowbit.files.atomic import write_text

from .results import Row, read, write

RESULTS = Path("benchmarks/results")
PAGE = Path("docs/transformers-suite.md")
HEADS = (
    "BertModel",
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
)
STAGES: dict[str, Callable[[Any], Any]] = {
    "float": lambda model: model,
    "prepared": lambda model: lowbit.prepare(model, lowbit.TernaryConfig()),
    "packed": lambda model: lowbit.quantize(model, lowbit.TernaryConfig()),
}
PASSED, SKIPPED = "passes", "skipped"
UNEXPLAINED = "Not explained"
# Why a test fails once lowbit has had the model: title -> (pattern of test name and outcome, explanation).
REASONS = {
    "Quantized attention is an implementation of its own": (
        r"can_set_attention_dynamically|sdpa_can_dispatch_non_composite|attention_outputs .*support",
        "Queries, keys, values and attention probabilities are quantized by the attention implementation `lowbit`, "
        'which `prepare` and loading select and which stays: "eager" and "sdpa" would leave the attention in float, '
        "another function. The tests expect the implementation that they asked for. transformers' configuration takes "
        "`output_attentions=True` beside its own implementations only; `model(..., output_attentions=True)` works.",
    ),
    "A low-bit table is no `nn.Embedding`": (
        r"model_get_set_embeddings|resize_(tokens_)?embeddings",
        "`get_input_embeddings()` returns the quantized table. It has no rows to add: resize the vocabulary of the "
        "float model, then quantize.",
    ),
    "A packed table cannot be shared with a float decoder": (
        r"tied_weights_keys|cls\.predictions\.bias .* no gradient",
        "Masked-LM heads keep a decoder of their own, and `tie_word_embeddings` is False from then on. In a BERT that "
        "is not tied `cls.predictions.bias` is unused, with lowbit or without.",
    ),
    "Files that lack tensors are refused": (
        r"reload_no_missing_tied_weights",
        "The test replaces the file by one without any weight and counts the warnings. lowbit raises "
        "`CheckpointError`.",
    ),
    "A float configuration does not describe packed weights": (
        r"from_pretrained_no_checkpoint|can_init_buffers",
        "The tests make a second model from the configuration that the first was made from, and expect the same "
        "tensors. `quantize` gives the model a configuration of its own; the first still describes a float model.",
    ),
}


class ModelTester:
    """A small BERT and inputs for it, as `ModelTesterMixin` wants them."""

    batch_size, seq_length, num_choices = 13, 7, 4
    num_hidden_layers, hidden_size, num_attention_heads = 2, 32, 4
    is_training = True

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent

    def get_config(self) -> Any:
        return bert.BertConfig(
            vocab_size=99,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=37,
            max_position_embeddings=64,
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
            type_vocab_size=16,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        shape = (self.batch_size, self.seq_length)
        mask = torch.ones(shape, dtype=torch.long)
        mask[:, self.seq_length // 2 :] = torch.randint(0, 2, (self.batch_size, 1))
        return self.get_config(), {
            "input_ids": torch.randint(99, shape),
            "token_type_ids": torch.randint(16, shape),
            "attention_mask": mask,
        }


def staged(name: str, stage: str) -> type:
    """The BERT class of this name, whose models come out of `lowbit` when a test constructs them.

    On the meta device a model is only about to be loaded, and stays as it is.
    """

    class Staged(type):
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            model = super().__call__(*args, **kwargs)
            if next(model.parameters()).is_meta:
                return model
            training = model.training
            return STAGES[stage](model).train(training)

    parent = getattr(bert, name)
    return parent if stage == "float" else Staged(name, (parent,), {"__module__": parent.__module__})


def generic_tests(source: Path) -> type:
    """`ModelTesterMixin` of an unpacked source archive.

    Raises:
        FileNotFoundError: not such a folder.
        ValueError: of another version than the transformers installed.
    """
    path = source / "tests/test_modeling_common.py"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; --source takes transformers' unpacked source archive (see --help)")
    version = re.search(r"^Version: (\S+)", (source / "PKG-INFO").read_text(), re.MULTILINE)
    if version is None or version[1] != transformers.__version__:
        raise ValueError(
            f"{source} holds transformers {version and version[1]}, installed is {transformers.__version__}; "
            "the tests must be of the same version"
        )
    # The archive leaves out the tests' subfolders; of these two only the base classes of other mixins are wanted.
    package = types.ModuleType("transformers_tests")
    package.__path__ = [str(path.parent)]
    exporters, generation = types.ModuleType("test_export"), types.ModuleType("test_utils")
    exporters.ExportTesterMixin = type("ExportTesterMixin", (), {})  # type: ignore[attr-defined]
    generation.GenerationTesterMixin = type("GenerationTesterMixin", (), {})  # type: ignore[attr-defined]
    sys.modules["transformers_tests"] = package
    sys.modules["transformers_tests.exporters.test_export"] = exporters
    sys.modules["transformers_tests.generation.test_utils"] = generation
    return importlib.import_module("transformers_tests.test_modeling_common").ModelTesterMixin


def bert_tests(source: Path, stage: str) -> type[unittest.TestCase]:
    """The generic tests on all BERT heads at one stage."""
    classes = tuple(staged(name, stage) for name in HEADS)

    class BertModelTest(generic_tests(source), unittest.TestCase):  # type: ignore[misc]
        all_model_classes = classes

        def setUp(self) -> None:
            torch.manual_seed(0)
            self.model_tester = ModelTester(self)

        def _prepare_for_class(self, inputs_dict: Any, model_class: type, return_labels: bool = False) -> Any:
            inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
            if return_labels and model_class.__name__ == "BertForPreTraining":
                inputs["labels"] = torch.zeros_like(inputs["input_ids"])
                inputs["next_sentence_label"] = torch.zeros(self.model_tester.batch_size, dtype=torch.long)
            return inputs

    return BertModelTest


class Outcomes(unittest.TestResult):
    """One line a test: PASSED, "skipped: ...", or the exception."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, str] = {}

    def addSuccess(self, test: unittest.TestCase) -> None:
        self._note(test, PASSED)

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self._note(test, f"{SKIPPED}: {reason}")

    def addError(self, test: unittest.TestCase, error: Any) -> None:
        kind, value, _ = error
        line = next((text.strip() for text in str(value).splitlines() if text.strip()), "")
        # `pytest.skip` is an exception of its own to unittest.
        self._note(test, f"{SKIPPED}: {line}" if kind.__name__ == "Skipped" else f"{kind.__name__}: {line}"[:300])

    addFailure = addError

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, error: Any) -> None:
        if error is not None:
            self.addError(test, error)

    def _note(self, test: unittest.TestCase, line: str) -> None:
        # Of a test's parts (one a head), the first that fails counts, then one that is skipped.
        name = test.id().split()[0].split(".")[-1]
        if self.lines.get(name, PASSED).startswith((PASSED, SKIPPED)):
            self.lines[name] = line if not line.startswith((PASSED, SKIPPED)) else self.lines.get(name, line)


def run(source: Path, stage: str, wanted: list[str]) -> dict[str, str]:
    """Outcome of each generic test whose name is one of `wanted` (none: of all)."""
    case = bert_tests(source, stage)
    names = [name for name in unittest.TestLoader().getTestCaseNames(case) if not wanted or name in wanted]
    outcomes = Outcomes()
    for name in names:
        case(name).run(outcomes)
    return outcomes.lines


def run_apart(source: Path, stage: str, wanted: list[str]) -> dict[str, str]:
    """`run` in a process of its own: the tests patch transformers."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outcomes.json"
        command = [sys.executable, "-m", "benchmarks.transformers_suite", "--source", str(source), "--stage", stage]
        done = subprocess.run(
            [*command, "--out", str(path), "--only", *wanted],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"the {stage} tests ended with {done.returncode}: ...{done.stdout[-2000:]}")
        return json.loads(path.read_text())


def explained(test: str, line: str) -> str:
    """The key of `REASONS` for a test that fails once lowbit has had the model."""
    return next((title for title, (pattern, _) in REASONS.items() if re.search(pattern, f"{test} {line}")), UNEXPLAINED)


def grouped(outcomes: dict[str, dict[str, str]]) -> dict[str, dict[str, Row]]:
    """Outcomes by stage and test -> the results of a report: one case a reason, one row a test."""
    cases: dict[str, dict[str, Row]] = collections.defaultdict(dict)
    for test in next(iter(outcomes.values())):
        lines = {stage: outcomes[stage].get(test, "not run") for stage in STAGES}
        failures = [line for line in lines.values() if not line.startswith((PASSED, SKIPPED))]
        if not failures:
            skip = next((line for line in lines.values() if line.startswith(SKIPPED)), None)
            case = PASSED if skip is None else f"{SKIPPED}: {_general(skip)}"
        elif not lines["float"].startswith((PASSED, SKIPPED)):
            case = "fails without lowbit too"
        else:
            case = explained(test, failures[0])
        # Folders of temporary files differ from run to run.
        cases[case][test] = {stage: re.sub(r"/tmp/\w+/|\S*/tmp\w+/", "", line) for stage, line in lines.items()}
    return dict(cases)


def _general(skip: str) -> str:
    """What transformers says of a skipped test, without the name of the class."""
    return re.sub(r"<class '[\w.]+'>|\bBert\w+( class)?", "the model", skip.removeprefix(f"{SKIPPED}: ")).rstrip(".")


def render(report: dict[str, Any]) -> str:
    """docs/transformers-suite.md."""
    results = report["results"]
    rows = {test: row for case in results.values() for test, row in case.items()}
    lines = [
        "# transformers' own tests",
        "",
        f"{report['model']}. {report['method']} Machine: "
        + ", ".join(f"{key} {value}" for key, value in report["machine"].items())
        + ". How to repeat it: `python -m benchmarks.transformers_suite --help`.",
        "",
        "| models | pass | fail | skipped by transformers |",
        "| --- | --- | --- | --- |",
    ]
    for stage in STAGES:
        kinds = collections.Counter(_kind(row[stage]) for row in rows.values())
        lines.append(f"| {stage} | {kinds[PASSED]} | {kinds['fails']} | {kinds[SKIPPED]} |")
    lines += ["", "## What differs, and why", ""]
    for case in [*REASONS, UNEXPLAINED, "fails without lowbit too"]:
        if case not in results:
            continue
        lines += [f"### {case}", "", REASONS[case][1] if case in REASONS else "", ""]
        lines += [f"| test | {' | '.join(STAGES)} |", f"| --- |{' --- |' * len(STAGES)}"]
        for test, row in results[case].items():
            lines.append(f"| `{test}` | {' | '.join(_cell(row[stage]) for stage in STAGES)} |")
        lines.append("")
    lines += ["## Skipped by transformers", "", "| transformers says | tests |", "| --- | --- |"]
    for case, tests in sorted(results.items(), key=lambda item: -len(item[1])):
        if case.startswith(SKIPPED):
            names = ", ".join(f"`{test}`{_only(row)}" for test, row in tests.items())
            lines.append(f"| {_cell(case.removeprefix(f'{SKIPPED}: '))} | {names} |")
    lines += ["", "## Pass at every stage", "", ", ".join(f"`{test}`" for test in results.get(PASSED, {})), ""]
    return "\n".join(lines)


def _only(row: Row) -> str:
    """The stages at which a test is skipped, where it is not at all."""
    stages = [stage for stage in STAGES if str(row[stage]).startswith(SKIPPED)]
    return "" if len(stages) == len(STAGES) else f" ({', '.join(stages)} only)"


def _kind(line: str) -> str:
    return next((kind for kind in (PASSED, SKIPPED) if line.startswith(kind)), "fails")


def _cell(line: str) -> str:
    return line.replace("|", "\\|").replace("<", "&lt;")[:160]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="transformers' unpacked source archive; default: render only")
    parser.add_argument("--only", nargs="*", default=[], help="names of tests, to print; nothing is written then")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        options.out.write_text(json.dumps(run(options.source, options.stage, options.only)))
        return
    if options.source:
        generic_tests(options.source)  # a wrong folder is refused before anything runs
        outcomes = {stage: run_apart(options.source, stage, options.only) for stage in tqdm(STAGES)}
        report = {
            "suite": "transformers-suite",
            "model": f"`ModelTesterMixin` of transformers {transformers.__version__} on {len(HEADS)} BERT classes",
            "machine": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "method": "A test goes through all classes and fails with the first that fails; the seed is fixed.",
            "results": grouped(outcomes),
        }
        if options.only:
            print(render(report))
            return
        write(report, RESULTS)
    write_text(PAGE, render(read(RESULTS / "transformers-suite.json")))
    print(f"{PAGE} written")


if __name__ == "__main__":
    main()
