#!/usr/bin/env bash
# The tests that need torchao (quantised exports, float8), in an environment of its own over the main one (.venvs/quantised): it slows every import of peft.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
main="${TOKENKIT_VENV:-$root/.venv}/bin/python"
venv="$root/.venvs/quantised"
pin=$(grep '^torchao==' constraints.txt)
if ! "$venv/bin/python" -c 'import importlib.metadata as m, sys; sys.exit(m.version("torchao") != sys.argv[1])' "${pin#*==}" 2>/dev/null; then
  rm -rf "$venv"
  "$main" -m venv --without-pip "$venv"
  below=$("$main" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  echo "$below" >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth"
  "$main" -m pip --python "$venv/bin/python" install --quiet --disable-pip-version-check --no-deps "$pin"
fi
PYTHONPATH="$root" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} \
  exec "$venv/bin/python" -m pytest tests/export/test_quantised.py tests/models/test_float8.py "$@"
