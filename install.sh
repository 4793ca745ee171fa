#!/bin/sh
# Prepares .venv in this checkout and runs crmbridge or its tests from it; needs no root.
# `./install.sh help` says how to use it.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P)
venv=$root/.venv
stamp=$venv/crmbridge.stamp             # what the runtime packages were installed from; written last
test_stamp=$venv/crmbridge.test-stamp   # the same for the test packages
unfinished=$venv/crmbridge.unfinished   # there only while test packages are being installed
layout=1                                # raise it when a change below must remake every .venv

# Settings meant for another Python must not leak into ours.
unset PYTHONHOME PYTHONPATH

usage() {
    cat <<END
Usage: ./install.sh COMMAND [ARGUMENT ...]

  demo [ARGUMENT ...]   start the bridge with a local Instagram and a sample CRM, carry a message
                        both ways, show every hop, and keep serving until Ctrl-C
                        (demo --once: exit after the round trip)
  test [ARGUMENT ...]   run the test suite; the arguments are pytest's
  help                  this text

Both make .venv in this checkout when it is missing, broken or out of date, and install the pinned
packages there. Afterwards .venv/bin/crmbridge is the command line.
PYTHON=/path/to/python3 chooses the Python (3.11 to 3.14).

The production install (root, service, upgrades) is not part of this script yet; it comes later.
END
}

say() {
    printf 'install.sh: %s\n' "$*" >&2
}

# Stops; the first line says what is wrong, the others why and what to type.
stop() {
    say "$1"
    shift
    if [ $# -gt 0 ]; then printf '  %s\n' "$@" >&2; fi
    exit 1
}

# Prints "ok", or the first thing that the Python $1 lacks.
probe() {
    "$1" -c '
import sys
def lack():
    if not (3, 11) <= sys.version_info[:2] <= (3, 14):
        return "version %d.%d" % sys.version_info[:2]
    for name in ("venv", "ensurepip", "ssl", "sqlite3"):
        try:
            __import__(name)
        except ImportError:
            return "module " + name
    return "ok"
print(lack())' 2>/dev/null || echo broken
}

# Sets $python to one that can run crmbridge, or stops saying what to install.
choose_python() {
    if [ -n "${PYTHON:-}" ]; then
        set -- "$PYTHON"
    else
        set -- python3 python3.13 python3.12 python3.11 python3.14
    fi
    lacks_module='' wrong_version=''
    for candidate; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        state=$(probe "$candidate")
        case $state in
            ok)
                python=$(command -v "$candidate")
                # in an activated .venv it is the one about to be removed
                case $python in "$venv"/*) python=$("$python" -c 'import sys; print(sys._base_executable)') ;; esac
                return
                ;;
            module*) lacks_module=${lacks_module:-"$candidate has no ${state#module }"} ;;
            version*) wrong_version=${wrong_version:-"$candidate is Python ${state#version }"} ;;
            # a version manager's stand-in for a Python that isn't installed ends here too
            *) if [ -n "${PYTHON:-}" ]; then wrong_version="$candidate does not run as a Python"; fi ;;
        esac
    done
    gentoo='  Gentoo:  emerge --ask dev-lang/python:3.13'
    debian='  Debian:  apt install python3 python3-venv'
    if [ -n "$lacks_module" ]; then
        stop "the Python found is incomplete: $lacks_module module." \
            "crmbridge needs Python's venv, ensurepip, ssl and sqlite3 modules. Install them:" \
            "  Gentoo:  echo 'dev-lang/python ensurepip sqlite ssl' >> /etc/portage/package.use/crmbridge" \
            "           emerge --ask --newuse dev-lang/python" "$debian" \
            "or name a complete Python:  PYTHON=/path/to/python3 ./install.sh ..."
    elif [ -n "$wrong_version" ]; then
        stop "no suitable Python: $wrong_version." \
            "crmbridge runs on Python 3.11, 3.12, 3.13 and 3.14. Install one of them:" "$gentoo" "$debian" \
            "or name one:  PYTHON=/path/to/python3 ./install.sh ..."
    elif [ -n "${PYTHON:-}" ]; then
        stop "no suitable Python: PYTHON=$PYTHON is not a program." \
            "Unset PYTHON, or name a Python 3.11, 3.12, 3.13 or 3.14 with it."
    fi
    stop "no suitable Python: there is no python3 in PATH." \
        "crmbridge runs on Python 3.11, 3.12, 3.13 and 3.14. Install one of them:" "$gentoo" "$debian"
}

# Prints what must stay the same for a .venv of the Python $1 to stay usable.
identify() {
    "$1" -c 'import sys, sysconfig; print(sysconfig.get_config_var("SOABI"), sys.base_prefix)' 2>/dev/null
}

# Prints the stamp that the .venv should bear by now; fails when its Python does not run.
wanted_stamp() {
    identity=$(identify "$venv/bin/python") || return 1
    sum=$(sha256sum <"$root/requirements.txt")
    printf '%s\n' "layout $layout" "$root" "$identity" "${sum%% *}"
}

# True when the .venv can be used as it is. An explicit $PYTHON must be the one it was made with.
is_ready() {
    [ -f "$stamp" ] && [ ! -e "$unfinished" ] || return 1
    wanted=$(wanted_stamp) || return 1
    [ "$(cat "$stamp")" = "$wanted" ] || return 1
    [ -z "${PYTHON:-}" ] || [ "$(identify "$PYTHON")" = "$(identify "$venv/bin/python")" ]
}

# Installs the pinned set $1 into the .venv: wheels only, every hash checked, silent unless it fails.
install_pinned() {
    if ! log=$(PIP_USER=0 "$venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check \
        --only-binary :all: --require-hashes -r "$1" 2>&1); then
        printf '%s\n' "$log" >&2
        return 1
    fi
}

stop_at_pip() {
    stop "installing the packages failed; what pip said stands above." \
        "pip must reach a package index over HTTPS; behind a proxy or with a mirror of your own, set" \
        "HTTPS_PROXY or PIP_INDEX_URL. Only ready-made wheels are used: 64-bit x86 or ARM Linux has them." \
        "Then run the same command again; it starts afresh."
}

# Makes the .venv anew. The stamp comes last, so a run that is cut short is seen and redone.
build_venv() {
    choose_python
    say "installing crmbridge's packages into .venv (the first time takes a minute)"
    rm -rf -- "$venv"
    if ! log=$("$python" -m venv "$venv" 2>&1); then
        printf '%s\n' "$log" >&2
        stop "$python could not make a virtual environment in $venv; what it said stands above." \
            "Often the venv or ensurepip module is missing, or the disk is full. The modules come with:" \
            "  Gentoo:  dev-lang/python with USE=ensurepip" \
            "  Debian:  apt install python3-venv"
    fi
    install_pinned "$root/requirements.txt" || stop_at_pip
    site_packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    printf '%s\n' "$root" >"$site_packages/crmbridge.pth"
    # A shell script, because a #! line can name no Python below a path with spaces; -P keeps what
    # lies in the current directory from being imported.
    cat >"$venv/bin/crmbridge" <<'END'
#!/bin/sh
exec "$(dirname -- "$(readlink -f -- "$0")")/python" -P -m crmbridge "$@"
END
    chmod 755 "$venv/bin/crmbridge"
    wanted_stamp >"$stamp.new"
    mv -f -- "$stamp.new" "$stamp"
}

add_test_packages() {
    sum=$(sha256sum <"$root/tests/requirements.txt")
    if [ -f "$test_stamp" ] && [ "$(cat "$test_stamp")" = "$sum" ]; then return; fi
    say "installing the test packages into .venv"
    : >"$unfinished"
    # pip undoes what it can't finish; only a killed one leaves the .venv in doubt, and the mark with it
    install_pinned "$root/tests/requirements.txt" || { rm -f -- "$unfinished"; stop_at_pip; }
    printf '%s\n' "$sum" >"$test_stamp"
    rm -f -- "$unfinished"
}

# Brings the .venv up to date, for "$1" = test with the test packages; one run at a time.
prepare() {
    if command -v flock >/dev/null 2>&1; then flock 9; fi
    is_ready || build_venv
    if [ "$1" = test ]; then add_test_packages; fi
}

command=${1:-}
if [ $# -gt 0 ]; then shift; fi
case $command in
    demo)
        prepare demo 9<"$root/install.sh"
        exec "$venv/bin/crmbridge" demo "$@"
        ;;
    test)
        prepare test 9<"$root/install.sh"
        cd -- "$root"
        exec "$venv/bin/python" -m pytest "$@"
        ;;
    help | -h | --help)
        usage
        ;;
    '')
        usage >&2
        exit 2
        ;;
    *)
        say "there is no command '$command'"
        usage >&2
        exit 2
        ;;
esac
