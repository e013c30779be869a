#!/usr/bin/env bash
# Builds a target of the Dockerfile without a Docker engine, and runs its entry point from the image's own root file system:
# as its own user, root read-only, 64 MiB of /dev/shm, a model under /data. As root, on a Debian with network; takes about
# ten minutes the first time.
#
#   deploy/tests/image.sh [cpu|sagemaker|cuda]     TORCH_INDEX_URL=... and BASE=... are passed on as build arguments
set -euo pipefail
cd "$(dirname "$0")/../.."
. deploy/tests/common.sh
target=${1:-cpu}
[ "$(id -u)" = 0 ] || fail "expected to be root: a root file system is made and entered"
for tool in buildah debootstrap; do
    command -v $tool >/dev/null || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $tool >/dev/null; }
done
# Layers share what they have in common, where the kernel has overlays; else each is a copy of all.
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=${STORAGE_DRIVER:-overlay}
if scratch=$(buildah from scratch 2>/dev/null) && buildah mount "$scratch" >/dev/null 2>&1; then
    buildah rm "$scratch" >/dev/null
else
    STORAGE_DRIVER=vfs
fi
image=localhost/text-generation:$target

# base_of SUITE: a base as the public one of that Debian is, for where none can be pulled.
base_of() {
    local image=localhost/debian:$1 container
    if ! buildah inspect --type image "$image" >/dev/null 2>&1; then
        deploy/tests/root_file_system.sh "$1" "target/deploy/$1"
        container=$(buildah from scratch)
        buildah add -q "$container" "target/deploy/$1" / >/dev/null
        buildah commit -q "$container" "$image" >/dev/null
        buildah rm "$container" >/dev/null
    fi
    echo "$image"
}
base=${BASE:-$(base_of bookworm)}

# What package clients need to know of this machine stays outside of the image: it is mounted while commands run. Whom this machine
# trusts beside the public authorities, the package ca-certificates takes up from there.
mounts=()
for path in /usr/local/share/ca-certificates /etc/pip.conf /etc/apt/apt.conf.d /etc/resolv.conf; do
    if [ -e "$path" ]; then mounts+=(--volume "$path:$path:ro"); fi
done
commit=$(git rev-parse --short=12 HEAD)
# build BASE IMAGE: in Docker's own form, as `docker build` does; that of OCI has no place for a health check.
source=https://example.org/text-generation
build() {
    local arguments=(--build-arg BASE="$1" --build-arg TORCH_INDEX_URL="${TORCH_INDEX_URL:-}" --build-arg GIT_COMMIT="$commit" --build-arg SOURCE="$source")
    buildah bud -q --layers --force-rm --format docker --target "$target" "${arguments[@]}" "${mounts[@]}" -t "$2" .
}
if [ "$target" = cpu ]; then
    # A base of another family: a system without apt-get.
    container=$(buildah from scratch)
    other=$(mktemp -d)
    mkdir "$other/bin" "$other/usr"
    cp /bin/busybox "$other/bin/sh" 2>/dev/null || { apt-get install -y -qq busybox-static >/dev/null && cp /bin/busybox "$other/bin/sh"; }
    buildah add -q "$container" "$other" / >/dev/null
    buildah commit -q "$container" localhost/other:1 >/dev/null
    buildah rm "$container" >/dev/null
    rm -rf "$other"
    ! said=$(build localhost/other:1 localhost/never:1 2>&1) || fail "a base without apt-get was taken"
    case $said in *"has no apt-get; name a Debian or Ubuntu"*) say "refused: a base without apt-get" ;; *) fail "a wrong base: $said" ;; esac
    # One that is too old: Debian 11.
    older=$(base_of bullseye)
    ! said=$(build "$older" localhost/never:1 2>&1) || fail "a base with an old Python was taken"
    case $said in
        *"error: BASE=$older has Python 3.9"*"expected Python 3.11 to 3.13: name a newer Debian or Ubuntu"*) say "refused: a base with Python 3.9" ;;
        *) fail "an old base: $said" ;;
    esac
fi
start=$SECONDS
build "$base" "$image" >/dev/null
container=$(buildah from "$image")
root=$(buildah mount "$container")
say "built in $((SECONDS - start)) s, $(du -sh "$root" | cut -f1) on disk"

work=$(mktemp -d)
server= holder=
finish() {
    umount "$work/full" 2>/dev/null || true
    [ -z "$server" ] || kill -TERM "$server" 2>/dev/null || true
    [ -z "$holder" ] || kill -TERM "$holder" 2>/dev/null || true
    buildah umount "$container" >/dev/null || true
    buildah rm "$container" >/dev/null || true
    rm -rf "$work"
}
trap finish EXIT
# setting NAME: what the image says of itself, as an engine reads it: a text, or one line for each of several.
buildah inspect --type image "$image" >"$work/image"
setting() {
    python3 -c 'import json, sys
value = json.load(open(sys.argv[1]))["Docker"]["config"]
for name in sys.argv[2].split("/"):
    value = value.get(name) or ""
print(value if isinstance(value, str) else "\n".join(value))' "$work/image" "$1"
}
expect() { [ "$(setting "$1")" = "$2" ] || fail "the image's $1 is '$(setting "$1")', expected '$2'"; }
inside=80
if [ "$target" = sagemaker ]; then inside=8080; fi
expect User text-generation
expect Volumes /data
expect WorkingDir /data
expect ExposedPorts $inside/tcp
expect StopSignal SIGTERM
expect Labels/org.opencontainers.image.title text-generation
expect Labels/org.opencontainers.image.licenses Apache-2.0
expect Labels/org.opencontainers.image.revision "$commit"
expect Labels/org.opencontainers.image.version "$(sed -n 's/^version = "\(.*\)"$/\1/p' Cargo.toml | head -1)"
expect Labels/org.opencontainers.image.source "$source"
expect Labels/org.opencontainers.image.base.name "$base"
mapfile -t environment < <(setting Env)
mapfile -t entry < <(setting Entrypoint)
mapfile -t health < <(setting Healthcheck/Test)
[ "${health[0]}" = CMD ] || fail "the image has no health check: ${health[*]}"
printf '%s\n' "${environment[@]}" | grep -qx "PORT=$inside" || fail "the image's port is not $inside: ${environment[*]}"
for tool in cc c++ gcc cargo pip git; do
    ! chroot "$root" sh -c "PATH=/opt/text-generation/bin:\$PATH command -v $tool" >/dev/null || fail "$tool is in the image"
done

# Others' packages are of the versions that are pinned, and what is ours brings the notices of what is in it.
chroot "$root" /opt/text-generation/bin/python -B -c '
import importlib.metadata, re
for one in importlib.metadata.distributions():
    print(re.sub("[-_.]+", "-", one.name).lower() + "==" + one.version)' | sort >"$work/packages"
while read -r package; do
    pinned=$(grep -i "^${package%%==*}==" server/requirements.lock || true)
    [ -z "$pinned" ] || [ "${pinned,,}" = "$package" ] || fail "$package is in the image, expected $pinned"
done <"$work/packages"
grep -q '^torch==' "$work/packages" && ! grep -qE '^(pip|pytest|mypy|ruff)==' "$work/packages" || fail "the image has $(tr '\n' ' ' <"$work/packages")"
grep -q "Third-party notices" "$root"/opt/text-generation/lib/python3*/site-packages/text_generation_server-*.dist-info/licenses/THIRD_PARTY_NOTICES ||
    fail "the image has no notices"

# enter MODE ARGUMENT...: this process becomes the entry point, with the image's own environment and what VARIABLES has. MODE
# says what /data is: writable, readonly, full, foreign (another user's); cramped: /tmp has no room; stranger: the process belongs to a user
# whom the image does not know, and /dev/shm has next to no room.
VARIABLES=()
enter() {
    local mode=$1
    shift
    exec unshare --mount --propagation private bash -c '
        set -e
        root=$1 data=$2 mode=$3; shift 3
        mount --bind "$root" "$root"
        mount -t proc proc "$root/proc"
        mount --rbind /dev "$root/dev"
        user=text-generation:text-generation shm=64m tmp=1g
        [ "$mode" != stranger ] || user=4321:4321 shm=4k
        [ "$mode" != cramped ] || tmp=4k
        mount -t tmpfs -o size=$shm,mode=1777 tmpfs "$root/dev/shm"
        mount -t tmpfs -o size=$tmp,mode=1777 tmpfs "$root/tmp"
        [ "$mode" != cramped ] || head -c 8192 /dev/zero >"$root/tmp/taken" 2>/dev/null || true
        mount --bind "$data" "$root/data"
        [ "$mode" != readonly ] || mount -o remount,bind,ro "$root/data"
        mount -o remount,bind,ro "$root"
        exec chroot --userspec=$user "$root" "$@"
    ' enter "$root" "$(data_of "$mode")" "$mode" /usr/bin/env -i "${environment[@]}" HOME=/home/text-generation "${VARIABLES[@]}" "${entry[@]}" "$@"
}
# data_of MODE: the folder that is mounted as /data.
data_of() {
    case $1 in full | foreign) echo "$work/$1" ;; *) echo "$work/data" ;; esac
}
# healthy PROCESS: the health check's own command, beside the process that it judges.
healthy() {
    nsenter --target "$1" --mount --root --wd --setgid 1000 --setuid 1000 \
        /usr/bin/env -i "${environment[@]}" "${VARIABLES[@]}" "${health[@]:1}" 2>"$work/health"
}
mkdir "$work/data" "$work/foreign" "$work/full"
mount -t tmpfs -o mode=1777,size=1m tmpfs "$work/full"
cp -r models/docs-llama-7m-gptq-4bit-g128 "$work/data/model"
chown -R 1000:1000 "$work/data"
port=$(free_port)
VARIABLES=(PORT="$port")
arguments=(--model-id /data/model --quantize gptq)
if [ "$target" = sagemaker ]; then
    VARIABLES+=(HF_MODEL_ID=/data/model HF_MODEL_QUANTIZE=gptq SM_NUM_GPUS=2)
    arguments=()
fi
if [ "$target" = cuda ]; then
    # It is for GPUs, if nothing else is said. Here there is none.
    VARIABLES+=(DEVICE=cpu)
    for architecture in sm_75 sm_80 sm_86 sm_89 sm_90 sm_100; do
        # Whoever the user is: where the image's own setting says.
        found=$(chroot --userspec=4321:4321 "$root" /usr/bin/env -i "${environment[@]}" \
            sh -c "find \"\$KERNEL_CACHE\" -name '*-$architecture-*.cubin' -readable" | wc -l)
        [ "$found" -gt 20 ] || fail "found $found modules of kernels for $architecture, expected more than 20"
    done
    say "kernels for six architectures: $(du -sh "$root/opt/text-generation/kernels" | cut -f1)"
fi
(enter writable "${arguments[@]}") >"$work/log" 2>&1 &
server=$!
# Before anybody listens there, the container is not healthy.
until [ "$(readlink "/proc/$server/root")" = "$root" ]; do sleep 0.05; done
! healthy "$server" || fail "the health check finds a starting container healthy"
grep -q "refused\|503" "$work/health" || { cat "$work/health"; fail "the health check itself does not run"; }
seconds=$(wait_ready "$port" "$server" "$work/log")
say "ready after $seconds s"
answers "$port"
healthy "$server" || fail "the health check finds a serving container unhealthy"
grep -q "native kernels: avx" "$work/log" || { cat "$work/log"; fail "the image's kernels are not used"; }
if [ "$target" = sagemaker ]; then
    [ "$(curl -s -o /dev/null -w '%{http_code}' "http://127.0.0.1:$port/ping")" = 200 ] || fail "/ping is not 200"
    [ "$(grep -c 'rank 1' "$work/log")" -gt 0 ] || fail "SM_NUM_GPUS=2 did not make two ranks"
fi
# A stream that is running when SIGTERM comes is finished.
curl -sN "http://127.0.0.1:$port/generate_stream" -H 'Content-Type: application/json' \
    -d '{"inputs": "In the beginning", "parameters": {"max_new_tokens": 200}}' >"$work/stream" &
stream=$!
until grep -q '^data:' "$work/stream" 2>/dev/null; do sleep 0.05; done
kill -TERM "$server"
wait "$stream" || fail "the stream broke off"
grep '^data:' "$work/stream" | tail -1 | grep -q '"generated_text":"' || fail "SIGTERM cut a stream: $(tail -c 300 "$work/stream")"
code=0; wait "$server" || code=$?; server=
[ "$code" = 0 ] || fail "SIGTERM: found exit code $code, expected 0"
say "a stream was finished after SIGTERM, exit code 0"

if [ "$target" = cpu ]; then
    # As platforms do that give each container a user of its own. Ranks share memory that no mount has to have room for.
    (enter stranger --model-id /data/model --num-shard 2) >"$work/log" 2>&1 &
    server=$!
    wait_ready "$port" "$server" "$work/log" >/dev/null
    say "ready: two ranks as user 4321, with 4 KiB of /dev/shm"
    answers "$port"
    kill -TERM "$server"
    wait "$server" || fail "SIGTERM: found exit code $?, expected 0"
    server=
fi

# What goes wrong, goes wrong at once, with one message, and leaves nothing.
contents() { (cd "$work" && find data full foreign | sort); }
contents=$(contents)
refused() {
    local expected=$1 mode=$2 code=0
    shift 2
    timeout 60 bash -c "$(declare -f enter data_of); $(declare -p root work environment entry VARIABLES); enter \"\$@\"" refused "$mode" "$@" >"$work/log" 2>&1 || code=$?
    [ "$code" != 0 ] && [ "$code" != 124 ] || { cat "$work/log"; fail "$*: found exit code $code"; }
    grep -q -- "$expected" "$work/log" || { cat "$work/log"; fail "$*: expected a message with '$expected'"; }
    # Beside the launcher's own lines there is nothing but that message: no words of a library or of another program.
    [ "$(grep -c 'error: ' "$work/log")" = 1 ] || { cat "$work/log"; fail "$*: expected 'error: ' once"; }
    grep -vE '^[0-9]{4}-[0-9]{2}-[0-9]{2}T[^ ]+ +(INFO|WARN) ' "$work/log" | head -1 | grep -q '^error: ' ||
        { cat "$work/log"; fail "$*: expected no line before the one that begins with 'error: '"; }
    [ "$(contents)" = "$contents" ] || fail "$*: something was left in /data: $(contents)"
    say "refused: $(grep -m1 -- "$expected" "$work/log" | cut -c1-150)"
}
if [ "$target" = cpu ]; then
    refused "unexpected argument '--no-such-flag'" writable --no-such-flag
    refused "there is no such directory; check the path" writable --model-id /data/none
    refused "--device cuda: the NVIDIA driver was not found .*--device cpu" writable --model-id /data/model --device cuda
    refused "chat-template /data/none: cannot be read" writable --model-id /data/model --chat-template /data/none
    refused "cannot be made: No space left on device.*docker run --tmpfs /tmp" cramped --model-id /data/model
    # The image's port is 80, which an engine lets everybody take; here, as on a host's own network, nobody but root may.
    [ "$(cat /proc/sys/net/ipv4/ip_unprivileged_port_start)" -le 80 ] ||
        refused "ports below 1024 are reserved for root; choose another port" writable --model-id /data/model --port 80
    python3 -c '
import socket, sys, time
with socket.create_server(("0.0.0.0", int(sys.argv[1]))):
    print("listening", flush=True)
    time.sleep(60)' "$port" >"$work/holder" & holder=$!
    until [ -s "$work/holder" ]; do kill -0 "$holder" || fail "port $port cannot be taken"; sleep 0.1; done
    refused "it is in use; end what listens there" writable --model-id /data/model
    kill "$holder"
    chmod 000 "$work/data/model/model.safetensors"
    refused "model.safetensors.*Permission denied" writable --model-id /data/model
    VARIABLES+=(HF_ENDPOINT=http://127.0.0.1:9)
    refused "the hub cannot be asked" writable --model-id org/model
    # A hub that has the model, but no room for it here.
    PYTHONPATH=server/tests .venv/bin/python -c '
import sys, time
from pathlib import Path
from standin_hub import Hub
with Hub() as hub:
    hub.models["org/model"] = {path.name: path.read_bytes() for path in Path("models/docs-llama-7m").iterdir() if path.is_file()}
    print(hub.address, flush=True)
    time.sleep(300)' >"$work/hub" 2>"$work/hub-log" & holder=$!
    until [ -s "$work/hub" ]; do sleep 0.1; done
    VARIABLES+=(HF_ENDPOINT="$(cat "$work/hub")" HF_HUB_DISABLE_XET=1)
    refused "cache /data has no room for it: 13.9 MB are to be fetched, 1.0 MB are free" full --model-id org/model
    refused "cache /data cannot be written: Read-only file system" readonly --model-id org/model
    refused "cache /data cannot be written: Permission denied" foreign --model-id org/model
    kill "$holder"
elif [ "$target" = cuda ]; then
    VARIABLES=(PORT="$port")
    refused "--device cuda: the NVIDIA driver was not found .*--device cpu" writable --model-id /data/model
else
    VARIABLES=(PORT="$port")
    refused "HF_MODEL_ID is not set" writable
fi
say "done"
