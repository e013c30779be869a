#!/usr/bin/env bash
# The compose file and what stands beside it, judged by the programs that read them: Docker Compose resolves the file (it needs no
# engine for that), Prometheus checks its own, scrapes a server under the very names that the file gives, and answers everything that
# the dashboard asks. As root, on a Debian with network, after `make install`; takes about a minute.
#
#   deploy/tests/compose.sh
#
# The programs come from Debian 13, in a root file system of their own; server and Prometheus run in a network of their own.
set -euo pipefail
cd "$(dirname "$0")/../.."
. deploy/tests/common.sh
[ "$(id -u)" = 0 ] || fail "expected to be root: a root file system is made and entered"
[ -x .venv/bin/text-generation-launcher ] || fail "nothing is installed: make install"
deploy/tests/root_file_system.sh trixie target/deploy/trixie
root=$(mktemp -d "$PWD/target/deploy/compose.XXXX")
log=$(mktemp -d)
trap 'rm -rf "$root" "$log"' EXIT
cp -a target/deploy/trixie/. "$root"
cp -L /etc/resolv.conf "$root/etc/" 2>/dev/null || true
cp /etc/hosts "$root/etc/hosts"
mkdir "$root/clone"
cp -r deploy assets Dockerfile "$root/clone"

# inside COMMAND: in the root file system, where /clone has what this clone has.
cat >"$log/inside" <<'END'
set -e
root=$1 command=$2
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
exec chroot "$root" sh -c "cd /clone && $command"
END
inside() { unshare --mount --pid --fork --kill-child --propagation private bash "$log/inside" "$root" "$1"; }

inside "apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends docker-compose prometheus" \
    >"$log/apt" 2>&1 || { tail -20 "$log/apt" >&2; fail "docker-compose and prometheus cannot be installed"; }
say "$(inside "docker-compose version; prometheus --version | cut -d' ' -f1-3 | head -1" | tr '\n' ' ')"

file=deploy/compose/compose.yaml
code=0
said=$(inside "docker-compose -f $file config" 2>&1) || code=$?
[ "$code" != 0 ] || fail "no MODEL_ID, and the compose file was taken"
case $said in *"required variable MODEL_ID is missing a value: name a model"*) say "refused: no MODEL_ID" ;; *) fail "no MODEL_ID: $said" ;; esac
inside "MODEL_ID=/data/model QUANTIZE=gptq NUM_SHARD=2 DATA=/somewhere TARGET=cuda ADDRESS=0.0.0.0 API_KEY=secret docker-compose -f $file config --format json" >"$log/chosen"
inside "MODEL_ID=/data/model docker-compose -f $file config --format json" >"$log/resolved"
inside "promtool check config deploy/compose/prometheus.yaml" >"$log/promtool" 2>&1 || { cat "$log/promtool" >&2; fail "prometheus.yaml"; }
.venv/bin/python deploy/tests/compose.py files "$log/resolved" "$log/chosen" /clone
say "compose.yaml is resolved by Docker Compose, prometheus.yaml is valid"

# The names that the files use, in a network that has nobody else.
echo "127.0.0.1 server prometheus grafana" >>"$root/etc/hosts"
export -f inside say fail wait_ready
export root log
unshare --net --pid --fork --kill-child --mount-proc bash -c '
    set -euo pipefail
    ip link set lo up
    .venv/bin/text-generation-launcher --model-id models/docs-llama-7m --port 80 >"$log/server" 2>&1 &
    server=$!
    wait_ready 80 $server "$log/server" >/dev/null
    inside "prometheus --config.file deploy/compose/prometheus.yaml --storage.tsdb.path /tmp/series --web.listen-address 127.0.0.1:9090" >"$log/prometheus" 2>&1 &
    .venv/bin/python deploy/tests/compose.py dashboard http://127.0.0.1:80 http://127.0.0.1:9090 || { tail -5 "$log/prometheus" >&2; exit 1; }
    kill -TERM $server
    wait $server
' compose || fail "the dashboard"
say "done"
