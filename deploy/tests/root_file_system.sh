#!/usr/bin/env bash
# root_file_system.sh SUITE FOLDER: a minimal Debian or Ubuntu, from the mirror that this machine's own apt uses.
set -euo pipefail
suite=$1 folder=$2
[ ! -e "$folder/etc/os-release" ] || exit 0
command -v debootstrap >/dev/null || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq debootstrap >/dev/null; }
# The first address of apt's sources; MIRROR names another, for a distribution that is not this machine's.
mirror=${MIRROR:-$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list 2>/dev/null |
    grep -oE '(https?|mirror\+file):[^ ]+' | head -1)}
mkdir -p "$(dirname "$folder")"
rm -rf "$folder.new"
debootstrap --variant=minbase "$suite" "$folder.new" "$mirror" >"$folder.log" 2>&1 || { tail -5 "$folder.log" >&2; exit 1; }
for path in /etc/apt/sources.list.d/debian.sources; do
    # With security updates, as a public image has them.
    if [ "$suite" = "$(. /etc/os-release && echo "$VERSION_CODENAME")" ] && [ -e $path ]; then
        cp $path "$folder.new$path" && rm -f "$folder.new/etc/apt/sources.list"
    fi
done
mv "$folder.new" "$folder"
