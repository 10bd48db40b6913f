#!/usr/bin/env bash
# packages.sh: the system packages that the tests of tests/slurm need; those skip where they are absent.
set -euo pipefail
missing=()
command -v slurmctld >/dev/null || [ -x /usr/sbin/slurmctld ] || missing+=(slurm-wlm)
command -v munged >/dev/null || [ -x /usr/sbin/munged ] || missing+=(munge)
[ ${#missing[@]} = 0 ] && { echo "packages: slurm-wlm and munge are here"; exit 0; }
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "packages: ${missing[*]} missing, and only root with apt-get can install them: tests/slurm will be skipped" >&2
  exit 0
fi
echo "packages: installing ${missing[*]} (4 MB; starts no service)"
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
