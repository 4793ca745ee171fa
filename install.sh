#!/bin/sh
# Installs crmbridge on a server (as root), or runs it and its tests from this checkout (as anyone).
# `./install.sh help` says how to use it. From top to bottom: words, Python, the server, the bundle, the checkout.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P)
me=${bundle_file:+"sh $bundle_file"} # what to type to come here again
me=${me:-$root/install.sh}

# The server's folders; README.md, "On a server", says what lies where.
opt=/opt/crmbridge
etc=/etc/crmbridge
ini=$etc/crmbridge.ini
data=/var/lib/crmbridge
logs=/var/log/crmbridge
user=crmbridge
journal=$opt/.moving     # there only while the service is moved from one version to another: from, to, was, previous
shipped="crmbridge static api-spec.yaml crmbridge.ini install.sh openrc requirements.txt README.md"
code_mb=200 memory_mb=200 # what must be free: an installation takes about half of it
least_sqlite=3.35.0       # DROP COLUMN, by which a schema goes back
year=2026                 # a clock that shows an earlier one is wrong

venv=$root/.venv # the environment that is worked on

# Settings meant for another Python must not leak into ours.
unset PYTHONHOME PYTHONPATH

usage() {
    cat <<END
Usage: ./install.sh COMMAND [ARGUMENT ...]

On a server with OpenRC, as root:
  install               install this version and start it; over an older one: upgrade; again: nothing
  upgrade               the same, but only where crmbridge is installed
  rollback              back to the version before; what was accepted in between is kept
  repair                make it run again when the Python it was installed with is gone, or files are damaged
  uninstall [--purge]   remove the service and the code; --purge also configuration, data, logs and user
  status                what is installed, whether it runs, and where its files are

Anywhere, in this checkout:
  bundle [FILE]         make one file of this version and the packages it needs, for a server without
                        a package index: sh FILE install
  demo [ARGUMENT ...]   start the bridge with a local Instagram and a sample CRM, carry a message
                        both ways, show every hop, and keep serving until Ctrl-C
                        (demo --once: exit after the round trip)
  test [ARGUMENT ...]   run the test suite; the arguments are pytest's
  help                  this text

demo and test make .venv in this checkout when it is missing, broken or out of date, and install
the pinned packages there. Afterwards .venv/bin/crmbridge is the command line. Only ready-made packages
are used; nothing is ever compiled.
PYTHON=/path/to/python3 chooses the Python (3.11 to 3.14).
END
}

# --- words ---

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

# Says one thing that was done, on the server.
tell() {
    printf '  %-9s%s\n' "$1" "$2"
}

# --- Python ---

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

# Installs the pinned set $1 into the environment: wheels only, every hash checked, silent unless it fails.
# More arguments are pip's.
install_pinned() {
    requirements=$1
    shift
    if ! log=$(PIP_USER=0 "$venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check \
        --only-binary :all: --require-hashes -r "$requirements" "$@" 2>&1); then
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

# Makes an empty environment of $python.
make_venv() {
    rm -rf -- "$venv"
    if ! log=$("$python" -m venv "$venv" 2>&1); then
        printf '%s\n' "$log" >&2
        stop "$python could not make a virtual environment in $venv; what it said stands above." \
            "Often the venv or ensurepip module is missing, or the disk is full. The modules come with:" \
            "  Gentoo:  dev-lang/python with USE=ensurepip" \
            "  Debian:  apt install python3-venv"
    fi
}

# Lets the environment find the package crmbridge in the folder $1, which may be relative to site-packages.
point_venv() {
    site_packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    printf '%s\n' "$1" >"$site_packages/crmbridge.pth"
}

# --- the server: what must be there ---

need_root() {
    PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin # a plain su leaves them out
    cd / # Python imports from where it is started, and anybody may write to a folder such as /tmp
    # the service does not have what overrides its configuration, or changes Python, in this shell
    for name in $(env | sed -nE 's/^(CRMBRIDGE_[A-Z_]+|PYTHON[A-Z0-9_]+)=.*/\1/p'); do unset "$name"; done
    [ "$(id -u)" = 0 ] && return
    stop "this needs root." "Type:  sudo $me $command" "Without root, 'crmbridge init' and 'crmbridge serve' run it in any folder."
}

need_openrc() {
    for tool in rc-service rc-update supervise-daemon; do
        command -v "$tool" >/dev/null 2>&1 && continue
        stop "there is no OpenRC here ($tool is missing), and the service is made for it." \
            "Without it crmbridge runs by hand, or by whatever starts services here:" \
            "  $root/install.sh demo --once      makes .venv with the program, in a checkout" \
            "  $root/.venv/bin/crmbridge init    in a folder of its own: configuration, key file, database" \
            "  $root/.venv/bin/crmbridge serve   stops on SIGTERM; let it be started again when it ends"
    done
    [ -e /run/openrc/softlevel ] && return
    stop "OpenRC is installed but did not start this system: it cannot start a service." \
        "In a container or chroot:  openrc default   first. A new system: install crmbridge after its first boot."
}

# One run at a time. What a killed run left at work still holds the lock, and is waited for.
take_turn() {
    command -v flock >/dev/null 2>&1 || stop "flock is missing." "It comes with util-linux."
    exec 9>/run/crmbridge-install.lock # not for the service, which would hold it for ever: 9>&-
    flock -n 9 && return
    say "another run is at work; waiting for it"
    flock -w 120 9 || stop "another run of install.sh is still at work." "Let it end, then run this again."
}

# Sets $python to the program itself (links may lead to another version one day), and tells both versions.
need_python() {
    choose_python
    facts=$("$python" -c 'import os, sqlite3, sys
print(os.path.realpath(sys._base_executable), sys.version.split()[0], sqlite3.sqlite_version)')
    python=${facts%% *} facts=${facts#* }
    python_version=${facts% *} sqlite_version=${facts#* }
    if [ "$(printf '%s\n' "$least_sqlite" "$sqlite_version" | sort -V | head -n 1)" != "$least_sqlite" ]; then
        stop "$python has SQLite $sqlite_version; crmbridge needs $least_sqlite or later." \
            "  Gentoo:  emerge --ask --oneshot dev-db/sqlite" "  Debian:  apt install --only-upgrade libsqlite3-0"
    fi
    place=$python
    while [ "$place" != / ]; do # the service is nobody special
        case $(stat -L -c %A -- "$place") in
            *[xt]) place=$(dirname -- "$place") ;;
            *) stop "the service's user could not run $python: $place is closed to others." \
                "Name a Python that everyone may run:  PYTHON=/usr/bin/python3 $me $command" ;;
        esac
    done
}

# Stops when the folder $1, or the one it will be made in, has less than $2 MB free; $3 says what for.
need_space() {
    place=$1
    while [ ! -d "$place" ]; do place=$(dirname -- "$place"); done
    free_mb=$(df -Pk -- "$place" | awk 'NR == 2 {print int($4 / 1024)}')
    [ "$free_mb" -ge "$2" ] && return
    stop "not enough disk space: $place has $free_mb MB free, and $3 needs $2 MB." \
        "Nothing was changed. Make room (old distfiles, logs, backups), then run this again."
}

need_memory() {
    free_mb=$(awk '/^(MemAvailable|SwapFree):/ {sum += $2} END {print int(sum / 1024)}' /proc/meminfo)
    [ "$free_mb" -ge "$memory_mb" ] && return
    stop "not enough memory: $free_mb MB are free, and installing takes up to $memory_mb MB." \
        "Stop something for a minute, or add swap:" \
        "  fallocate -l 512M /swap && chmod 600 /swap && mkswap /swap && swapon /swap"
}

# A clock that is wrong makes wrong times in the database for ever, and TLS fail.
need_clock() {
    newest=$(find "$root/crmbridge" -name '*.py' -exec stat -c %Y {} + | sort -n | tail -n 1)
    if [ "$(date +%Y)" -lt "$year" ] || [ "$(date +%s)" -lt $((newest - 86400)) ]; then
        stop "the clock is wrong: it shows $(date), before this version was made." \
            "Set it and keep it right:  emerge --ask net-misc/chrony && rc-update add chronyd && rc-service chronyd start"
    fi
}

# Stops when another program listens where the service is to listen.
need_port() {
    ! is_started || return 0
    "$python" -c 'import socket, sys
family, kind, _, _, address = socket.getaddrinfo(sys.argv[1], int(sys.argv[2]), type=socket.SOCK_STREAM)[0]
with socket.socket(family, kind) as listener:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
    listener.listen()' "$host" "$port" 2>/dev/null && return
    stop "another program uses $host:$port, where crmbridge is to listen." \
        "See which one:  ss -ltnp 'sport = :$port'" \
        "Stop it, or set another [web] port in $ini, then run this again."
}

# --- the server: what is installed ---

# Prints the version that the link $1 (current, previous) names; nothing when there is none.
version_at() {
    [ ! -L "$opt/$1" ] || readlink -- "$opt/$1"
}

# Points the link $1 to the version $2 in one step; an empty $2 removes it.
point() {
    if [ -z "$2" ]; then
        rm -f -- "$opt/$1"
        return
    fi
    [ "$(version_at "$1")" != "$2" ] || return 0
    ln -sfn -- "$2" "$opt/.$1.new"
    mv -Tf -- "$opt/.$1.new" "$opt/$1"
}

need_installed() {
    current=$(version_at current)
    [ -n "$current" ] || stop "crmbridge is not installed here." "Type:  $me install"
}

# Prints one line that is the same for the same files as shipped.
content_sum() (
    cd -- "$1"
    # shellcheck disable=SC2086 # a list of names without spaces
    find $shipped -type f ! -path '*/__pycache__/*' -exec sha256sum {} + | LC_ALL=C sort -k 2 | sha256sum | cut -c 1-8
)

# Sets $version to the name that this content has, or will have, below $opt.
name_version() {
    for part in $shipped; do
        [ -e "$root/$part" ] || stop "this folder is incomplete: $root/$part is missing." "Unpack it or check it out again."
    done
    version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$root/crmbridge/__init__.py")
    sum=$(content_sum "$root")
    if [ -d "$opt/$version" ] && [ "$(content_sum "$opt/$version" 2>/dev/null)" != "$sum" ]; then
        version=$version-$sum
    fi
}

# True when the version in the folder $1 runs with the Python it was installed with.
runs() {
    [ -x "$1/venv/bin/python" ] && "$1/venv/bin/python" -P -c 'import bcrypt, bottle, cryptography.fernet, crmbridge
import huey, peewee, pydantic, requests, waitress' >/dev/null 2>&1
}

# Makes the environment of the version in the folder $1 as $venv: from the wheels at hand, else from the index.
install_packages() {
    make_venv
    installed=no
    for wheels in "$1/wheels" "$root/wheels" "$opt"/*/wheels; do
        [ -d "$wheels" ] || continue
        if (install_pinned "$1/requirements.txt" --no-index --find-links "$wheels") >/dev/null 2>&1; then
            installed=yes
            break
        fi
        say "the packages in $wheels do not fit Python $python_version here; asking the package index"
    done
    [ "$installed" = yes ] || install_pinned "$1/requirements.txt" || stop_at_pip
    point_venv ../../../..
    compile "$1"
}

# Compiles the code in the folder $1, which the service may not write, for the Python of the environment.
compile() {
    "$venv/bin/python" -m compileall -qq "$1/crmbridge" || :
    chmod -R u=rwX,go=rX "$venv" "$1/crmbridge"
}

# True when the version that runs has just the packages that the folder $1 asks for, and the same Python.
has_packages() {
    old=$opt/$(version_at current)
    cmp -s -- "$old/requirements.txt" "$1/requirements.txt" && [ "$(readlink -f -- "$old/venv/bin/python")" = "$python" ] &&
        runs "$old"
}

# Makes $opt/$version, beside what runs. It gets its name last, so that one that is there is whole.
build() {
    tree=$opt/$version
    if [ -d "$tree" ]; then
        revive "$version"
        return
    fi
    need_space "$opt" "$code_mb" "the program"
    draft=$opt/.draft
    rm -rf -- "$draft"
    mkdir -p -- "$draft/bin"
    own "$opt" 755 root:root
    for part in $shipped wheels; do
        if [ -e "$root/$part" ]; then cp -RL -- "$root/$part" "$draft/"; fi
    done
    find "$draft" -name __pycache__ -prune -exec rm -rf -- {} +
    write_launcher "$draft/bin/crmbridge"
    chown -R root:root "$draft"
    chmod -R u=rwX,go=rX "$draft"
    chmod 755 "$draft/bin/crmbridge" "$draft/install.sh"
    venv=$draft/venv
    if has_packages "$draft"; then
        cp -a -- "$old/venv" "$venv"
        compile "$draft"
    else
        tell installs "the packages (takes a minute)"
        install_packages "$draft"
    fi
    sync -f "$draft"
    mv -- "$draft" "$tree"
    tell made "$tree"
}

# Makes the environment in the folder $1 anew for the Python now present, beside the old one.
rebuild() {
    need_space "$opt" "$code_mb" "the packages"
    tell installs "the packages for Python $python_version (takes a minute)"
    venv=$1/.venv.new
    install_packages "$1"
    sync -f "$venv"
    rm -rf -- "$1/.venv.old"
    [ ! -e "$1/venv" ] || mv -- "$1/venv" "$1/.venv.old"
    mv -- "$venv" "$1/venv"
    rm -rf -- "$1/.venv.old"
    tell made "$1/venv"
}

# Makes the version $1 run again when the Python it was installed with is gone.
revive() {
    runs "$opt/$1" && return
    need_python
    need_memory
    rebuild "$opt/$1"
}

write_launcher() {
    cat >"$1" <<'END'
#!/bin/sh
# Runs the crmbridge in whose folder this lies; -P keeps what lies in the current directory from being imported.
home=$(dirname -- "$(dirname -- "$(readlink -f -- "$0")")")
if ! "$home/venv/bin/python" -ISc '' 2>/dev/null; then
    version=$(sed -n 's/^version = //p' "$home/venv/pyvenv.cfg" 2>/dev/null)
    echo "crmbridge: Python ${version:-}, with which it was installed, is gone or does not run any more." >&2
    echo "  Type as root:  $home/install.sh repair" >&2
    exit 1
fi
# not the crmbridge.ini of the folder that somebody happens to stand in, a checkout's for instance
export CRMBRIDGE_CONFIG="${CRMBRIDGE_CONFIG:-/etc/crmbridge/crmbridge.ini}"
exec "$home/venv/bin/python" -P -m crmbridge "$@"
END
}

# Sets $database, $key_file, $host and $port by what the configuration says to the version in the folder $1.
read_ini() {
    settings=$("$1/venv/bin/python" -P -c 'import pathlib, sys
from crmbridge import config, errors
try:
    settings = config.load(pathlib.Path(sys.argv[1]), {})
except errors.Misconfigured as error:
    sys.exit(error.message)
print(settings.store.path, settings.vault.key_file, settings.web.host, settings.web.port, sep="\n")' "$ini" 2>&1) ||
        stop "the configuration does not fit this version: $settings" "Mend it, then run this again."
    { read -r database && read -r key_file && read -r host && read -r port; } <<END
$settings
END
}

# --- the server: files outside of $opt ---

# Gives $1 the mode $2 and the owner $3 when it has others. A link is followed when root made it; the service's may lead
# anywhere.
own() {
    if [ -L "$1" ]; then
        [ "$(stat -c %u -- "$1")" = 0 ] || return 0
        set -- "$(readlink -f -- "$1")" "$2" "$3"
    fi
    [ "$(stat -c '%a %U:%G' -- "$1")" != "$2 $3" ] || return 0
    chown -h -- "$3" "$1"
    chmod -- "$2" "$1"
    tell mended "$1: mode $2, owner $3"
}

# Makes the folder $1 with the mode $2 and the owner $3.
folder() {
    if [ ! -d "$1" ]; then
        mkdir -m "$2" -- "$1"
        chown -h -- "$3" "$1"
        tell made "$1"
    fi
    own "$1" "$2" "$3"
}

# Copies $1 to $2 with the mode $3, when it differs.
place_file() {
    ! cmp -s -- "$1" "$2" || return 0
    mkdir -p -- "$(dirname -- "$2")"
    cp -- "$1" "$2.crmbridge-new"
    chmod -- "$3" "$2.crmbridge-new"
    mv -f -- "$2.crmbridge-new" "$2"
    tell made "$2"
}

# Copies $1/openrc/$2 to $3 when there is none. One that is there is kept; when this version has another one than the
# version before, that is said.
place_default() {
    if [ ! -e "$3" ]; then
        place_file "$1/openrc/$2" "$3" 644
    elif [ -n "${from:-}" ] && ! cmp -s -- "$opt/$from/openrc/$2" "$1/openrc/$2" && ! cmp -s -- "$1/openrc/$2" "$3"; then
        tell kept "$3; this version's own is $1/openrc/$2"
    fi
}

make_user() {
    nologin=/sbin/nologin
    [ -x "$nologin" ] || nologin=/usr/sbin/nologin
    if ! getent group "$user" >/dev/null; then
        groupadd -r "$user"
        tell made "group $user"
    fi
    if ! getent passwd "$user" >/dev/null; then
        useradd -r -M -g "$user" -d "$data" -s "$nologin" -c crmbridge "$user"
        tell made "user $user"
    elif ! id -nG "$user" | grep -qw "$user"; then # it was there before, and could not read the configuration
        usermod -a -G "$user" "$user"
        tell mended "user $user: is in the group $user, too"
    fi
}

# Makes what is missing, mends owners and modes, and leaves what is right as it is.
prepare_system() {
    make_user
    folder "$etc" 750 "root:$user"
    folder "$data" 750 "$user:$user"
    folder "$data/backups" 700 "$user:$user"
    folder "$logs" 750 "$user:$user"
    if [ ! -e "$ini" ]; then
        sed -e "s|^path = .*|path = $data/bridge.db|" -e "s|^queue_path = .*|queue_path = $data/queue.db|" \
            -e "s|^key_file = .*|key_file = $etc/crmbridge.key|" \
            -e "s|^trusted_proxy =.*|trusted_proxy = 127.0.0.1|" "$opt/$version/crmbridge.ini" >"$ini.new"
        chown "root:$user" "$ini.new"
        chmod 640 "$ini.new"
        mv -- "$ini.new" "$ini"
        tell made "$ini"
    fi
    own "$ini" 640 "root:$user"
    read_ini "$opt/$version"
    if [ -e "$key_file" ]; then own "$key_file" 600 "$user:$user"; fi
    mend_data
}

# A command that ran as root by mistake may have left files that the service cannot write. Links, and files with
# more than one name, may lead elsewhere, and are left.
mend_data() {
    find "$data" "$logs" -maxdepth 1 -type f -links 1 -uid 0 -exec chown -h "$user:$user" {} + -exec printf '  mended   %s\n' {} +
}

# Puts the service's files of the version in the folder $1 in place. What an administrator may change stays.
place_service() {
    place_file "$1/openrc/crmbridge" /etc/init.d/crmbridge 755
    if [ "$(readlink /etc/init.d/crmbridge.worker)" != crmbridge ]; then
        ln -sfn crmbridge /etc/init.d/crmbridge.worker
    fi
    place_default "$1" crmbridge.confd /etc/conf.d/crmbridge
    place_default "$1" crmbridge.logrotate /etc/logrotate.d/crmbridge
    if [ "$(readlink /usr/local/bin/crmbridge)" != "$opt/current/bin/crmbridge" ]; then
        if mkdir -p /usr/local/bin && ln -sfn "$opt/current/bin/crmbridge" /usr/local/bin/crmbridge; then
            tell made /usr/local/bin/crmbridge
        else
            say "the command is $opt/current/bin/crmbridge, as /usr/local/bin cannot have a link to it"
        fi
    fi
}

# --- the server: the service ---

# Prints started, stopped, crashed, or what else OpenRC calls it.
service_state() {
    if [ ! -e /etc/init.d/crmbridge ]; then
        echo "not installed"
        return
    fi
    state=$(rc-service crmbridge status 2>&1) && code=0 || code=$?
    case $code in
        0) echo started ;;
        3) echo stopped ;;
        32) echo crashed ;;
        *) echo "${state##*: }" ;;
    esac
}

is_started() {
    [ "$(service_state)" = started ]
}

stop_service() {
    log='' tries=60
    while [ "$tries" -gt 0 ]; do
        case $(service_state) in
            stopped | "not installed")
                end_leftovers
                return
                ;;
            started) log=$(rc-service crmbridge stop 2>&1 9>&-) || : ;;
            crashed) log=$(rc-service crmbridge zap 2>&1) || : ;;
            *) # a start that was killed half-way is one for ever to OpenRC
                if flock -n /run/openrc/exclusive/crmbridge true; then
                    end_leftovers
                    log=$(rc-service crmbridge zap 2>&1) || :
                else
                    sleep 1
                fi
                ;;
        esac
        tries=$((tries - 1))
    done
    printf '%s\n' "$log" >&2
    stop "OpenRC could not stop the service; what it said stands above." "Type:  rc-service crmbridge stop"
}

# Ends what a killed start has left behind OpenRC's back: supervisors first, which then end what is theirs.
end_leftovers() {
    for kind in "^supervise-daemon crmbridge" " -m crmbridge serve .*--config $ini " " -m crmbridge worker .*--config $ini "; do
        for process in /proc/[0-9]*; do
            tr '\0' ' ' 2>/dev/null <"$process/cmdline" | grep -q -e "$kind" || continue
            kill "${process#/proc/}" 2>/dev/null || continue
            while kill -0 "${process#/proc/}" 2>/dev/null; do sleep 0.2; done
        done
    done 2>/dev/null
}

# Starts the service and waits until it can do its work.
start_service() {
    if ! log=$(rc-service crmbridge start 2>&1 9>&-); then
        printf '%s\n' "$log" >&2
        stop "OpenRC could not start the service; what it said stands above." "Its log: $logs/crmbridge.log"
    fi
    if ! log=$("$opt/current/bin/crmbridge" health --wait 60 --config "$ini" 2>&1); then
        printf '%s\n' "$log" >&2
        tail -n 5 "$logs/crmbridge.log" >&2 || :
        stop "the service started but was not well within a minute; its answer and its log's last lines stand above."
    fi
    tell started "crmbridge $(version_at current): http://$host:$port/health is good"
}

newest_migration() {
    find "$opt/$1/crmbridge/store/migrations" -name '[0-9]*.py' | sed 's|.*/||; s|\.py$||' | LC_ALL=C sort | tail -n 1
}

# Brings the database to the schema of the version $1; the newer of it and $2 knows the steps, either way. What was said
# is in $log. A command that somebody types meanwhile holds the database for a moment, and is waited for.
set_schema() {
    log='' wanted=$(newest_migration "$1") other=$(newest_migration "$2") tries=30
    if [ ! -e "$database" ] || [ "$wanted" = "$other" ]; then return 0; fi
    if [ "$(printf '%s\n' "$wanted" "$other" | LC_ALL=C sort | tail -n 1)" = "$wanted" ]; then
        set -- "$opt/$1/bin/crmbridge" migrate --config "$ini"
    else
        set -- "$opt/$2/bin/crmbridge" migrate --to "$wanted" --config "$ini"
    fi
    until log=$("$@" 2>&1); do
        tries=$((tries - 1))
        case $tries:$log in
            0:*) return 1 ;;
            *"is in use"*) sleep 1 ;;
            *) return 1 ;;
        esac
    done
}

# Prints what the journal noted as $1.
noted() {
    sed -n "s/^$1=//p" "$journal"
}

# Lets the service run as the version $1. Until the end of it every failure, and every kill, leads to put_back.
move_to() {
    from=$(version_at current)
    cat >"$journal.new" <<END
from=$from
to=$1
was=$(service_state)
previous=$(version_at previous)
END
    sync -f "$journal.new"
    mv -- "$journal.new" "$journal"
    if [ -n "$from" ]; then
        stop_service
        if ! set_schema "$1" "$from"; then
            printf '%s\n' "$log" >&2
            stop "the database could not be brought to the schema of $1; what was said stands above."
        fi
        [ -z "$log" ] || tell migrated "$(printf %s "$log" | tr '\n' ' ')"
    fi
    point current "$1"
    place_service "$opt/$1"
    if [ -z "$from" ]; then
        rc-update -q add crmbridge default
    fi
    # one that was stopped on purpose stays so
    if [ -z "$from" ] || [ "$(noted was)" != stopped ]; then start_service; fi
    point previous "$from"
    rm -f -- "$journal"
    for tree in "$opt"/*; do
        case ${tree##*/} in current | previous | "$1" | "$from") ;; *) rm -rf -- "$tree" ;; esac
    done
}

# Brings back what ran before a move that was not finished.
put_back() {
    from=$(noted from) to=$(noted to) was=$(noted was)
    if [ -z "$from" ]; then
        stop_service
        point current ""
        rm -f -- "$journal"
        return
    fi
    say "putting $from back"
    stop_service
    if ! set_schema "$from" "$to"; then
        printf '%s\n' "$log" >&2
        stop "the database could not be brought back to the schema of $from; what was said stands above." \
            "The service is stopped, and nothing is lost. Mend what it says, then type:  $opt/$to/install.sh rollback"
    fi
    point current "$from"
    point previous "$(noted previous)"
    place_service "$opt/$from"
    if [ "$was" = stopped ] || (start_service); then
        say "$from is as before; what the other version had accepted is kept"
    else
        say "$from is back with all that was accepted, but does not run; why stands above"
    fi
    rm -f -- "$journal"
}

# A failure in the middle of a move ends here.
on_exit() {
    status=$?
    trap - EXIT
    trap '' PIPE # nobody may read what is said, but it goes on
    rm -rf -- "$opt/.draft"
    if [ -e "$journal" ]; then
        (put_back) || say "$(noted from) could not be put back; the next run of install.sh tries it again"
        say "when the cause is mended, run the same command again; what was done so far is used then"
        if [ "$status" = 0 ]; then status=1; fi
    fi
    exit "$status"
}

# What every command that changes the server begins with.
begin() {
    recovered=no
    need_root
    umask 022
    need_openrc
    take_turn
    if [ -e "$journal" ]; then
        say "the last run was cut short in the middle of a move from '$(noted from)' to $(noted to)"
        # what the killed run asked of OpenRC may still go on
        [ ! -e /run/openrc/exclusive/crmbridge ] || flock -w 90 /run/openrc/exclusive/crmbridge true
        if [ -n "$(noted from)" ]; then
            version=$(noted from)
            runs "$opt/$version" || version=$(noted to)
            revive "$version"
            read_ini "$opt/$version"
        fi
        put_back
        recovered=yes
    fi
    trap on_exit EXIT
    trap 'exit 130' HUP INT TERM PIPE
}

# --- the server: commands ---

install_version() {
    begin
    if [ "$1" = upgrade ]; then need_installed; fi
    need_python
    need_clock
    need_memory
    name_version
    current=$(version_at current)
    echo "crmbridge $version, Python $python_version ($python), SQLite $sqlite_version"
    if [ ! -e "$ini" ]; then
        need_space "$data" 50 "the database"
        host=127.0.0.1 port=8080
        need_port
    fi
    if [ "$current" = "$version" ]; then
        mend
        echo "crmbridge $version is already installed; the service is $(service_state)"
        return
    fi
    build
    prepare_system
    if [ -z "$current" ]; then
        need_port
        init_first
        move_to "$version"
        tell_next
    else
        [ ! -e "$database" ] || back_up
        move_to "$version"
        "$opt/$version/bin/crmbridge" init --config "$ini" | sed '/^kept/d'
        echo "crmbridge $version is $(service_state); $current is kept:  $opt/current/install.sh rollback"
    fi
}

# Makes key file and database, for a first installation.
init_first() {
    log=$("$opt/$version/bin/crmbridge" init --config "$ini" 2>&1) || stop "crmbridge init failed: $log"
    printf '%s\n' "$log" | sed -n 's/^made  */  made     /p'
    own "$key_file" 600 "$user:$user"
    mend_data
}

# A copy of the database in its own folder, before its schema may change.
back_up() {
    used_mb=$(du -cm -- "$database" "$database-wal" 2>/dev/null | tail -n 1 | cut -f 1)
    for disk in "$data" "$(dirname -- "$database")"; do # it may have been moved to another disk
        need_space "$disk" $((2 * used_mb + 20)) "the backup before the upgrade, and the upgrade,"
    done
    file=$data/backups/before-$version-$(date +%Y%m%dT%H%M%S).db
    log=$("$opt/$version/bin/crmbridge" backup "$file" --config "$ini" 2>&1) || {
        printf '%s\n' "$log" >&2
        stop "the backup before the upgrade failed; what was said stands above." "Nothing was changed; $current runs on."
    }
    tell saved "$file"
    # whatever the clock says, this one stays
    find "$data/backups" -name 'before-*.db' ! -path "$file" -printf '%T@ %p\n' | sort -n | head -n -2 | cut -d ' ' -f 2- | xargs -r rm -f --
}

tell_next() {
    cat <<END

crmbridge $version runs, and starts at every boot. Next:

1. In $ini, under [instagram], set verify_token (a string of your own) and app_secrets (the
   Instagram app secret: Meta's console, "API setup with Instagram login"); under [web], public_url. Then:
     rc-service crmbridge restart
2. Lead https://YOUR.NAME to http://$host:$port by a reverse proxy on this machine:
   $opt/current/README.md, "Reverse proxy", has it for nginx and for Caddy.
3. In Meta's console, "Configure webhooks": the address https://YOUR.NAME/webhooks/instagram and the verify token;
   subscribe to messages, message_echoes, messaging_seen, message_reactions, messaging_postbacks, message_edit and
   messaging_referral, and set the app live.
4. Make a key for yourself, which is shown once, and connect the account with it (README.md, "Five minutes", 3.):
     crmbridge key create --name admin --admin
END
    if ! command -v logrotate >/dev/null 2>&1; then
        echo "5. The log is rotated by logrotate, which is missing:  emerge --ask app-admin/logrotate"
    fi
}

rollback() {
    begin
    need_installed
    [ "$recovered" = no ] || return 0
    version=$(version_at previous)
    [ -n "$version" ] || stop "there is no version before $current to go back to."
    revive "$version"
    # which knows the way back between their schemas
    [ "$(newest_migration "$version")" = "$(newest_migration "$current")" ] || revive "$current"
    read_ini "$opt/$version"
    move_to "$version"
    echo "crmbridge $version is $(service_state); $current is kept, and another rollback goes there again"
}

repair() {
    begin
    need_installed
    version=$current
    mend
    # what its Python's end has ended; at boot it would start, too
    if ! is_started && rc-update show default 2>/dev/null | grep -qw crmbridge; then
        stop_service
        start_service
    fi
    echo "crmbridge $version is whole; the service is $(service_state)"
}

# Makes what is missing or damaged around the version that runs; without anything to mend, nothing.
mend() {
    if ! runs "$opt/$version"; then
        revive "$version"
        prepare_system
        if is_started; then
            stop_service
            start_service
        fi
    fi
    prepare_system
    place_service "$opt/$version"
    # nobody wants it crashed, half started, or without the supervisor that would start it again
    case $(service_state) in started | stopped) ;; *) stop_service && start_service ;; esac
}

uninstall() {
    case ${1:-} in '' | --purge) ;; *) stop "uninstall knows --purge, not '$1'." ;; esac
    need_root
    need_openrc
    take_turn
    if [ -e /etc/init.d/crmbridge ]; then
        stop_service
        tell stopped crmbridge
        rc-update -q -a del crmbridge >/dev/null 2>&1 || :
    fi
    if (read_ini "$opt/current") 2>/dev/null; then read_ini "$opt/current"; fi
    if [ "$(readlink /usr/local/bin/crmbridge)" = "$opt/current/bin/crmbridge" ]; then remove /usr/local/bin/crmbridge; fi
    remove /etc/init.d/crmbridge.worker /etc/init.d/crmbridge /etc/logrotate.d/crmbridge
    if [ "${1:-}" != --purge ]; then
        remove "$opt"
        for place in "$etc" /etc/conf.d/crmbridge "$data" "$logs"; do
            [ ! -e "$place" ] || tell kept "$place"
        done
        ! getent passwd "$user" >/dev/null || tell kept "user $user, whose files these are"
        case $me in "$opt"/*) me="./install.sh (in a checkout) or sh BUNDLE" ;; esac # it has just been removed
        echo "Another installation takes them up again. To remove them, too:  $me uninstall --purge"
        return
    fi
    remove /etc/conf.d/crmbridge "$etc" "$data" "$logs" "$opt"
    for place in "${database:-}" "${key_file:-}"; do # where an administrator moved them
        [ ! -e "$place" ] || tell kept "$place"
    done
    if getent passwd "$user" >/dev/null; then
        userdel "$user"
        tell removed "user $user"
    fi
    if getent group "$user" >/dev/null; then groupdel "$user"; fi
}

remove() {
    for place; do
        [ -e "$place" ] || [ -L "$place" ] || continue
        # where an administrator's link leads there may be more than ours
        if [ -L "$place" ] && [ -d "$place" ]; then tell kept "$(readlink -f -- "$place")"; fi
        if rm -rf -- "$place"; then tell removed "$place"; else say "$place could not be removed; why stands above"; fi
    done
}

show_status() {
    need_root
    need_installed
    tree=$opt/$current state=$(service_state) well=0
    line() { printf '%-15s%s\n' "$1" "$2"; }
    size() { if [ -e "$1" ]; then du -hs -- "$1" | cut -f 1; else echo "not there"; fi; }
    line version "$current, in $tree ($(size "$tree"))"
    previous=$(version_at previous)
    line previous "${previous:-none}"
    [ ! -e "$journal" ] || { line unfinished "a move to $(noted to) was cut short; the next install.sh command puts it right"; well=1; }
    if ! runs "$tree"; then
        line python "gone: $(sed -n 's/^version = //p' "$tree/venv/pyvenv.cfg"); type: $tree/install.sh repair"
        line service "$state"
        return 1
    fi
    line python "$("$tree/venv/bin/python" -c 'import sqlite3, sys
print(sys.version.split()[0], "(" + sys._base_executable + "), SQLite", sqlite3.sqlite_version)')"
    levels=$(rc-update show 2>/dev/null | sed -n 's/^ *crmbridge *| *//p' | tr -s ' ')
    line service "$state; ${levels:+starts at boot (runlevel ${levels% })}"
    [ "$state" = started ] || well=1
    read_ini "$tree"
    line health "$("$tree/bin/crmbridge" health --config "$ini" 2>&1)" || well=1
    "$tree/bin/crmbridge" health --config "$ini" >/dev/null 2>&1 || well=1
    line configuration "$ini"
    line "key file" "$key_file"
    line database "$database ($(size "$database")), $(df -Ph -- "$(dirname -- "$database")" | awk 'NR == 2 {print $4}') free on its disk"
    line log "$logs/crmbridge.log ($(size "$logs/crmbridge.log"))"
    last=$(find "$data/backups" -type f ! -name '.*' -printf '%T@ %TY-%Tm-%Td %TH:%TM  %p\n' | sort -n | tail -n 1 | cut -d ' ' -f 2-)
    line "last backup" "${last:-none in $data/backups; type: crmbridge backup $data/backups}"
    return "$well"
}

# --- the bundle ---

bundle() {
    name=crmbridge-$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$root/crmbridge/__init__.py")-$(uname -m).sh
    case ${1:-} in
        '') file=$(pwd)/$name ;;
        /*) file=$1 ;;
        *) file=$(pwd)/$1 ;;
    esac
    cd / # as in need_root
    scratch=$(mktemp -d)
    trap 'rm -rf -- "$scratch"' EXIT
    trap 'exit 130' HUP INT TERM
    if [ -d "$root/wheels" ]; then
        cp -RL -- "$root/wheels" "$scratch/wheels"
    else
        choose_python
        venv=$scratch/venv
        make_venv
        download_wheels
    fi
    for part in $shipped; do cp -R -- "$root/$part" "$scratch/"; done
    find "$scratch" -name __pycache__ -prune -exec rm -rf -- {} +
    chmod -R u=rwX,go=rX "$scratch"
    # shellcheck disable=SC2086 # a list of names without spaces
    tar -C "$scratch" --owner=0 --group=0 --sort=name -cf "$scratch/payload.tar" $shipped wheels
    sum=$(sha256sum <"$scratch/payload.tar")
    write_bundle_head "${sum%% *}" >"$scratch/bundle"
    cat "$scratch/payload.tar" >>"$scratch/bundle"
    cp -- "$scratch/bundle" "$file.new"
    mv -f -- "$file.new" "$file"
    chmod 755 "$file"
    echo "$file: $(du -h -- "$file" | cut -f 1), for $(uname -m) and Python$(bundled_pythons)"
    echo "On the server, as root:  sh ${file##*/} install"
}

# Fills $scratch/wheels with what each Python needs; one that the index has no packages for is left out.
download_wheels() {
    for minor in 11 12 13 14; do
        if ! log=$("$venv/bin/python" -m pip download --quiet --no-input --disable-pip-version-check --no-deps \
            --only-binary :all: --require-hashes --python-version "3.$minor" -r "$root/requirements.txt" \
            -d "$scratch/wheels" 2>&1); then
            say "the package index has not all packages for Python 3.$minor; the bundle does not fit it:"
            printf '%s\n' "$log" | tail -n 3 >&2
        fi
    done
    [ -n "$(bundled_pythons)" ] || stop_at_pip
}

# The one package that has a wheel for each Python tells for which ones there are all.
bundled_pythons() {
    find "$scratch/wheels" -name 'pydantic_core-*' 2>/dev/null | sed -n 's/.*-cp3\([0-9]*\)-cp3.*/ 3.\1/p' | sort -V | tr -d '\n'
}

write_bundle_head() {
    cat <<END
#!/bin/sh
# crmbridge in one file: this head, and a tar file with the program and its packages.
#   sh FILE install | upgrade | repair | status | help
set -eu
sum=$1
END
    cat <<'END'
from=$(awk '/^# the tar file begins/ {print NR + 1; exit}' "$0")
if ! tail -n "+$from" -- "$0" | sha256sum | grep -q "^$sum "; then
    echo "$0: this file is damaged or incomplete; nothing was done. Copy it here again." >&2
    exit 1
fi
bundle_file=$(readlink -f -- "$0")
export bundle_file
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
trap 'exit 130' HUP INT TERM
if ! tail -n "+$from" -- "$0" | tar -xf - -C "$folder"; then
    echo "$0: it could not be unpacked into $folder. Is the disk full? TMPDIR=/another/folder names another place." >&2
    exit 1
fi
status=0
sh "$folder/install.sh" "$@" || status=$?
exit "$status"
# the tar file begins with the next line
END
}

# --- the checkout: .venv for demo and test ---

stamp=$venv/crmbridge.stamp             # what the runtime packages were installed from; written last
test_stamp=$venv/crmbridge.test-stamp   # the same for the test packages
unfinished=$venv/crmbridge.unfinished   # there only while test packages are being installed
layout=1                                # raise it when a change below must remake every .venv

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

# Makes the .venv anew. The stamp comes last, so a run that is cut short is seen and redone.
build_venv() {
    choose_python
    say "installing crmbridge's packages into .venv (the first time takes a minute)"
    make_venv
    install_pinned "$root/requirements.txt" || stop_at_pip
    point_venv "$root"
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
    install | upgrade) install_version "$command" ;;
    rollback) rollback ;;
    repair) repair ;;
    uninstall) uninstall "$@" ;;
    status) show_status ;;
    bundle) bundle "$@" ;;
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
