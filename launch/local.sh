#!/bin/sh
# Starts N ranks of a recipe on this machine, on its GPUs or, where there are none or with --device cpu, on the CPU:
#
#     launch/local.sh -n 2 recipes/gpt.py --preset tiny --text FILE
#     launch/local.sh -n 2 --max-restarts 3 recipes/gpt.py --preset tiny --text FILE --run-dir runs/mine
#     launch/local.sh -n 2 -m distkit doctor
#
# What torchrun does not: every rank gets SIGTERM, SIGINT, SIGUSR1, SIGUSR2 and SIGHUP, the exit code is that of the
# first rank that failed (75: stopped; the same command resumes), and no process is left behind.
#
#   --max-restarts N   after a failure that another try may not meet (a killed rank, say), end all ranks and start them
#                      again, at most N times: the run goes on from its last checkpoint. Not after a stop (75), nor when
#                      an attempt has saved nothing new
#   GRACE_SECONDS=30   how long ranks may keep running after a SIGTERM, or after one has failed; then they are killed
#   MASTER_PORT=PORT   the ranks' meeting point; without it a free port
#   PYTHON=python      the interpreter
#
# CUDA_VISIBLE_DEVICES says which GPUs; OMP_NUM_THREADS or --num-threads how many threads a rank has on the CPU.
exec "${PYTHON:-python}" "$(dirname -- "$(readlink -f -- "$0")")/local.py" "$@"
