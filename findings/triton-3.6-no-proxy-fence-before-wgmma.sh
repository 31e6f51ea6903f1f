#!/usr/bin/env bash
# Triton 3.6.0 puts no fence.proxy.async between its cp.async copies and wgmma on sm_90; 3.7.1 does
#
# triton 3.6.0 and 3.7.1 (torch is not used).
# A product whose operands come by a software pipeline is copied to shared memory with cp.async, which writes by the generic
# proxy, and read by wgmma through the async proxy. The PTX ISA (memory consistency, async proxy) asks for a
# fence.proxy.async between the two. 3.6.0 has the barrier and wgmma.fence only, 3.7.1 one such fence in the loop. Whether a
# device ever computes something else was not seen: there was none to try. Where sums of a pipelined kernel are wrong on
# Hopper with 3.6, look here first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/finding.py" <<'PYTHON'
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(a, b, out, K):
    i, j, k = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :], tl.arange(0, 64)
    sums = tl.zeros([64, 64], tl.float32)
    for start in range(0, K, 64):
        x = tl.load(a + i * K + start + k[None, :])
        y = tl.load(b + j * K + start + k[:, None])
        sums += tl.dot(x, y)
    tl.store(out + i * 64 + j, sums)


source = ASTSource(product, signature={"a": "*fp16", "b": "*fp16", "out": "*fp32", "K": "i32"}, constexprs={})
source.attrs = {(i,): [["tt.divisibility", 16]] for i in range(4)}
ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_stages": 3}).asm["ptx"]
print(triton.__version__, {name: name in ptx for name in ("cp.async", "wgmma.mma_async", "fence.proxy.async")})
PYTHON
cat > "$folder/expected" <<'TEXT'
3.6.0 {'cp.async': True, 'wgmma.mma_async': True, 'fence.proxy.async': False}
3.7.1 {'cp.async': True, 'wgmma.mma_async': True, 'fence.proxy.async': True}
TEXT
for version in 3.6.0 3.7.1; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet --disable-pip-version-check "triton==$version"
  TRITON_CACHE_DIR="$folder/cache" "$folder/$version/bin/python" "$folder/finding.py"
done | tee "$folder/seen"
diff "$folder/expected" "$folder/seen"
