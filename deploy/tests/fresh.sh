#!/usr/bin/env bash
# A system that nobody has touched: a minimal Debian or Ubuntu is made, and what the README says is typed in it.
# As root, with network; `install` takes about six minutes, `test` another twenty.
#
#   deploy/tests/fresh.sh bookworm             as root: make install, make run, again, after a broken install
#   deploy/tests/fresh.sh trixie user          as a user, to whom root has given the README's packages
#   deploy/tests/fresh.sh bookworm root test   make test too
#   deploy/tests/fresh.sh bookworm root ci     .ci/run instead, from nothing: install, lints, every test, make run, the wheel
#
# MIRROR names the packages' mirror, where the suite is not of this machine's own distribution (noble: Ubuntu's).
set -euo pipefail
cd "$(dirname "$0")/../.."
. deploy/tests/common.sh
suite=${1:-bookworm} who=${2:-root} with_tests=${3:-}
[ "$(id -u)" = 0 ] || fail "expected to be root: a root file system is made and entered"
deploy/tests/root_file_system.sh "$suite" "target/deploy/$suite"
root=$(mktemp -d "$PWD/target/deploy/fresh.XXXX")
trap 'rm -rf "$root"' EXIT
cp -a "target/deploy/$suite/." "$root"
# How this machine reaches package registries, and whom it trusts, is no part of a fresh system's state.
cp -L /etc/resolv.conf "$root/etc/" 2>/dev/null || true
cp /etc/hosts "$root/etc/hosts"
[ ! -e /etc/pip.conf ] || cp /etc/pip.conf "$root/etc/"
trusted=
if [ -n "${SSL_CERT_FILE:-}" ]; then
    cp -L "$SSL_CERT_FILE" "$root/etc/trusted.crt"
    for name in SSL_CERT_FILE PIP_CERT CARGO_HTTP_CAINFO CURL_CA_BUNDLE GIT_SSL_CAINFO; do trusted+=" $name=/etc/trusted.crt"; done
fi
git clone -q . "$root/home/text-generation"

# enter USER COMMAND: in a mount namespace of its own.
enter() {
    unshare --mount --pid --fork --kill-child --propagation private bash -c '
        set -e
        root=$1 user=$2 command=$3
        mount --bind "$root" "$root"
        mount -t proc proc "$root/proc"
        mount --rbind /dev "$root/dev"
        exec chroot "$root" su - "$user" -c "$command"
    ' enter "$root" "$1" "export LANG=C.UTF-8$trusted; \
        cd /home/text-generation && $2"
}
# timed WHAT USER COMMAND
timed() {
    local start=$SECONDS
    enter "$2" "$3" >"$root.log" 2>&1 || { tail -40 "$root.log" >&2; fail "$1"; }
    say "$1: $((SECONDS - start)) s"
}

# The README's own line of packages, for whoever it is.
packages=$(sed -n 's/^sudo apt-get install -y \(.*\)$/\1/p' README.md | head -1)
[ -n "$packages" ] || fail "README.md has no line 'sudo apt-get install -y ...'"
timed "packages of the README: $packages" root "apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $packages"
if [ "$who" = user ]; then
    # A user has no root: what install.sh would ask apt for has to be there.
    timed "the tools, given by root" root "DEBIAN_FRONTEND=noninteractive apt-get install -y -qq build-essential ca-certificates curl python3 python3-venv"
    enter root "useradd -m person && chown -R person /home/text-generation"
    user=person
else
    user=root
fi
if [ "$with_tests" = ci ]; then
    timed ".ci/run as $user" "$user" ".ci/run"
    sed -n 's/^=== //p' "$root.log"
    grep -E '^[=.]* ?[0-9]+ passed|^test result: FAILED' "$root.log" || true
    rm "$root.log"
    say "$suite as $user: done"
    exit
fi
timed "make install as $user" "$user" "make install"
state=$(cd "$root/home/text-generation" && find .venv/bin target/release -maxdepth 1 -type f ! -name '*.d' -printf '%p %T@\n' | sort | sha256sum)
timed "make install again" "$user" "make install"
after=$(cd "$root/home/text-generation" && find .venv/bin target/release -maxdepth 1 -type f ! -name '*.d' -printf '%p %T@\n' | sort | sha256sum)
[ "$state" = "$after" ] || fail "a second make install changed files"
timed "make run answers" "$user" "scripts/first_answer.sh"
# Half an install: a package gone, a program cut off.
(cd "$root/home/text-generation" && rm -rf .venv/lib/python3*/site-packages/torch .venv/.installed && : > .venv/bin/text-generation-router)
timed "make install repairs" "$user" "make install"
timed "make run answers after the repair" "$user" "scripts/first_answer.sh"
if [ "$with_tests" = test ]; then timed "make test" "$user" "make test"; fi
timed "make uninstall" "$user" "make uninstall"
left=$(enter "$user" "git status --porcelain --ignored")
[ -z "$left" ] || fail "make uninstall left $left"
rm "$root.log"
say "$suite as $user: done"
