#!/usr/bin/env bash
# Runs all tests, after setting up what is missing; arguments go to pytest (default: everything).
#
#   scripts/run_tests.sh [pytest arguments]
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh dev

# Kernels that torch.compile has built once serve the next run of the tests.
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$PWD/.pytest_cache/inductor}
exec "$PYTHON" -m pytest "$@"
