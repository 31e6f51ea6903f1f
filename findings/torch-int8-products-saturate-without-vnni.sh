#!/usr/bin/env bash
# torch._int_mm and oneDNN's quantized linear give wrong sums of int8 products on x86 processors without VNNI
#
# torch 2.13.0, its oneDNN. Without VNNI (most desktops up to 2021; here ONEDNN_MAX_CPU_ISA takes it away) oneDNN adds pairs of
# products in 16 bits, which saturate where weights use all of their 8 bits. Nothing warns: int32 results are simply others.
# Weights of 7 bits (-64..63) are right everywhere, which is what `reduce_range` of torch.ao is for; torch._int_mm, by which
# libraries of 8-bit linears multiply, has no such option. With AVX2 both ops are wrong, with AVX-512 without VNNI torch._int_mm.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat > "$folder/finding.py" <<'PYTHON'
import os
import torch

torch.manual_seed(0)
x = torch.randint(-128, 128, (32, 384), dtype=torch.int8)
for bits in (8, 7):
    most = 2 ** (bits - 1)
    w = torch.randint(-most, most, (48, 384), dtype=torch.int8)
    exact = x.long() @ w.long().T
    int_mm = torch._int_mm(x, w.T.contiguous())
    packed = torch.ops.onednn.qlinear_prepack(w, None)
    qlinear = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 0, packed, torch.ones(48), torch.zeros(48, dtype=torch.int64), None, 1.0, 0, torch.float32, "none", [], ""
    )
    right = [torch.equal(y.long(), exact) for y in (int_mm, qlinear)]
    print(f"{os.environ['ONEDNN_MAX_CPU_ISA']}, weights of {bits} bits: int_mm right {right[0]}, qlinear right {right[1]}")
PYTHON
cat > "$folder/expected" <<'TEXT'
AVX2, weights of 8 bits: int_mm right False, qlinear right False
AVX2, weights of 7 bits: int_mm right True, qlinear right True
AVX512_CORE, weights of 8 bits: int_mm right False, qlinear right True
AVX512_CORE, weights of 7 bits: int_mm right True, qlinear right True
TEXT
cd "$folder"
for isa in AVX2 AVX512_CORE; do
  ONEDNN_MAX_CPU_ISA=$isa venv/bin/python finding.py 2>> errors >> seen || { cat errors; exit 1; }
done
cat seen
diff expected seen && echo "as found: int8 products of large codes are wrong without VNNI"
