# Sourced by tests/run and tests/session: makes what they need, once, and sets $python.
#
# As root on Debian or Ubuntu it installs the packages for real nodes; an ordinary user is told
# the one command that does what only root can. $more_packages: what the caller needs besides.
# shellcheck shell=bash

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

packages="python3 python3-venv git openssh-client ${more_packages:-}"
node_packages="dnsmasq-base dpkg-dev gcc libc6-dev iproute2 mmdebstrap nftables sudo systemd-container s3cmd tmux"
needed="git ssh ${more_packages:-}"
node_needed="dnsmasq dpkg-scanpackages gcc ip mmdebstrap nft systemd-nspawn s3cmd tmux"

missing() {
  local program
  for program in "$@"; do command -v "$program" > /dev/null || { echo "$program"; return; }; done
}

# python3 may be one that has no venv; then the distribution's own does.
find_python() {
  local candidate
  for candidate in python3 /usr/bin/python3; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; then
      echo "$candidate"
      return
    fi
  done
}

install_packages() {
  if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    echo "installing $*" >&2
    export DEBIAN_FRONTEND=noninteractive
    { apt-get -qq update && apt-get -qq -y --no-install-recommends install "$@"; } > /dev/null
  else
    echo "Please run this first: sudo apt-get install -y $*" >&2
    exit 1
  fi
}

# shellcheck disable=SC2086  # the lists are words
{
  if [ -n "$(missing $needed)" ] || [ -z "$(find_python)" ]; then install_packages $packages; fi
  if [ "$(id -u)" = 0 ] && [ -n "$(missing $node_needed)" ]; then install_packages $node_packages; fi
}

# One virtual environment for each Python and each state of the locked requirements.
base=$(find_python)
version=$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
digest=$(sha256sum tests/requirements.txt | cut -c 1-10)
environment=${XDG_CACHE_HOME:-$HOME/.cache}/mitsuba-cluster/venv-$version-$digest
if [ ! -e "$environment/complete" ]; then
  echo "making a Python environment in $environment: half a minute, once" >&2
  rm -rf "$environment"
  "$base" -m venv "$environment"
  "$environment/bin/pip" install --quiet --disable-pip-version-check --require-hashes -r tests/requirements.txt 2>&1 |
    { grep -v '^WARNING: Location' >&2 || true; }
  touch "$environment/complete"
fi
export python=$environment/bin/python
export PATH=$environment/bin:$PATH PYTHONDONTWRITEBYTECODE=1
