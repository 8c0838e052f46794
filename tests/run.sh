#!/usr/bin/env bash
# Set up the environment and run the tests; arguments go to pytest.
#
#   bash tests/run.sh
#   bash tests/run.sh tests/losses -k space
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/environment.sh"
cd "$root"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the tensors are small: threads cost more than they bring
exec "${TOKENKIT_VENV:-$root/.venv}/bin/python" -m pytest "$@"
