#!/usr/bin/env bash
# tools/gpu.sh: what this machine's GPU does with losa, in eight minutes. tools/gpu.sh again: afterwards, what failed once
# more, and alternatives side by side. PYTHON chooses the interpreter, OUT where the results go, LOSA_GPU_MINUTES the time.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" tools/gpu.py "$@"
