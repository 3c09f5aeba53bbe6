#!/usr/bin/env bash
# Runs the tests of kernels, threads, file formats and shared memory on an emulated Cortex-A76.
#
# Exits 0 only if they ran on the NEON kernels and passed. Arguments, if any, go to pytest instead of the
# list of tests. The first run, and each after a change of a kernel, compiles them under emulation: minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
tests/aarch64/prepare.sh

PYTHON=${PYTHON:-.venv/bin/python}
DIR=${STERNA_AARCH64_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/sterna-aarch64}
TESTS=("$@")
if [ $# -eq 0 ]; then
  TESTS=(tests/workers/kernels tests/workers/checkpoint tests/workers/test_selftest.py tests/shm)
  TESTS+=(tests/scheduler/decoder/test_crew.py) # threads, futexes and atomics
  # These compare all targets of one machine; same_bits does that below, across machines.
  TESTS+=(--ignore tests/workers/kernels/test_targets.py)
  without="test_all_targets_give and not test_bytes_are_multiplied"
  # qemu takes RLIMIT_AS for its own and never lets an emulated program run into it.
  # Whole models take minutes under emulation; name tests/workers/kernels/test_formats.py to run them.
  TESTS+=(-k "not $without and not RLIMIT_AS and not test_a_model and not test_generated_tokens")
fi

export PYTHONPATH="$PWD/src" PYTHONDONTWRITEBYTECODE=1 NUMBA_OPT=2
unset STERNA_KERNEL_TARGET NUMBA_CPU_NAME NUMBA_CPU_FEATURES # the Pi is recognised, not assumed
emulated=(env NUMBA_CACHE_DIR="$DIR/kernels" "$DIR/env/bin/python")
mkdir -p "$DIR/kernels"
find "$DIR/kernels" -mindepth 1 -maxdepth 1 -mtime +7 -exec rm -rf {} +

start=$SECONDS
target=$("${emulated[@]}" -c 'from sterna.workers.kernels.target import TARGET; print(TARGET)')
if [ "$target" != neon ]; then
  echo "aarch64 suite: the emulated Pi chose the kernels for $target instead of neon" >&2
  exit 1
fi
"${emulated[@]}" -m pytest -q -p no:cacheprovider --timeout 1200 -m "not slow and not bench" "${TESTS[@]}"
middle=$SECONDS
echo "aarch64 suite: the tests took $((middle - start)) s"
"${emulated[@]}" tests/aarch64/same_bits.py >"$DIR/bits.arm"
"$PYTHON" tests/aarch64/same_bits.py >"$DIR/bits.host"
"$PYTHON" tests/aarch64/same_bits.py --compare "$DIR/bits.host" "$DIR/bits.arm"
echo "aarch64 suite: comparing the bits took $((SECONDS - middle)) s"
