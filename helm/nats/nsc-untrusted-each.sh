#!/bin/sh
# A user for the sandbox $1, which is not trusted, in an account of its own. README.md says how to go on.
set -eu
LC_ALL=C

case "${1-}" in ''|*[!a-z0-9_-]*) echo "usage: $0 SANDBOX, of a-z, 0-9, _ and -" >&2; exit 2 ;; esac

nsc add account --name "$1" --deny-pubsub '>'
nsc add import --account "$1" --src-account WECHAT --name wechat.svc.send."$1" --remote-subject wechat.svc.send."$1" --local-subject wechat.svc.send."$1" --service
nsc add import --account "$1" --src-account WECHAT --name wechat.svc.media.get."$1" --remote-subject wechat.svc.media.get."$1" --local-subject wechat.svc.media.get."$1" --service
nsc add import --account "$1" --src-account WECHAT --name wechat.svc.media.put."$1" --remote-subject wechat.svc.media.put."$1" --local-subject wechat.svc.media.put."$1" --service
nsc add import --account "$1" --src-account WECHAT --name wechat.svc.next."$1" --remote-subject wechat.svc.next."$1" --local-subject wechat.svc.next."$1" --service
nsc add import --account "$1" --src-account WECHAT --name wechat.svc.receipt."$1" --remote-subject wechat.svc.receipt."$1" --local-subject wechat.svc.receipt."$1" --service
nsc add import --account "$1" --src-account WECHAT --name wechat.svc.replay."$1" --remote-subject wechat.svc.replay."$1" --local-subject wechat.svc.replay."$1" --service
nsc add import --account "$1" --src-account WECHAT --name wechat.svc.window."$1" --remote-subject wechat.svc.window."$1" --local-subject wechat.svc.window."$1" --service
nsc add import --account "$1" --src-account WECHAT --name wechat.in."$1" --remote-subject wechat.in."$1" --local-subject wechat.in."$1"
nsc add import --account "$1" --src-account WECHAT --name wechat.event."$1"'.>' --remote-subject wechat.event."$1"'.>' --local-subject wechat.event."$1"'.>'
nsc edit signing-key --account "$1" --role untrusted --sk generate --allow-pub 'wechat.svc.send.{{tag(sandbox)}},wechat.svc.media.get.{{tag(sandbox)}},wechat.svc.media.put.{{tag(sandbox)}},wechat.svc.next.{{tag(sandbox)}},wechat.svc.receipt.{{tag(sandbox)}},wechat.svc.replay.{{tag(sandbox)}},wechat.svc.window.{{tag(sandbox)}}' --allow-sub 'wechat.in.{{tag(sandbox)}},wechat.event.{{tag(sandbox)}}.>,_INBOX_{{tag(sandbox)}}.>' --payload=540672
nsc add user --account "$1" --name "$1" --private-key untrusted --tag sandbox:"$1"
nsc generate creds --account "$1" --name "$1" --output-file "$1".creds
