#!/bin/sh
# Put the locked packages into a virtual environment; do nothing if they are there.
#
#   sh environment/setup.sh FOLDER REQUIREMENTS    make FOLDER (.venv) hold what REQUIREMENTS pins
#   sh environment/setup.sh --bin                  print the folder of the Python to use
#
# .venv gets this project too, in editable form, and with it the command `runkey`.  An active conda
# environment that holds exactly the packages of conda-lock.yml is used instead of .venv and gets the
# project in the same way; nothing else outside FOLDER is changed.  An interrupted set-up starts again
# from an empty folder.
set -eu

# What a shell may hold that would send packages, scripts or this one elsewhere.  Indexes, proxies
# and caches of pip and uv stay.
unset CDPATH PYTHONHOME PYTHONSAFEPATH PYTHONOPTIMIZE PYTHONINSPECT PYTHONWARNINGS
unset UV_PYTHON UV_PROJECT UV_WORKING_DIR UV_SYSTEM_PYTHON UV_NO_VERIFY_HASHES UV_TORCH_BACKEND
unset UV_CONSTRAINT UV_BUILD_CONSTRAINT UV_OVERRIDE UV_EXCLUDE_NEWER
for name in $(set | sed -n 's/^\(PIP_[A-Z_]*\)=.*/\1/p'); do
  case $name in
    *INDEX* | *CERT | *HOST | *CACHE* | PIP_PROXY | PIP_FIND_LINKS | PIP_CONFIG_FILE | *TIMEOUT | PIP_RETRIES) ;;
    *) unset "$name" ;;
  esac
done
export LC_ALL=C.UTF-8 # setuptools writes the path of this folder in the locale's encoding
[ -d "${TMPDIR:-/tmp}" ] || unset TMPDIR

stop() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# conda keeps one file per installed build, named as the build's archive is.
conda_holds_the_lock() {
  [ -n "${CONDA_PREFIX:-}" ] && [ -x "$CONDA_PREFIX/bin/python" ] || return 1
  sed -n 's|^  url: .*/\(.*\)\.conda$|\1|p; s|^  url: .*/\(.*\)\.tar\.bz2$|\1|p' conda-lock.yml |
    while read -r build; do
      [ -f "$CONDA_PREFIX/conda-meta/$build.json" ] || exit 1
    done
}

is_python_312() {
  "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1
}

find_python() {
  for candidate in python3.12 python3 python; do
    if is_python_312 "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  candidate=$(uv python find --no-project 3.12 2>/dev/null) && is_python_312 "$candidate" &&
    printf '%s\n' "$candidate" && return
  stop "Python 3.12 is not on PATH: install your system's python3.12 and python3.12-venv, or run" \
    "\`pyenv install 3.12\`, \`uv python install 3.12\` or \`conda create -n python312 python=3.12\`" \
    "(and activate it), then try again"
}

# The lines of one package in a hashed requirements file.
pin_of() {
  awk -v start="$1==" 'index($0, start) == 1 { on = 1 } on { print; if ($0 !~ /\\$/) exit }' "$2"
}

# uv from PATH, from the finished .venv, or the pinned one in a place of its own inside $folder.
find_uv() {
  for candidate in uv .venv/bin/uv "$folder/bootstrap/uv/bin/uv"; do
    if "$candidate" --version >/dev/null 2>&1; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  "$python" -m venv "$folder/bootstrap" >/dev/null 2>&1 ||
    stop "$python cannot make virtual environments: install your system's python3.12-venv"
  pin_of uv requirements.txt >"$folder/bootstrap/uv.txt"
  # A pip.conf may name another target, or the user's.
  "$folder/bootstrap/bin/python" -m pip --quiet --disable-pip-version-check --no-input install \
    --no-user --target "$folder/bootstrap/uv" --require-hashes --requirement "$folder/bootstrap/uv.txt" >"$folder/bootstrap/log" 2>&1 || {
    cat "$folder/bootstrap/log" >&2
    stop "uv could not be installed; see the lines above, then try again"
  }
  printf '%s\n' "$folder/bootstrap/uv/bin/uv"
}

# The path is part of both stamps: scripts and the editable install hold it, so a copied or moved
# folder is set up again.
packages_stamp() { pwd && cat "$requirements"; }
project_stamp() { pwd && cat pyproject.toml runkey/version.py; }

# Whether Python and DVC start, and $folder was set up for this path: a script names the Python of
# the folder that it was installed into.
is_whole() {
  is_python_312 "$folder/bin/python" && [ ! -e "$folder/unfinished" ] &&
    { [ ! -f "$stamp" ] || [ "$(sed -n 1p "$stamp")" = "$PWD" ]; } &&
    { ! grep -q '^dvc==' "$requirements" || [ ! -f "$stamp" ] || dvc_starts; }
}
dvc_starts() { "$folder/bin/dvc" --version >/dev/null 2>&1; }

# Install the project in editable form into the environment at $1 by the uv at $2 (none: find one).
# Needs no network: setuptools, which builds it, is locked.
install_project() {
  if [ -x "$1/bin/runkey" ] && project_stamp | cmp -s - "$1/runkey.installed"; then return; fi
  rm -f "$1/runkey.installed"
  [ $# -gt 1 ] || set -- "$1" "$(find_uv)"
  "$2" pip install --quiet --offline --no-deps --no-build-isolation --reinstall-package runkey \
    --python "$1/bin/python" --editable . || {
    echo >&2 # uv's last line may not be ended
    stop "runkey could not be installed into $1; see the lines above, then try again"
  }
  # Python drops blanks, also U+202F and the like, from the end of a line of a .pth file.
  for path_file in "$1"/lib/python3.12/site-packages/__editable__.runkey-*.pth; do
    printf '%s/.\n' "$PWD" >"$path_file"
  done
  project_stamp >"$1/runkey.installed"
}

cd "$(dirname "$0")/.."

if [ "$1" = --bin ]; then
  if conda_holds_the_lock; then printf '%s/bin\n' "$CONDA_PREFIX"; else echo .venv/bin; fi
  exit
fi

folder=$1
requirements=$2
stamp=$folder/requirements.installed

if [ "$folder" = .venv ] && conda_holds_the_lock; then
  install_project "$CONDA_PREFIX" "$CONDA_PREFIX/bin/uv"
  exit
fi
if [ -f "$stamp" ] && packages_stamp | cmp -s - "$stamp" && is_whole; then
  [ "$folder" != .venv ] || install_project .venv
  exit
fi

[ "$(uname -sm)" = "Linux x86_64" ] || stop "the packages are locked for Linux on x86_64, not for $(uname -sm)"
case $PWD in
  *:* | *"
"* | *"$(printf '\r')"* | *"$(printf '\t')"*)
    stop "$PWD: PATH and scripts cannot hold a folder with a colon, tab or line break in its name; rename it" ;;
esac
python=$(find_python)
is_whole || rm -rf "$folder"
printf 'environment: %s packages of %s into %s (some minutes the first time)\n' \
  "$(grep -c == "$requirements")" "$requirements" "$folder"
mkdir -p "$folder"
: >"$folder/unfinished"
rm -f "$stamp"
[ -x "$folder/bin/python" ] || "$python" -m venv --without-pip "$folder" ||
  stop "$python cannot make virtual environments: install your system's python3.12-venv"
if [ -z "${UV_CACHE_DIR:-}${XDG_CACHE_HOME:-}" ] && [ ! -w "${HOME:-/nowhere}" ]; then
  export UV_CACHE_DIR="$PWD/$folder/cache" # uv's own is below HOME
fi
uv=$(find_uv)
quiet=--quiet
[ ! -t 2 ] || quiet=
UV_PYTHON_DOWNLOADS=never "$uv" pip sync $quiet --require-hashes --python "$folder/bin/python" "$requirements" ||
  stop "$requirements could not be installed into $folder; see the lines above, then try again"
if [ "$folder" = .venv ]; then
  # What was installed before is no longer there, or was built for another folder.
  rm -f .venv/runkey.installed
  install_project .venv "$uv"
fi
! grep -q '^dvc==' "$requirements" || dvc_starts || stop "$folder/bin/dvc does not start; \`rm -rf $folder && make env\` makes it anew"
packages_stamp >"$stamp"
rm -rf "$folder/unfinished" "$folder/cache"
