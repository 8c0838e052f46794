#!/usr/bin/env bash
# Make .venv beside this file, with tokenkit and everything that its tests need; do nothing where it is up to date.
#
#   bash environment.sh                        make or refresh it
#   TOKENKIT_VENV=elsewhere bash environment.sh
#   PYTHON=python3.12 bash environment.sh      with another Python
#   TOKENKIT_CONSTRAINTS=file bash environment.sh   at other versions than those of constraints.txt
#
# The first call needs a package index; later calls need nothing. Two callers at once wait for each other.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${TOKENKIT_VENV:-$root/.venv}
constraints=${TOKENKIT_CONSTRAINTS:-$root/constraints.txt}
extras=train,track,eval,export,dev,docs
say() { printf 'environment: %s\n' "$*" >&2; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  local found
  found=$("${PYTHON:-python3}" --version 2>/dev/null) || found="no ${PYTHON:-python3}"
  say "Python 3.11 or newer is needed; found: $found"
  say "install one, or name it: PYTHON=/path/to/python3.11 bash environment.sh"
  return 1
}

# What decides the content of the environment. A change of any of it makes the next call install again.
wanted() {
  printf '%s\n' "$root" "$extras"
  cat "$constraints" "$root/setup.py"
}

# The stamp is written last, so that an interrupted installation is repeated. It holds text, not a hash:
# `cmp` is on every machine.
is_current() {
  [ -x "$venv/bin/python" ] && wanted | cmp -s - "$venv/tokenkit.stamp"
}

if is_current; then
  exit 0
fi

[ -x "$venv/bin/python" ] || python=$(find_python)
mkdir -p "$(dirname "$venv")"
if command -v flock >/dev/null; then
  exec 9>"$venv.lock"
  flock -n 9 || { say "another call is installing; waiting for it"; flock 9; }
  if is_current; then
    exit 0
  fi
fi

if [ ! -x "$venv/bin/python" ]; then
  say "making $venv with $python"
  "$python" -m venv "$venv"
fi
say "installing tokenkit[$extras] at the versions of $(basename "$constraints") (a few minutes, about 3 GB)"
# Not compiled: of 17,000 files a run imports a fraction, which Python compiles when it first reads them.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile \
  -c "$constraints" -e "$root[$extras]"
"$venv/bin/python" -c 'import torch, triton, tokenkit.structs'
wanted >"$venv/tokenkit.stamp"
say "ready: $venv"
