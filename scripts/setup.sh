#!/usr/bin/env bash
# Make .venv and install the project in it, editable. Takes about two minutes the first time; says what it
# does on stderr, keeps everything that pip says in .venv/setup.log, and reads nothing from stdin.
#
#   PYTHON       the interpreter to build .venv from (default: the first of python3, python3.14 .. python3.11
#                that is 3.11 or later)
#   TORCH_INDEX  the index to take torch from (default: pip's own). Where that offers a CUDA build and there
#                is no GPU, https://download.pytorch.org/whl/cpu saves some gigabytes.
set -euo pipefail
cd "$(dirname "$0")/.."
exec </dev/null 1>&2

say() { printf 'setup: %s\n' "$*"; }
die() { say "$*"; exit 1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

# Show only what is worth waiting for: large downloads, and the long silence while files are laid out.
progress() {
    awk '/^ *(Downloading|Processing|Using cached) .*(MB\)|\/torch-)/ { sub(/^ */, ""); print "setup:   " $0; fflush() }
         /^Installing collected packages/ { print "setup:   unpacking " NF - 3 " packages"; fflush() }'
}

pip_install() {
    if ! .venv/bin/python -m pip install --no-input --disable-pip-version-check --progress-bar off "$@" 2>&1 |
        tee -a .venv/setup.log | progress; then
        tail -n 20 .venv/setup.log
        die "pip failed; all of its output is in .venv/setup.log"
    fi
}

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python) ||
        die "Python 3.11 or later is needed and was not found; name one with PYTHON=/path/to/python3"
    say "creating .venv with $("$python" --version)"
    "$python" -m venv --clear .venv || die "cannot create .venv; on Debian and Ubuntu: apt install python3-venv"
fi
: >.venv/setup.log

# First and alone, so that the index chosen for it serves nothing else.
torch=$(sed -n 's/^ *"\(torch[><=][^"]*\)",$/\1/p' pyproject.toml)
say "installing $torch"
pip_install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$torch"

say "installing apiary and its dependencies"
pip_install --editable '.[server,bench,dev]'
say "done"
