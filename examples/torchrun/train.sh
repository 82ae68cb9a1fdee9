#!/usr/bin/env bash
# One training in several processes under torchrun, on one machine or on many that no scheduler runs.
#
# One machine, four GPUs:
#   NPROC=4 examples/torchrun/train.sh +experiment=sft strategy=fsdp
# Several, the same command on each of them; MASTER is one of them, which all of the others can reach on that port:
#   NNODES=2 NPROC=4 MASTER=HOST:29500 RUN=first examples/torchrun/train.sh +experiment=sft strategy=fsdp
#
#   NPROC    processes on each machine, one a GPU (1)
#   NNODES   machines (1)
#   MASTER   HOST:PORT where they meet; on one machine any free port is taken
#   RUN      name of the run's folder, the same on all machines; on one machine the time
#   PYTHON   the interpreter (.venv/bin/python, where there is one, else python)
#
# On CPUs set OMP_NUM_THREADS, or torchrun gives each process a single thread.
# The data, the model and the adapters' folder must be the same on every machine: a file system that all of them see.
# To go on with a run that was stopped: the same command, the same RUN, and resume=runs/torchrun/RUN.
# On one machine plain `python -m lit_ft trainer.devices=4` does the same without torchrun.
set -euo pipefail

nodes=${NNODES:-1}
processes=${NPROC:-1}
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python)}
if [[ $nodes -gt 1 ]]; then
  : "${MASTER:?with NNODES above 1, give MASTER=HOST:PORT, the same on all machines}"
  : "${RUN:?with NNODES above 1, give RUN=NAME, the same on all machines}"
fi
run=${RUN:-$(date +%Y-%m-%d_%H-%M-%S-%N)}

exec "$python" -m torch.distributed.run \
  --nnodes="$nodes" --nproc-per-node="$processes" \
  --rdzv-backend=c10d --rdzv-endpoint="${MASTER:-localhost:0}" --rdzv-id="$run" --max-restarts=0 \
  -m lit_ft "trainer.num_nodes=$nodes" "trainer.devices=$processes" "hydra.run.dir='runs/torchrun/$run'" "$@"
