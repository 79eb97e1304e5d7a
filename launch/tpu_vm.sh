#!/usr/bin/env bash
# Train on a Cloud TPU VM with one host or many: the same command runs on every host.
#
#   NAME=lab ZONE=us-east5-b TYPE=v6e-16 BUCKET=gs://my-bucket launch/tpu_vm.sh --config=lm_docs --mesh=auto
#
# It creates the TPU if it does not exist, installs attnlab, and starts the run in BUCKET/NAME. Run it
# again to resume. SPOT=1 asks for a spot TPU. Delete the TPU with:
#   gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE"
set -euo pipefail
: "${NAME:?}" "${ZONE:?}" "${TYPE:?such as v5litepod-16 or v6e-8}" "${BUCKET:?gs://...}"
VERSION=${VERSION:-v2-alpha-tpuv6e}  # the image of the TPU's software
REPOSITORY=${REPOSITORY:-$(git remote get-url origin)}

if ! gcloud compute tpus tpu-vm describe "$NAME" --zone="$ZONE" >/dev/null 2>&1; then
  gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" \
    --version="$VERSION" ${SPOT:+--spot}
fi

on_every_host() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

on_every_host "
  set -e
  test -d attnlab || git clone -q '$REPOSITORY' attnlab
  cd attnlab && git pull -q
  test -d .venv || python3 -m venv .venv
  .venv/bin/pip install -q -e '.[tpu,gcs]'
"
# Cloud TPU tells JAX the coordinator, the number of processes and the index of each.
on_every_host "cd attnlab && .venv/bin/python run.py --workdir='$BUCKET/$NAME' $(printf '%q ' "$@")"
