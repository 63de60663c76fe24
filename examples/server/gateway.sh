#!/usr/bin/env bash
# Two replicas on this machine behind smg, until Ctrl-C. Needs: pip install smg
#
#   examples/server/gateway.sh                  # the embedded model, gateway on port 8080
#   examples/server/gateway.sh ./LLaDA-8B-Instruct --dtype bfloat16
#   python examples/server/gateway_check.py http://127.0.0.1:8080
set -euo pipefail

started=()
stop() {
  kill "${started[@]}" 2>/dev/null || true
  wait
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

for port in 8001 8002; do
  # a job is known to one replica only, and the gateway does not pass the job endpoints on
  OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" dllmserve serve "$@" --port "$port" --job-store memory &
  started+=("$!")
done
for port in 8001 8002; do
  until curl --silent --fail --output /dev/null "http://127.0.0.1:$port/ready"; do
    kill -0 "${started[@]}"
    sleep 0.5
  done
done

smg launch --host 127.0.0.1 --port 8080 --policy least_load --health-check-interval-secs 5 \
  --worker-urls http://127.0.0.1:8001 http://127.0.0.1:8002 &
started+=("$!")
# ends when one of them does
wait -n
