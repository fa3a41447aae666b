#!/bin/sh
# Makes .venv with the packages of requirements.lock and this package, editable. `make setup` is the way to call it.
# Once that is done it runs no pip command, so it needs no network.
#
# From the environment, all optional:
#   PYTHON       the Python to make .venv with; another version than .venv's makes it anew (default: python3, or the
#                first of python3.13, python3.12, python3.11 where that one is older than 3.11)
#   TORCH        the build of torch, a pip requirement or a wheel (default: the one chosen last time, else the lock's)
#   TORCH_INDEX  an index to look for it in, besides pip's own
#
# .venv/installed says what was installed, and is compared by content: checking out another branch and back installs
# nothing. .venv-unfinished is there while pip works. Where a setup finds it at its start, the one before was killed
# at a point that nobody knows, and .venv is made anew. After a failure that pip reported itself, pip goes on in place.
set -eu
cd "$(dirname "$0")/.."

venv=.venv
python=$venv/bin/python
record=$venv/installed
unfinished=.venv-unfinished

fail() {
    echo "make setup: $*" >&2
    exit 1
}

recorded() {  # the value of one line of the record, nothing where there is none
    if [ -f "$record" ]; then sed -n "s/^$1=//p" "$record"; fi
}

supported() {  # whether a Python is there and new enough
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

described() {  # what a Python says of itself, in one line
    if command -v "$1" >/dev/null; then "$1" --version 2>&1 | head -n 1; else echo missing; fi
}

version() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

choose_python() {
    if [ -z "${PYTHON:-}" ]; then
        for PYTHON in python3 python3.13 python3.12 python3.11; do
            if supported "$PYTHON"; then break; fi
        done
        supported "$PYTHON" || fail "found no Python 3.11 or newer (python3: $(described python3));" \
            "install one, or name one elsewhere: make setup PYTHON=/opt/python/bin/python3.12"
    fi
    command -v "$PYTHON" >/dev/null || fail "there is no '$PYTHON' here; name a Python 3.11 or newer: make setup PYTHON=python3.12"
    supported "$PYTHON" || fail "'$PYTHON' is no Python 3.11 or newer (it says: $(described "$PYTHON"));" \
        "name another: make setup PYTHON=python3.12"
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || fail "'$PYTHON' cannot make virtual environments; install its venv" \
        "module (Debian and Ubuntu: the package python3-venv), or name another: make setup PYTHON=python3.12"
}

pip_install() {
    "$python" -m pip --disable-pip-version-check --no-input install "$@"
}

install() {
    # The lock without torch: TORCH decides that one, and the other pins bind what torch itself asks for.
    grep -v '^torch==' requirements.lock > $venv/requirements.txt &&
        pip_install --quiet "$(grep '^pip==' requirements.lock)" &&
        pip_install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --constraint $venv/requirements.txt \
            "${TORCH:-$(grep '^torch==' requirements.lock)}" &&
        pip_install --quiet --requirement $venv/requirements.txt &&
        pip_install --quiet --no-deps --no-build-isolation --editable . &&
        "$python" -m pip check
}

if [ -z "${TORCH:-}" ]; then
    TORCH=$(recorded torch)
    TORCH_INDEX=${TORCH_INDEX:-$(recorded torch_index)}
fi
folder=$(pwd)
pins=$(cat requirements.lock pyproject.toml | cksum)
wanted="folder=$folder
torch=$TORCH
torch_index=${TORCH_INDEX:-}
pins=$pins"

# Whether .venv has to be made anew: half made, moved (its scripts hold the folder), of another build of torch (which
# pip takes for the same version), of another Python, or broken.
anew=no
if [ -e $unfinished ] || ! supported $python || ! $python -m pip --version >/dev/null 2>&1; then
    anew=yes
elif [ -f $record ] && [ "$(recorded folder)|$(recorded torch)|$(recorded torch_index)" != "$folder|$TORCH|${TORCH_INDEX:-}" ]; then
    anew=yes
elif [ -n "${PYTHON:-}" ] && [ "$(version "$PYTHON")" != "$(version $python)" ]; then
    anew=yes
fi

if [ $anew = no ] && [ -f $record ] && [ "$(cat $record)" = "$wanted" ]; then exit 0; fi

if [ $anew = yes ]; then choose_python; fi
touch $unfinished
if [ $anew = yes ]; then
    echo "Making $venv with $("$PYTHON" --version)"
    "$PYTHON" -m venv --clear $venv
fi
echo "Installing torch and the packages of requirements.lock, some minutes the first time"
if install; then
    echo "$wanted" > $record
    rm -f $unfinished
    echo "$venv is ready"
else
    rm -f $unfinished
    fail "the installation failed, see above; the next \`make setup\` goes on from here"
fi
