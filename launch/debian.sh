#!/usr/bin/env bash
# Install missing Debian packages when root; else print the line to copy. Run as: launch/debian.sh [PACKAGE ...]
set -euo pipefail
[ $# -gt 0 ] || exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "installing $*"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
else
  printf 'error: missing packages: %s\n  fix:    sudo apt-get install -y %s\n' "$*" "$*" >&2
  exit 3
fi
