#!/usr/bin/env bash
# Run the tests under other versions of Python and torch, each in an environment of its own (.venvs/, 3 GB each).
#
#   bash tests/versions.sh                      3.11, 3.12 and 3.13, and 3.13 with the newest torch that installs
#   bash tests/versions.sh --fast 3.13:newest   only what a version is likely to break, only there
#
# A Python is looked for as python3.13 and under pyenv. One that is absent is named; absent altogether, the call fails.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
fast=()
if [ "${1:-}" = --fast ]; then
  shift
  fast=(tests/data/test_collate.py tests/losses/test_vectors.py tests/losses/test_dropin.py tests/run/test_checkpoint.py
    tests/config/test_config.py tests/run/test_metrics.py tests/test_platforms.py tests/run/test_folder.py
    tests/tokenization/test_tokenizer.py)
fi
wanted=("$@")
[ "${#wanted[@]}" -gt 0 ] || wanted=(3.11 3.12 3.13 3.13:newest)

find_python() {
  local candidate
  for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1"*/bin/python; do
    if "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

ran=0
mkdir -p .venvs
for name in "${wanted[@]}"; do
  if ! python=$(find_python "${name%%:*}"); then
    echo "versions: no Python ${name%%:*} here: $name did not run" >&2
    continue
  fi
  export TOKENKIT_VENV="$root/.venvs/${name/:/-}" TOKENKIT_CONSTRAINTS="$root/constraints.txt"
  if [ "$name" != "${name%:newest}" ]; then
    TOKENKIT_CONSTRAINTS="$root/.venvs/newest.txt"
    grep -vE '^(torch|triton)==' constraints.txt >"$TOKENKIT_CONSTRAINTS"
  fi
  PYTHON=$python bash environment.sh
  echo "== $name: $("$TOKENKIT_VENV/bin/python" -c \
    'import platform, torch, triton; print("Python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__)')"
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 \
    "$TOKENKIT_VENV/bin/python" -m pytest -n 2 --dist loadfile "${fast[@]}"
  ran=$((ran + 1))
done
[ "$ran" -gt 0 ] || { echo "versions: none of ${wanted[*]} is installed" >&2; exit 1; }
