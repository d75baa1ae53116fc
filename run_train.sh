#!/usr/bin/env bash
# Starts a training run: sets up Python where needed, checks the configuration, launches the ranks.
#
#   ./run_train.sh [--section.key value ...]
#
# Environment variables:
#   CONFIG_FILE    TOML file (default ./train_configs/llama3/debug_model.toml)
#   NGPU           ranks on this machine (default: the GPUs there are, or 1 on a CPU)
#   LOG_RANK       local ranks whose output is shown, such as 0,1 (default 0)
#   TRAIN_FILE     module to run (default torchtitan.train)
#   COMM_MODE      fake_backend: a dry run, one process in place of all ranks (docs/parallelism.md)
#   NNODES         machines (default 1); if more, start this script on each with the same
#   RDZV_ENDPOINT  host:port where they meet (or MASTER_ADDR and MASTER_PORT, default port 29500)
#   RDZV_ID        name of the run, if several meet there
#   TORCHINDUCTOR_CACHE_DIR  where compiled code is kept (default ~/.cache/torchtitan/compiled)
# torchrun's own PET_* variables work too.
#
# Relative paths in the configuration are the repository's; CONFIG_FILE may be the caller's.
# Exit status: 0 done, 2 wrong configuration, 75 saved on request (start me again), 128 + n ended by
# signal n, 1 any other failure.
set -euo pipefail

caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/setup_env.sh run

count_gpus() {
    if [[ -v CUDA_VISIBLE_DEVICES ]]; then
        tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
    else
        { nvidia-smi -L 2>/dev/null || true; } | grep -c ^GPU || true
    fi
}

config_file=${CONFIG_FILE:-./train_configs/llama3/debug_model.toml}
[[ $config_file != /* && -e $caller/$config_file ]] && config_file=$caller/$config_file
train_file=${TRAIN_FILE:-torchtitan.train}
num_gpus=$(count_gpus)
NGPU=${NGPU:-${PET_NPROC_PER_NODE:-$((num_gpus > 0 ? num_gpus : 1))}}
NNODES=${NNODES:-${PET_NNODES:-1}}
export NGPU NNODES # the preflight checks the configuration for this many ranks
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
# What torch.compile has built serves later runs, too; torch's own choice, /tmp, is emptied sooner.
if [[ -z ${TORCHINDUCTOR_CACHE_DIR:-} && -n ${HOME:-} ]]; then
    compiled=$HOME/.cache/torchtitan/compiled
    if mkdir -p "$compiled" 2>/dev/null && [[ -w $compiled ]]; then
        export TORCHINDUCTOR_CACHE_DIR=$compiled
    fi
fi

for argument in "$@"; do
    if [[ $argument == --help || $argument == -h ]]; then
        sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' run_train.sh
        exec "$PYTHON" -m torchtitan.config.manager --job.config_file "$config_file" "$@"
    fi
done

for name in NGPU NNODES; do
    if [[ ! ${!name} =~ ^[1-9][0-9]*$ ]]; then
        echo "$name = ${!name}: must be a whole number, at least 1." >&2
        exit 2
    fi
done

if [[ -n ${COMM_MODE:-} ]]; then
    export LOCAL_RANK=0
    exec "$PYTHON" -m "$train_file" --job.config_file "$config_file" "$@" \
        --comm.mode="$COMM_MODE" --training.steps=1
fi

if ((NGPU * NNODES == 1)); then
    # One rank needs no launcher, and starts 4 s sooner without; port 0 is any free one.
    export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 LOCAL_WORLD_SIZE=1 MASTER_ADDR=localhost MASTER_PORT=0
    exec "$PYTHON" -m "$train_file" --job.config_file "$config_file" "$@"
fi

launch=(--nproc-per-node "$NGPU" --local-ranks-filter "${LOG_RANK:-0}" --role rank --tee 3)
if ((NNODES > 1)) && [[ -z ${PET_NNODES:-} ]]; then
    endpoint=${RDZV_ENDPOINT:-${MASTER_ADDR:+$MASTER_ADDR:${MASTER_PORT:-29500}}}
    if [[ -z $endpoint ]]; then
        echo "NNODES = $NNODES: set RDZV_ENDPOINT=host:port (or MASTER_ADDR), the same on each." >&2
        exit 2
    fi
    launch+=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$endpoint"
        --rdzv-id "${RDZV_ID:-torchtitan}")
elif ((NNODES == 1)); then
    launch+=(--rdzv-backend c10d --rdzv-endpoint localhost:0)
fi
# The cores are shared out: ranks that compete for them are many times slower.
cores=$(nproc 2>/dev/null || echo 1)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NGPU ? cores / NGPU : 1))}
exec "$PYTHON" -m torchtitan.launcher "${launch[@]}" -m "$train_file" --job.config_file "$config_file" "$@"
