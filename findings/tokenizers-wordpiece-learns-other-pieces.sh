#!/usr/bin/env bash
# WordPiece learns other pieces from the same texts each time
#
# tokenizers 0.23.3.
# WordPieceTrainer numbers the letters inside of words ("##a") as a hash table has the words, anew in each training, and joins
# pairs that are as frequent by their numbers. Two trainings on the same texts, in one process, differ in the order of their
# vocabulary, so that ids mean other pieces, and in the pieces themselves. BpeTrainer gives one vocabulary. A model that is trained
# on with a tokenizer that was learned again reads other tokens; save the tokenizer with it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3
cat > "$folder/finding.py" <<'PYTHON'
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

texts = ["lower newer wider river ever over under water letter better", "longest strongest widest newest finest"] * 3


def learned(kind, trainer):
    tokenizer = Tokenizer(kind)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(texts, trainer)
    return tuple(sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get))


for name, make in (
    ("WordPiece", lambda: (models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer(vocab_size=50, show_progress=False))),
    ("BPE", lambda: (models.BPE(), trainers.BpeTrainer(vocab_size=50, show_progress=False))),
):
    order = {learned(*make()) for _ in range(20)}
    pieces = {tuple(sorted(each)) for each in order}
    print(f"{name}: of 20 trainings on the same texts, vocabularies in more than one order: {len(order) > 1}, of other pieces: {len(pieces) > 1}")
PYTHON
cat > "$folder/expected" <<'TEXT'
WordPiece: of 20 trainings on the same texts, vocabularies in more than one order: True, of other pieces: True
BPE: of 20 trainings on the same texts, vocabularies in more than one order: False, of other pieces: False
TEXT
cd "$folder"
venv/bin/python finding.py 2> errors | tee seen || { cat errors; exit 1; }
diff expected seen && echo "as found: WordPiece learns other pieces from the same texts each time"
