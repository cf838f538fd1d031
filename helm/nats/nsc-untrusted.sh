#!/bin/sh
# A user for the sandbox $1, which is not trusted, in the account of all. README.md says how to go on.
set -eu
LC_ALL=C

case "${1-}" in ''|*[!a-z0-9_-]*) echo "usage: $0 SANDBOX, of a-z, 0-9, _ and -" >&2; exit 2 ;; esac

nsc add user --account UNTRUSTED --name "$1" --private-key untrusted --tag sandbox:"$1"
nsc generate creds --account UNTRUSTED --name "$1" --output-file "$1".creds
