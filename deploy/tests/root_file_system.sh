#!/usr/bin/env bash
# root_file_system.sh SUITE FOLDER: a minimal Debian or Ubuntu, from the mirror that this machine's own apt uses.
# KEYRING=none takes packages unchecked, for a distribution whose keys this machine does not have.
set -euo pipefail
suite=$1 folder=$2
[ ! -e "$folder/etc/os-release" ] || exit 0
command -v debootstrap >/dev/null || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq debootstrap >/dev/null; }
# The first address of apt's sources; MIRROR names another, for a distribution that is not this machine's.
mirror=${MIRROR:-$(sed -nE 's/^(URIs:|deb .*)[^#]* ?(https?:[^ ]+).*/\2/p' $(find /etc/apt/sources.list /etc/apt/sources.list.d -name '*.sources' -o -name '*.list' 2>/dev/null) | head -1)}
[ -n "$mirror" ] || { echo "root_file_system: error: apt's sources name no mirror; name one with MIRROR=..." >&2; exit 1; }
script=/usr/share/debootstrap/scripts/$suite
# An Ubuntu that is newer than this machine's debootstrap is made as every Ubuntu is.
[ -e "$script" ] || script=/usr/share/debootstrap/scripts/gutsy
components=main
# Public images of Ubuntu have its universe, where venv and rustup stand.
[ "$(readlink -f "$script")" != /usr/share/debootstrap/scripts/gutsy ] || components=main,universe
mkdir -p "$(dirname "$folder")"
rm -rf "$folder.new"
debootstrap --variant=minbase --components=$components $([ "${KEYRING:-}" = none ] && echo --no-check-gpg) "$suite" "$folder.new" "$mirror" "$script" >"$folder.log" 2>&1 || { tail -5 "$folder.log" >&2; exit 1; }
for path in /etc/apt/sources.list.d/debian.sources; do
    # With security updates, as a public image has them.
    if [ "$suite" = "$(. /etc/os-release && echo "$VERSION_CODENAME")" ] && [ -e $path ]; then
        cp $path "$folder.new$path" && rm -f "$folder.new/etc/apt/sources.list"
    fi
done
mv "$folder.new" "$folder"
