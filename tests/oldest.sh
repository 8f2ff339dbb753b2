#!/usr/bin/env bash
# By hand: does everything start with the oldest versions that requirements.txt allows? Installs them into a
# temporary environment (several GB), then runs both test suites and the quick start. PYTHON names an interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${PYTHON:-python3.11}" -m venv "$work/venv"
. "$work/venv/bin/activate"
sed 's/>=\([0-9.]*\).*/==\1.*/' requirements.txt > "$work/oldest.txt"  # a name without a floor: the newest
python -m pip install --quiet --no-cache-dir -r "$work/oldest.txt"
python -m pip freeze | grep -iE '^(torch|numpy|pillow|lpips|matplotlib|pytest)'

pytest -p no:cacheprovider
pytest -m dist -p no:cacheprovider
python train.py --stage all --preset demo --out "$work/run"
