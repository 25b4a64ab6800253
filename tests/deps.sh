#!/usr/bin/env bash
# Installs what a make target needs beside Rust, or names what is missing.
#
# As root, missing programs come from Debian packages; otherwise they are named, and the tests that need
# them say that they were skipped, and why. Python packages go into target/venv, which needs no root.
# In CI (CI=true) something missing is an error: a gate that skips its tests is no gate. Of a cluster, which cannot be
# everywhere, its own command says so.
#
# Usage: tests/deps.sh demo|test|bench|cluster
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/sbin:/sbin

target=${1:-}
# program=package
base="cc=gcc ip=iproute2 nsenter=util-linux setpriv=util-linux iptables=iptables ps=procps"
database="mariadbd=mariadb-server mariadb=mariadb-client mariadb-install-db=mariadb-server"
remote="sshd=openssh-server ssh=openssh-client redis-server=redis-server redis-cli=redis-tools faketime=faketime"
load="nginx=nginx-light wrk=wrk h2load=nghttp2-client iperf3=iperf3"
case "$target" in
  demo) programs="$base $database" requirements="" ;;
  test) programs="$base $database $remote $load curl=curl strace=strace tcpdump=tcpdump nc=netcat-openbsd openssl=openssl apache2=apache2-bin haproxy=haproxy node=nodejs" requirements=tests/requirements.txt ;;
  bench) programs="$base $load valgrind=valgrind haproxy=haproxy /usr/lib/nginx/modules/ngx_stream_module.so=libnginx-mod-stream" requirements=tests/bench/requirements.txt ;;
  cluster) programs="$base containerd=containerd runc=runc strip=binutils tcpdump=tcpdump /usr/lib/cni/ptp=containernetworking-plugins" requirements="" ;;
  *) echo "usage: $0 demo|test|bench|cluster" >&2; exit 2 ;;
esac

missing() {
  local pair
  for pair in $programs; do
    # A module is no command.
    [ -f "${pair%%=*}" ] || command -v "${pair%%=*}" >/dev/null 2>&1 || echo "${pair#*=}"
  done | sort -u
  # The traditional nc cannot half-close.
  case " $programs " in
    *" nc="*) if command -v nc >/dev/null && ! nc -h 2>&1 | grep -q OpenBSD; then echo netcat-openbsd; fi ;;
  esac
  if [ -n "$requirements" ] && ! python3 -c 'import venv, ensurepip' >/dev/null 2>&1; then echo python3-venv; fi
}

install() {
  local policy=/usr/sbin/policy-rc.d made=
  # The daemons are started by tests, in namespaces; their packages must not start them on this machine.
  if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    made=1
  fi
  local status=0
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"; } \
    >/dev/null || status=$?
  if [ -n "$made" ]; then rm -f "$policy"; fi
  return "$status"
}

# Says what is not there; an error only where nobody would read it.
lacking() {
  echo "deps: $*" >&2
  if [ "${CI:-}" = true ] && [ "$target" != cluster ]; then exit 1; fi
}

packages=$(missing)
if [ -n "$packages" ]; then
  # shellcheck disable=SC2086
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "deps: installing" $packages
    install $packages || lacking "apt-get could not install" $packages
  fi
  packages=$(missing)
  # shellcheck disable=SC2086
  if [ -n "$packages" ]; then lacking "missing (Debian packages):" $packages; fi
fi

if [ -n "$requirements" ]; then
  venv=target/venv
  stamp=$venv/$(basename "$(dirname "$requirements")").installed
  if ! cmp -s "$requirements" "$stamp" || [ ! -x "$venv/bin/python" ]; then
    echo "deps: Python packages of $requirements into $venv"
    if { [ -x "$venv/bin/python" ] || python3 -m venv "$venv"; } &&
      "$venv/bin/pip" install --quiet --disable-pip-version-check --only-binary=:all: -r "$requirements"; then
      cp "$requirements" "$stamp"
    else
      lacking "could not install $(grep -v '^#' "$requirements" | tr '\n' ' ')into $venv"
    fi
  fi
fi

# Not packaged anywhere else; a test without it says that it skipped.
h2spec=target/go/bin/h2spec
if [ "$target" = test ] && [ ! -x "$h2spec" ]; then
  if command -v go >/dev/null && GOBIN=$PWD/target/go/bin go install github.com/summerwind/h2spec/cmd/h2spec@v2.2.1+incompatible 2>/dev/null; then
    echo "deps: h2spec built"
  else
    lacking "h2spec needs Go and its module proxy; its test will be skipped"
  fi
fi

# gRPC's interoperability suite, by its own programs.
interop=target/go/interop
if [ "$target" = test ] && [ ! -x "$interop/server" ]; then
  programs="google.golang.org/grpc/interop/client@v1.83.0 google.golang.org/grpc/interop/server@v1.83.0"
  # shellcheck disable=SC2086
  if command -v go >/dev/null && GOBIN=$PWD/$interop go install $programs 2>/dev/null; then
    echo "deps: gRPC's interop programs built"
  else
    lacking "gRPC's interop programs need Go and its module proxy; their test will be skipped"
  fi
fi
