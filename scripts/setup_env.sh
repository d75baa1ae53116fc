# Finds or makes the Python that runs this repository: `source scripts/setup_env.sh run` sets PYTHON.
#
# An environment that has all that is needed is used as it is: the active one first, then .venv in the
# repository, then the machine's python3. Where none has, .venv is made and the project installed in it,
# once for each state of pyproject.toml. `dev` in place of `run` also asks for what the tests need.

_say() { echo "[setup] $*" >&2; }

_fail() {
    _say "$*"
    exit 1
}

# The modules that pyproject.toml's dependencies bring, with those of its group $1 where one is given.
_modules() {
    awk -v group="${1:-none}" '
        $0 ~ "^(dependencies|" group ") = \\[" { listed = 1 }
        listed { print }
        /\]$/ { listed = 0 }' "$_repo/pyproject.toml" |
        grep -o '"[A-Za-z][A-Za-z0-9_-]*' | tr -d '"' | tr - _
}

# Whether the Python $1 finds all modules $2...; reads no module, so it costs a blink.
_has_modules() {
    local python=$1
    shift
    "$python" -c 'import sys; from importlib.util import find_spec
sys.exit(not all(map(find_spec, sys.argv[1:])))' "$@" 2>/dev/null
}

_install() {
    local base=$1 extra=$2 stamp=$3
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        _fail "Python 3.10 or newer is needed; $base is $("$base" --version 2>&1)."
    if [[ ! -x $_venv/bin/python ]]; then
        _say "making $_venv with $("$base" --version 2>&1)"
        "$base" -m venv "$_venv" ||
            _fail "could not make $_venv (Debian and Ubuntu: apt-get install python3-venv)."
    fi
    _say "installing torchtitan and its dependencies, once; PyTorch takes a minute or more"
    "$_venv/bin/python" -m pip install --disable-pip-version-check -e "$_repo${extra:+[$extra]}" 2>&1 |
        { grep --line-buffered -v '^Requirement already satisfied' || true; } >&2 ||
        _fail "pip failed, see above; nothing is used half done: start again when its cause is gone."
    touch "$_venv/installed-$stamp" ${extra:+"$_venv/installed-${stamp#"$extra-"}"}
    _say "done"
}

_setup() {
    local extra=${1#run} active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}} modules stamp
    mapfile -t modules < <(_modules "$extra")
    stamp=${extra:+$extra-}$(cksum <"$_repo/pyproject.toml" | cut -d' ' -f1)

    if [[ -n $active && $active != "$_venv" ]]; then
        PYTHON=$active/bin/python
        _has_modules "$PYTHON" "${modules[@]}" && return
        _say "the active environment $active lacks some of: ${modules[*]}; using $_venv"
    fi
    PYTHON=$_venv/bin/python
    [[ -e $_venv/installed-$stamp ]] && return
    local base
    base=$(command -v python3 || command -v python) || _fail "no python3 found; install Python 3.10 or newer."
    if [[ ! -d $_venv ]] && _has_modules "$base" "${modules[@]}"; then
        PYTHON=$base
        return
    fi

    mkdir -p "$_venv"
    # Two launches may start at once: the second waits, and finds all done.
    exec {_lock}>"$_venv/lock"
    if command -v flock >/dev/null && ! flock --nonblock "$_lock"; then
        _say "another launch is installing; waiting for it"
        flock "$_lock"
    fi
    [[ -e $_venv/installed-$stamp ]] || _install "$base" "$extra" "$stamp"
    exec {_lock}>&-
}

_repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
_venv=$_repo/.venv
_setup "$@"
export PYTHON
