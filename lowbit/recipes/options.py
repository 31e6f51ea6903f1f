"""What a run is asked to do. Fields are the options of the examples, with their help texts."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..data.tasks import TASKS


@dataclass
class Options:
    """Options of every run on real data."""

    data_dir: str | None = field(
        default=None,
        metadata={"help": "folder with TASK/train.jsonl[.gz] and TASK/validation.jsonl[.gz]; without: Hub"},
    )
    model: str = field(default="google-bert/bert-base-uncased", metadata={"help": "float BERT: folder or Hub id"})
    output_dir: str = field(default="runs", metadata={"help": "stages, results.json; finished stages are not repeated"})
    max_train_samples: int = field(default=0, metadata={"help": "use only the first N training examples, 0 for all"})
    teacher_steps: int = field(default=500, metadata={"help": "steps of plain fine-tuning; 0: --model is fine-tuned"})
    steps: int = field(default=1000, metadata={"help": "steps of each distillation stage"})
    batch_size: int = field(default=32, metadata={"help": "of training"})
    teacher_learning_rate: float = field(default=1e-4, metadata={"help": "BERT-base: 2e-5 to 5e-5"})
    learning_rate: float = field(
        default=3e-4, metadata={"help": "of the distillation stages; published for BERT-base: 2e-5, split 5e-5"}
    )
    group_by_length: bool = field(default=True, metadata={"help": "batches of like length: half the padding"})
    bf16: bool = field(
        default=False, metadata={"help": "train and search in bfloat16 (autocast): CPUs with AMX, GPUs since Ampere"}
    )
    save_steps: int = field(default=500, metadata={"help": "checkpoint interval for resuming inside a stage, 0: none"})
    seed: int = field(default=0, metadata={"help": "of training"})


@dataclass
class GlueOptions(Options):
    """Options of runs on a GLUE task."""

    task: str = field(default="sst2", metadata={"help": "GLUE task", "choices": [*TASKS]})
    heldout: int = field(
        default=0,
        metadata={
            "help": "evaluate also on N training examples that stand inside no other; no example with any of their "
            "text is trained on, and max_train_samples counts the rest"
        },
    )


@dataclass
class BinaryOptions(GlueOptions):
    """Options of runs that end in a binary model: which one."""

    method: str = field(
        default="tws",
        metadata={"help": "tws (ternary weight splitting) or bwn (binary at once)", "choices": ["tws", "bwn"]},
    )
    width: float = field(default=0.5, metadata={"help": "tws: fraction of heads and FFN neurons; published: 0.5"})
    split_learning_rate: float | None = field(
        default=None, metadata={"help": "tws: of distilling the split model; default: --learning_rate"}
    )
    slim_steps: int = field(
        default=250, metadata={"help": "tws: distillation steps of the slimmed float model, at the teacher's rate"}
    )


@dataclass
class FileOptions(BinaryOptions):
    """Options of runs on a GLUE task or on files of the user's."""

    bits: str = field(default="ternary", metadata={"help": "ternary or binary, of a recipe also float"})
    recipe: str | None = field(default=None, metadata={"help": "name or file of a recipe"})
    text_file: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    text_columns: list[str] = field(default_factory=list)
    label_column: str = "label"
    max_length: int = 128


@dataclass
class LengthOptions:
    """Options of runs that drop tokens."""

    length_method: str = field(
        default="lengthdrop",
        metadata={
            "help": "lengthdrop: train for any lengths, then search for the best; ltp: learn from how much attention "
            "on a token stays (learned token pruning); power_bert: learn how many tokens a layer keeps",
            "choices": ["lengthdrop", "ltp", "power_bert"],
        },
    )
    length_steps: int = field(
        default=1000,
        metadata={
            "help": "steps of LengthDrop training, or of learning lengths and as many with them; 0 with lengthdrop: "
            "tokens are dropped from the model as it is"
        },
    )
    length_learning_rate: float = field(default=5e-5, metadata={"help": "of these steps"})
    length_weight: float | None = field(
        default=None, metadata={"help": "ltp, power_bert: weight of the loss for tokens kept; default: 0.1, 1e-3"}
    )
    drop_ratio: list[float] = field(
        default_factory=lambda: [0.35],
        metadata={"help": "lengthdrop: the most that a layer drops, or one such number a layer; published: 0.2"},
    )
    sub_models: int = field(default=3, metadata={"help": "lengthdrop: how many drop tokens, in each step"})
    search_samples: int = field(
        default=1000, metadata={"help": "training examples set apart, that the search scores on"}
    )
    iterations: int = field(
        default=5, metadata={"help": "lengthdrop: of the search, of 10 mutations and 10 crossovers each"}
    )
    keep: list[float] = field(
        default_factory=list, metadata={"help": "compare these lengths of yours too: the share that each layer keeps"}
    )
    cost: str = field(
        default="macs", metadata={"help": "what the search saves: macs, or latency by a table that it measures first"}
    )
    score: str = field(
        default="all", metadata={"help": "lengthdrop: importance is attention from all queries, or from [CLS] (cls)"}
    )
    ternary: bool = field(default=False, metadata={"help": "quantize to 2-2-8 before tokens are dropped, and pack"})
