#!/bin/sh
# What SageMaker's containers are told in their environment, in the launcher's own names; arguments are passed on.
set -eu
# What SageMaker itself appends to the entry point.
if [ "${1:-}" = serve ]; then shift; fi
if [ -z "${HF_MODEL_ID:-}" ]; then
    echo "error: HF_MODEL_ID is not set: expected the name of a model on the hub, or a folder such as /opt/ml/model" >&2
    exit 1
fi
export MODEL_ID="$HF_MODEL_ID"
# A variable that is empty was meant to be left out.
if [ -n "${HF_MODEL_REVISION:-}" ]; then export REVISION="$HF_MODEL_REVISION"; fi
if [ -n "${SM_NUM_GPUS:-}" ] && [ "$SM_NUM_GPUS" != 0 ]; then export NUM_SHARD="$SM_NUM_GPUS"; fi
if [ -n "${HF_MODEL_QUANTIZE:-}" ]; then export QUANTIZE="$HF_MODEL_QUANTIZE"; fi
if [ -n "${HF_MODEL_TRUST_REMOTE_CODE:-}" ]; then export TRUST_REMOTE_CODE="$HF_MODEL_TRUST_REMOTE_CODE"; fi
# SageMaker asks on 8080, and kills 30 seconds after it has asked a container to end.
export PORT="${PORT:-8080}"
export GRACEFUL_TERMINATION_TIMEOUT="${GRACEFUL_TERMINATION_TIMEOUT:-25}"
exec text-generation-launcher "$@"
