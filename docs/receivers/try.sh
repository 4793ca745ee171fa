#!/bin/sh
# Tries a receiver. Type: WEBHOOK_SECRET=… sh try.sh http://127.0.0.1:9000/
# It prints what the receiver answers, and fails unless that is a 2xx once and 401 four times.
set -eu
: "${WEBHOOK_SECRET:?is missing}" "${1:?: the URL of the receiver is missing}"
url=$1 wrong=0
body='{"event":"webhook.test","event_id":"evt_00000000000000000000000000","sequence":null,"test":true}'
signature=sha256=$(printf %s "$body" | openssl dgst -sha256 -hmac "$WEBHOOK_SECRET" -r | cut -d' ' -f1)

# post WHAT WANTED BODY [HEADER]
post() {
    status=$(curl -s -o /dev/null -w '%{http_code}' -H "${4:-X-Hub-Signature-256;}" --data-binary "$3" "$url") || :
    [ "$status" = "$2" ] || [ "${status%??}xx" = "$2" ] || wrong=1
    printf '%-30s %s\n' "$1" "$status"
}

post 'signed' 2xx "$body" "X-Hub-Signature-256: $signature"
post 'changed after it was signed' 401 "$body " "X-Hub-Signature-256: $signature"
post 'with an empty signature' 401 "$body"
post 'without a signature' 401 "$body" 'Accept: */*'
post 'without a signature and empty' 401 '' 'Accept: */*'
exit "$wrong"
