#!/usr/bin/env bash
# Train on several TPU slices, which data-center network links: a queued resource with NODES slices.
#
#   NAME=lab ZONE=us-east5-b TYPE=v6e-16 NODES=2 BUCKET=gs://my-bucket \
#     launch/multislice.sh --config=lm_docs --mesh=dcn_data:2,fsdp:16
#
# Run it again to resume. Delete the slices with:
#   gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force
set -euo pipefail
: "${NAME:?}" "${ZONE:?}" "${TYPE:?such as v6e-16}" "${NODES:?number of slices}" "${BUCKET:?gs://...}"
VERSION=${VERSION:-v2-alpha-tpuv6e}
REPOSITORY=${REPOSITORY:-$(git remote get-url origin)}

if ! gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" >/dev/null 2>&1; then
  gcloud compute tpus queued-resources create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" \
    --runtime-version="$VERSION" --node-count="$NODES" --node-prefix="$NAME" ${SPOT:+--spot}
fi
until gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" \
  --format='value(state.state)' | grep -q ACTIVE; do
  echo "waiting for $NODES x $TYPE"
  sleep 30
done

pids=()
for ((node = 0; node < NODES; node++)); do
  gcloud compute tpus tpu-vm ssh "$NAME-$node" --zone="$ZONE" --worker=all --command="
    set -e
    test -d attnlab || git clone -q '$REPOSITORY' attnlab
    cd attnlab && git pull -q
    test -d .venv || python3 -m venv .venv
    .venv/bin/pip install -q -e '.[tpu,gcs]'
    .venv/bin/python run.py --workdir='$BUCKET/$NAME' $(printf '%q ' "$@")
  " &
  pids+=($!)
done
for pid in "${pids[@]}"; do
  wait "$pid"
done
