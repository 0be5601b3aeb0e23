#!/usr/bin/env bash
# OwnLLM over NATS by hand, with the nats command (github.com/nats-io/natscli).
#
#     export NATS_URL=nats://127.0.0.1:4222 OWNLLM_API_KEY=sk-ownllm-...
#     client.sh chat '{"model":"demo","stream":true,"messages":[{"role":"user","content":"Hi"}]}'
#     client.sh ask cancel '{"request_id":"req_..."}'
#     client.sh submit my-id '{"model":"demo","messages":[{"role":"user","content":"Hi"}]}'
#     client.sh result my-id
#     client.sh ask whoami
#
# Prints the answers as they come, one JSON object a line. README.md in this folder describes
# commands and exit codes. For programs see the other clients here.
set -euo pipefail

export NATS_URL=${NATS_URL:-nats://127.0.0.1:4222} NATS_TOKEN=${OWNLLM_API_KEY:?is the API key}

# request KEY OPERATION PAYLOAD [FLAG]...: asks, and reads the answers in the key's own inbox.
request() {
  local key=$1 operation=$2 payload=$3
  shift 3
  exec nats --inbox-prefix "_INBOX_$key" request --raw --no-templates "$@" "ownllm.v1.in.$key.$operation" "$payload"
}

# ask OPERATION PAYLOAD [FLAG]...: one question, one answer.
ask() {
  local answer
  answer=$(request "$OWNLLM_KEY_ID" "$@")
  printf '%s\n' "$answer"
  [[ $answer != *'"kind":"error"'* ]]
}

# chat PAYLOAD: a reply, up to its end.
chat() {
  local line seq=0
  exec 3< <(request "$OWNLLM_KEY_ID" chat "$1" --replies 0 --timeout 15m)
  trap "kill $! 2>/dev/null || true" EXIT # whoever stops reading has said enough
  while IFS= read -r -t 15 line <&3; do # while a request lives, something comes every second
    [[ $line ]] || continue
    printf '%s\n' "$line"
    [[ $line == "{\"seq\":$((++seq)),"* ]] || { echo "client.sh: message $seq is missing" >&2; return 2; }
    case $line in
      *'"kind":"done"'*) return 0 ;;
      *'"kind":"error"'*) return 1 ;;
    esac
  done
  echo "client.sh: the reply broke off" >&2
  return 2
}

# Who has only the secret of a key asks for its id, under the secret's SHA-256.
if [[ -z ${OWNLLM_KEY_ID:-} ]]; then
  fingerprint=$(printf %s "$OWNLLM_API_KEY" | sha256sum | cut -d' ' -f1)
  OWNLLM_KEY_ID=$(request "$fingerprint" whoami '' | sed -n 's/.*"key_id":"\([^"]*\)".*/\1/p')
fi

case ${1:-} in
  chat) chat "$2" ;;
  submit) ask submit "{\"id\":\"$2\",\"request\":$3}" --timeout 15s ;;
  result) ask result "{\"id\":\"$2\",\"wait_seconds\":60}" --timeout 75s ;;
  ask) ask "$2" "${3:-}" --timeout 15s ;;
  *) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2 ;;
esac
