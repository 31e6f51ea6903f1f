"""Speed against accuracy of models that drop tokens, from finished runs of the dynamic length examples.

    python -m benchmarks.lengths runs/length runs/squad --results benchmarks/results

One case a run, one row a budget, as `lowbit.recipes.lengths.compare` measured it; what is said of the machine is of
this one, so run it where the examples ran.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from . import cpu, results

METHODS = {
    "lengthdrop": "{0} steps of LengthDrop",
    "ltp": "{0} + {0} steps of learned token pruning",
    "power_bert": "{0} + {0} steps of PoWER-BERT",
}
ROWS = ("without lengths", "all tokens", "given", "1.5x fewer", "2x fewer", "3x fewer", "learned", "before")


def case(folder: Path) -> tuple[str, dict[str, results.Row]]:
    """What was run, in words, and its rows.

    Raises:
        ValueError: a folder without a finished run of a dynamic length example.
    """
    try:
        options = json.loads((folder / "options.json").read_text())
        found = json.loads((folder / "results.json").read_text())
        rows = {name: found[name] for name in ROWS if name in found}
        rows = {name: {k: v for k, v in row.items() if k != "length_config"} for name, row in rows.items()}
        what = "ternary 2-2-8" if options["ternary"] else "float"
        words = [options.get("task", "SQuAD v1.1"), Path(options["model"]).name, what]
        words.append(METHODS[options.get("length_method", "lengthdrop")].format(options["length_steps"]))
        words.append(f"{options['max_train_samples'] or 'all'} examples")
        if share := options.get("other_paragraphs"):
            words.append(f"{share:.0%} of the questions put to other paragraphs")
        if not rows:
            raise KeyError(ROWS[1])
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} holds no finished run of a dynamic length example ({error!r})") from error
    return ", ".join(words), rows


def report(folders: list[Path]) -> dict[str, Any]:
    return {
        "suite": "cpu-lengths",
        "model": "layers that drop tokens: accuracy and time by budget",
        "machine": cpu.machine(),
        "method": (
            "configurations learned, or searched on training examples set apart; 'before' is the model that was then "
            "trained to drop tokens; metrics on validation examples; "
            "milliseconds a batch of 8 validation examples in a fixed random order, median of 3 turns of each batch, "
            "mean of 40; "
            "'without lengths' runs as it did before, a float model with padding, 'all tokens' without; times fewer "
            "counts no padding, fewer than padded that of the first; as fast is beside the first, by dropping beside "
            "the second"
        ),
        "results": dict(map(case, folders)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="--output_dir of finished examples")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    print(results.write(report(arguments.runs), arguments.results))


if __name__ == "__main__":
    main()
