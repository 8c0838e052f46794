#!/usr/bin/env bash
# Make the environment and run the main job end to end, without network or GPU after the installation.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/environment.sh"
export HF_HUB_OFFLINE=1
exec "${TOKENKIT_VENV:-$root/.venv}/bin/python" "$root/examples/quickstart.py" "$@"
