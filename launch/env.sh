# Environment of ranks, each line with its reason. Launchers source it; variables that are set already are kept.
#
#   ranks=8; . launch/env.sh        ranks: how many ranks run on this machine
# shellcheck shell=bash

# The cores that this job may use, shared among its ranks on this machine. Unset, torchrun gives each rank one thread.
: "${OMP_NUM_THREADS:=$(python -c "from tarflow_scale.runtime.cores import num_threads; print(num_threads(0, ${ranks:-1}))")}"
# torchrun kills ranks 30 seconds after it told them to stop; a checkpoint of billions of parameters takes longer.
: "${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:=600}"
# Training, validation and previews need tensors of different sizes; growing segments leave less fragmented GPU memory
# (PyTorch's notes on CUDA semantics).
: "${PYTORCH_ALLOC_CONF:=expandable_segments:True}"
# NCCL prints errors and the interface that it chose; INFO prints everything that it tried.
: "${NCCL_DEBUG:=WARN}"
# After the time-out of a collective every rank writes what it waited for, which shows the rank that is missing.
: "${TORCH_NCCL_DUMP_ON_TIMEOUT:=1}"
: "${TORCH_NCCL_DEBUG_INFO_TEMP_FILE:=${TMPDIR:-/tmp}/tarflow-scale-nccl-${SLURM_JOB_ID:-$$}-}"
# Triton caches kernels in the home folder, often a shared file system where many ranks race; use a local disk instead.
: "${TRITON_CACHE_DIR:=${TMPDIR:-/tmp}/triton-$(id -u)}"
# A crash inside a library prints a traceback.
: "${PYTHONFAULTHANDLER:=1}"
export OMP_NUM_THREADS TORCH_ELASTIC_SHUTDOWN_TIMEOUT PYTORCH_ALLOC_CONF NCCL_DEBUG TORCH_NCCL_DUMP_ON_TIMEOUT
export TORCH_NCCL_DEBUG_INFO_TEMP_FILE TRITON_CACHE_DIR PYTHONFAULTHANDLER

# Loader workers share batches through file descriptors; 1024, a usual limit, is reached soon.
ulimit -Sn "$(ulimit -Hn)" 2>/dev/null || true
# Core files of all ranks would fill a shared disk.
ulimit -Sc 0

# Not set here, because a wrong value is worse than none. If NCCL or gloo choose an interface that other machines
# cannot reach, ranks wait for each other until the time-out; `ip -brief address` lists the interfaces:
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
#   export NCCL_IB_HCA=mlx5                          InfiniBand adapters to use
