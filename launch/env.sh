# Environment of ranks, each line with its reason. Launchers source it; what is set already stays as it is.
#
#   ranks=8; . launch/env.sh        ranks: how many of them share this machine
# shellcheck shell=bash

# The cores that this job may use, shared among its ranks on this machine. Unset, torchrun gives each rank one thread.
: "${OMP_NUM_THREADS:=$(python -c "from tarflow_scale.runtime.cores import num_threads; print(num_threads(0, ${ranks:-1}))")}"
# torchrun kills ranks 30 seconds after it told them to stop; a checkpoint of billions of parameters takes longer.
: "${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:=600}"
# Training, validation and previews want tensors of other sizes; segments that grow leave fewer fragments of GPU memory
# behind (PyTorch's notes on CUDA semantics).
: "${PYTORCH_ALLOC_CONF:=expandable_segments:True}"
# One line when NCCL cannot go on, and which interface it chose; INFO for everything it tried.
: "${NCCL_DEBUG:=WARN}"
# After a collective's time-out every rank writes what it was in, which names the rank that was missing.
: "${TORCH_NCCL_DUMP_ON_TIMEOUT:=1}"
: "${TORCH_NCCL_DEBUG_INFO_TEMP_FILE:=${TMPDIR:-/tmp}/tarflow-scale-nccl-${SLURM_JOB_ID:-$$}-}"
# Triton caches kernels at home, which is often a shared file system where many ranks race; this machine's disk is not.
: "${TRITON_CACHE_DIR:=${TMPDIR:-/tmp}/triton-$(id -u)}"
# A crash inside a library says where.
: "${PYTHONFAULTHANDLER:=1}"
export OMP_NUM_THREADS TORCH_ELASTIC_SHUTDOWN_TIMEOUT PYTORCH_ALLOC_CONF NCCL_DEBUG TORCH_NCCL_DUMP_ON_TIMEOUT
export TORCH_NCCL_DEBUG_INFO_TEMP_FILE TRITON_CACHE_DIR PYTHONFAULTHANDLER

# Loader workers share batches through file descriptors; 1024, a usual limit, is soon used up.
ulimit -Sn "$(ulimit -Hn)" 2>/dev/null || true
# Core files of all ranks would fill a shared disk.
ulimit -Sc 0

# Left to the site, because a wrong value is worse than none. Where NCCL or gloo choose an interface that other machines
# cannot reach, ranks wait for each other until the time-out; `ip -brief address` shows what there is:
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
#   export NCCL_IB_HCA=mlx5                          InfiniBand adapters to use
