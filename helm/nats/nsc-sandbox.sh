#!/bin/sh
# A user for the sandbox $1, in the account of all. README.md says how to go on.
set -eu
LC_ALL=C

case "${1-}" in ''|*[!a-z0-9_-]*) echo "usage: $0 SANDBOX, of a-z, 0-9, _ and -" >&2; exit 2 ;; esac

nsc add user --account SANDBOX --name "$1" --private-key sandbox --tag sandbox:"$1"
nsc generate creds --account SANDBOX --name "$1" --output-file "$1".creds
