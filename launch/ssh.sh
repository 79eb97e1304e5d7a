#!/usr/bin/env bash
# Train on machines that ssh reaches and that share a file system: one process on each.
#
#   HOSTS="node1 node2" DIRECTORY=/shared/attnlab launch/ssh.sh --config=lm_docs --workdir=/shared/runs/a
#
# The first host is process 0. PORT and the port below it must be open between the hosts.
set -euo pipefail
: "${HOSTS:?such as \"node1 node2\"}" "${DIRECTORY:?a checkout with .venv on every host}"
PORT=${PORT:-8476}
read -ra hosts <<<"$HOSTS"

pids=()
for i in "${!hosts[@]}"; do
  # -tt ends the remote process when this script is interrupted.
  ssh -tt "${hosts[$i]}" "cd '$DIRECTORY' && .venv/bin/python run.py --coordinator=${hosts[0]}:$PORT \
    --num_processes=${#hosts[@]} --process_id=$i $(printf '%q ' "$@")" </dev/null &
  pids+=($!)
done
code=0
for pid in "${pids[@]}"; do
  wait "$pid" || code=$?
done
exit "$code"
