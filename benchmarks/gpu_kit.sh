#!/usr/bin/env bash
# The wheels that a GPU machine without a network lacks: what pyproject.toml needs, less what is there.
#
#   benchmarks/gpu_kit.sh DIR [PRESENT]      collects them into DIR (about 10 MB)
#
# PRESENT is the machine's `pip freeze`; by default benchmarks/gpu_present.txt, of a machine with
# torch 2.11 and transformers 5.17. Nothing that is there is collected or replaced.
# PYTHON_VERSION=3.12 is the machine's. trl is added, to compare with: TRL=1.10.0, or TRL= for none.
#
# On the machine, in the project's directory:
#
#   python3 -m pip install --no-index --no-deps --target DIR/site DIR/*.whl
#   PYTHONPATH=DIR/site python3 -m benchmarks.gpu_day
set -euo pipefail

[[ $# -ge 1 ]] || { sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 2; }
project=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
mkdir -p "$1"
kit=$(readlink -f "$1")
present=$(readlink -f "${2:-$project/benchmarks/gpu_present.txt}")
python=${PYTHON:-python3} version=${PYTHON_VERSION:-3.12} trl=${TRL-1.10.0}

cd "$project"
"$python" -m benchmarks.gpu_kit --present "$present" --python-version "$version" --into "$kit" \
  ${trl:+--also "trl==$trl"}
du -sh "$kit"
