#!/bin/bash
# Completes a prompt with Generate, and once more with StreamGenerate: generate.sh PROMPT.
set -euo pipefail

request=$(python3 -c 'import json, sys; print(json.dumps(
  {"prompt": {"text": sys.argv[1]}, "sampling": {"temperature": 0, "max_new_tokens": 16}}))' "$1")

# grpcurl knows the messages by the server's reflection, replaces ${TOKEN} itself, and exits with 64 + the status code.
call() {
  for pause in 0.2 0.4 0.8 1.6 last; do
    TOKEN=$(<"$TOKEN_FILE") grpcurl -cacert "$CA_FILE" -expand-headers -H 'authorization: Bearer ${TOKEN}' \
      -max-time "${DEADLINE_SECONDS:-60}" -d "$2" "$TARGET" "rlhf.policy.v1.PolicyService/$1" && return
    code=$?
    # 78 = 64 + UNAVAILABLE
    [ $code = 78 ] && [ $pause != last ] || return $code
    sleep $pause
  done
}

call Generate "$request"
call StreamGenerate "{\"request\": $request}"
