#!/usr/bin/env bash
# RR and nDCG of one call rank the same documents differently where scores are near
#
# ir-measures 0.4.3, pytrec-eval-terrier 0.5.11.
# ir_measures gives each measure to the provider that it likes best: RR@10 to its own code for MS MARCO, in double precision,
# nDCG@10 to trec_eval, which reads scores as float32. Scores that differ in double precision only, as probabilities of a sure
# classifier do, are ties for trec_eval, which are broken by the document's name: in one and the same result the relevant
# document is first for RR and second for nDCG. Ranks as scores, whole numbers below 2^24, mend it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ir-measures==0.4.3 pytrec-eval-terrier==0.5.11
cat > "$folder/finding.py" <<'PYTHON'
import ir_measures
from ir_measures import RR, nDCG

qrels = {"q": {"a": 1, "z": 0}}
for low, high in ((0.5, 0.6), (0.99999998, 0.99999999), (16777216.0, 16777217.0)):
    run = {"q": {"a": high, "z": low}}
    found = ir_measures.calc_aggregate([RR @ 10, nDCG @ 10], qrels, run)
    print(f"relevant {high!r} above {low!r}: RR@10 {found[RR @ 10]:.2f}, nDCG@10 {found[nDCG @ 10]:.2f}")
PYTHON
cat > "$folder/expected" <<'TEXT'
relevant 0.6 above 0.5: RR@10 1.00, nDCG@10 1.00
relevant 0.99999999 above 0.99999998: RR@10 1.00, nDCG@10 0.63
relevant 16777217.0 above 16777216.0: RR@10 1.00, nDCG@10 0.63
TEXT
cd "$folder"
venv/bin/python finding.py 2> errors | tee seen || { cat errors; exit 1; }
diff expected seen && echo "as found: RR and nDCG of one call rank the same documents differently where scores are near"
