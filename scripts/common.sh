# Sourced by the scripts beside it and by the Makefile, in the repository's root; for any shell.

say() { printf 'install: %s\n' "$*"; }
fail() { printf 'install: error: %s\n' "$*" >&2; exit 1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; elif command -v sudo >/dev/null; then sudo "$@"; else return 1; fi
}

export PATH="$HOME/.cargo/bin:$PATH"
# What programs say that they are made from; the same everywhere, so that no step builds again what another has built. Where
# there is no repository, whoever builds may say it.
GIT_COMMIT=$(git rev-parse --short=12 HEAD 2>/dev/null || printf %s "${GIT_COMMIT:-}")
export GIT_COMMIT
