#!/usr/bin/env bash
# Runs the tests marked `arithmetic` with the arithmetic of other processors: narrower vectors add in another order.
# Arguments go to pytest. PYTHON is the interpreter, by default that of .venv.
set -euo pipefail
cd "$(dirname "$0")/.."

while read -r threads torch mkl openblas numpy; do
    setting=("OMP_NUM_THREADS=$threads" "ATEN_CPU_CAPABILITY=$torch" "MKL_CBWR=$mkl"
             "OPENBLAS_CORETYPE=$openblas" "NPY_DISABLE_CPU_FEATURES=$numpy")
    [ "$torch" = own ] && setting=("OMP_NUM_THREADS=$threads")
    echo "== ${setting[*]}"
    # Threads times processes is 2, the number of cores: with more, the threads wait for each other.
    env "${setting[@]}" "${PYTHON:-.venv/bin/python}" -m pytest -q -m "arithmetic and not slow" \
        -n $((2 / threads)) --dist loadfile "$@" < /dev/null
done <<'SETTINGS'
1 default COMPATIBLE Prescott X86_V3
2 default AVX Sandybridge X86_V3
1 avx2 COMPATIBLE Haswell X86_V4
2 avx2 AVX2 Zen X86_V4
1 own
2 own
SETTINGS
