#!/bin/sh
# Installs crmbridge on a server (as root), or runs it and its tests from this checkout (as anyone).
# `./install.sh help` says how to use it. From top to bottom: words, Python, the server, the bundle, the checkout.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P)
me=${bundle_file:+"sh $bundle_file"} # what to type to come here again
me=${me:-$root/install.sh}

# The server's folders; docs/operate.md says what lies where.
opt=/opt/crmbridge
etc=/etc/crmbridge
ini=$etc/crmbridge.ini
data=/var/lib/crmbridge
logs=/var/log/crmbridge
user=crmbridge
mark=$opt/.moving        # there only while the service is moved from one version to another: its state, and from which
rc=/run/openrc           # where OpenRC keeps what it knows of services
shipped="crmbridge static api-spec.yaml crmbridge.ini install.sh openrc requirements.txt README.md docs LICENSE"
code_mb=200               # what must be free on disk: an installation takes half of it
index_mb=124 wheels_mb=92 # what must be free of memory: pip takes that with a package index, and with the packages at hand
least_sqlite=3.35.0       # RETURNING
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
  uninstall [--purge]   remove the service and the code; --purge asks, then also configuration, data, logs and user
  status                what is installed, whether it runs, and where its files are

Anywhere, in this checkout:
  bundle [--for ARCH] [FILE]
                        make one file of this version and its packages, for a server without a package index:
                        sh FILE install. ARCH, if not this machine's: x86_64, aarch64, x86_64-musl, aarch64-musl
  demo [--once]         carry a message both ways between a local Instagram and a sample CRM, show every hop, and
                        keep serving until Ctrl-C (--once: exit after the round trip)
  test [ARGUMENT ...]   run the test suite; the arguments are pytest's
  help                  this text

demo and test make .venv in this checkout, with the pinned packages, and .venv/bin/crmbridge as the command line.
Only ready-made packages are used; nothing is ever compiled. PYTHON=/path/to/python3 chooses the Python (3.11 to 3.14).
END
}

# --- words ---

say() { printf 'install.sh: %s\n' "$*" >&2; }

# Stops; the first line says what is wrong, the others why and what to type.
stop() {
    say "$1"
    shift
    if [ $# -gt 0 ]; then printf '  %s\n' "$@" >&2; fi
    exit 1
}

# Says one thing that was done, on the server.
tell() { printf '  %-9s%s\n' "$1" "$2"; }

# Remembers what was made on the server, and tells it in one line.
made() { making="$making${making:+, }$1"; }
tell_made() { [ -z "$making" ] || tell made "$making"; making=''; }

# --- Python ---

# Prints "ok", or the first thing that the Python $1 lacks.
probe() {
    "$1" -c 'import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 14): sys.exit(print("version %d.%d" % sys.version_info[:2]))
for name in ("venv", "ensurepip", "ssl", "sqlite3"):
    try: __import__(name)
    except ImportError: sys.exit(print("module " + name))
print("ok")' 2>/dev/null || echo broken
}

# Sets $python to one that can run crmbridge, or stops saying what to install.
choose_python() {
    set -- python3 python3.13 python3.12 python3.11 python3.14
    lacks='' why="there is no python3 in PATH"
    [ -z "${PYTHON:-}" ] || { set -- "$PYTHON" && why="PYTHON=$PYTHON is not a program"; }
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
            module*) lacks=${lacks:-"$candidate has no ${state#module } module"} ;;
            version*) why="$candidate is Python ${state#version }" ;;
            # a version manager's stand-in for a Python that isn't installed ends here too
            *) [ -z "${PYTHON:-}" ] || why="$candidate does not run as a Python" ;;
        esac
    done
    stop "no suitable Python: ${lacks:-$why}." \
        "crmbridge runs on Python 3.11, 3.12, 3.13 and 3.14, with the modules venv, ensurepip, ssl and sqlite3:" \
        "  Gentoo:  echo 'dev-lang/python ensurepip sqlite ssl' >> /etc/portage/package.use/crmbridge" \
        "           emerge --ask --newuse dev-lang/python:3.13" "  Debian:  apt install python3 python3-venv" \
        "or name one:  PYTHON=/path/to/python3 ./install.sh ..."
}

# Installs the pinned set $1 into the environment: wheels only, every hash checked, silent unless it fails.
# More arguments are pip's.
install_pinned() {
    requirements=$1
    shift
    log=$(PIP_USER=0 "$venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check \
        --only-binary :all: --require-hashes -r "$requirements" "$@" 2>&1) || { printf '%s\n' "$log" >&2 && return 1; }
}

stop_at_pip() {
    stop "installing the packages failed; what pip said stands above." \
        "pip must reach a package index over HTTPS; behind a proxy or with a mirror of your own, set HTTPS_PROXY or" \
        "PIP_INDEX_URL. Only wheels are used: 64-bit x86 or ARM Linux has them. Then run the same command again."
}

# Makes an empty environment of $python.
make_venv() {
    rm -rf -- "$venv"
    log=$("$python" -m venv "$venv" 2>&1) && return
    printf '%s\n' "$log" >&2
    stop "$python could not make a virtual environment in $venv; what it said stands above." \
        "Is the disk full? Else its venv or ensurepip module is missing, which comes with:" \
        "  Gentoo:  dev-lang/python with USE=ensurepip" "  Debian:  apt install python3-venv"
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
        command -v "$tool" >/dev/null 2>&1 || stop "there is no OpenRC here ($tool is missing), and the service is made for it." \
            "Without it whatever starts services here can run it: $root/install.sh demo --once  makes .venv; then, in a" \
            "folder of its own,  $root/.venv/bin/crmbridge init  and  crmbridge serve, which stops on SIGTERM"
    done
    [ -e "$rc/softlevel" ] || stop "OpenRC is installed but did not start this system: it cannot start a service." \
        "In a container or chroot:  openrc default   first. A new system: install crmbridge after its first boot."
}

need_tools() {
    for tool in flock:util-linux su:util-linux diff:diffutils $(id "$user" >/dev/null 2>&1 || echo useradd,adduser:shadow); do
        for name in $(echo "${tool%:*}" | tr , ' '); do ! command -v "$name" >/dev/null 2>&1 || continue 2; done
        stop "${tool%%[,:]*} is missing." "It comes with ${tool#*:}:  emerge --ask ${tool#*:}"
    done
}

# One run at a time. What a killed run left at work still holds the lock, and is waited for.
take_turn() {
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
    [ "$(printf '%s\n' "$least_sqlite" "$sqlite_version" | sort -V | head -n 1)" = "$least_sqlite" ] ||
        stop "$python has SQLite $sqlite_version; crmbridge needs $least_sqlite or later." \
            "  Gentoo:  emerge --ask --oneshot dev-db/sqlite" "  Debian:  apt install --only-upgrade libsqlite3-0"
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
    needed_mb=$index_mb
    [ ! -d "$root/wheels" ] || needed_mb=$wheels_mb
    free_mb=$(awk '/^(MemAvailable|SwapFree):/ {sum += $2} END {print int(sum / 1024)}' /proc/meminfo)
    [ "$free_mb" -ge "$needed_mb" ] && return
    stop "not enough memory: $free_mb MB are free, and installing takes $needed_mb MB ($wheels_mb from a bundle)." \
        "Stop something for a minute, or add swap:  fallocate -l 512M /swap && chmod 600 /swap && mkswap /swap && swapon /swap"
}

# A clock that is wrong makes wrong times in the database for ever, and TLS fail.
need_clock() {
    newest=${bundle_made:-$(find "$root/crmbridge" -name '*.py' -exec stat -c %Y {} + | sort -n | tail -n 1)}
    [ "$(date +%s)" -lt $((newest - 86400)) ] || [ "$(date +%Y)" -lt "$year" ] || return 0
    stop "the clock is wrong: it shows $(date), before this version was made." \
        "Set it and keep it right:  emerge --ask net-misc/chrony && rc-update add chronyd && rc-service chronyd start"
}

# Stops when another program listens where the service is to listen.
need_port() {
    port=$(sed -n '/^\[web\]/,/^\[/s/^port *= *\([0-9]*\) *$/\1/p' "$ini" 2>/dev/null) || :
    port=${port:-8080}
    grep -qs ": [0-9A-F]*:$(printf %04X "$port") [0-9A-F:]* 0A" /proc/net/tcp /proc/net/tcp6 || return 0
    stop "another program uses port $port, where crmbridge is to listen." "See which one:  ss -ltnp 'sport = :$port'" \
        "Stop it, or set another [web] port in $ini, then run this again."
}

# --- the server: what is installed ---

# Prints the version that the link $1 (current, previous) names; nothing when there is none.
version_at() { [ ! -L "$opt/$1" ] || readlink -- "$opt/$1"; }

# Points the link $1 to the version $2 in one step; an empty $2 removes it.
point() {
    [ -n "$2" ] || { rm -f -- "$opt/$1"; return; }
    ln -sfn -- "$2" "$opt/.$1.new"
    mv -Tf -- "$opt/.$1.new" "$opt/$1"
}

need_installed() {
    current=$(version_at current)
    [ -n "$current" ] || stop "crmbridge is not installed here." "Type:  $me install"
}

# True when the version in the folder $1 is what this folder has to install.
is_this() {
    for part in $shipped; do
        ! diff -rq -- "$root/$part" "$1/$part" 2>&1 | grep -qv __pycache__ || return 1
    done
}

# Sets $version to the name that this content has, or will have, below $opt.
name_version() {
    for part in $shipped; do
        [ -e "$root/$part" ] || stop "this folder is incomplete: $root/$part is missing." "Unpack it or check it out again."
    done
    named=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$root/crmbridge/__init__.py")
    version=$named number=1
    while [ -d "$opt/$version" ] && ! is_this "$opt/$version"; do
        number=$((number + 1)) version=$named-$number
    done
}

# True when the version in the folder $1 runs with the Python it was installed with.
runs() {
    [ -x "$1/venv/bin/python" ] && "$1/venv/bin/python" -P -c 'import bcrypt, bottle, cryptography.fernet, crmbridge
import huey, peewee, pydantic, requests, waitress' >/dev/null 2>&1
}

# Makes the environment of the version in the folder $1 as $venv: from the wheels at hand, else from the index.
install_packages() {
    tell installs "the packages for Python $python_version (takes a minute)"
    make_venv
    installed=no
    for wheels in "$1/wheels" "$root/wheels" "$opt"/*/wheels; do
        [ -d "$wheels" ] || continue
        install_pinned "$1/requirements.txt" --no-index --find-links "$wheels" 2>/dev/null && installed=yes && break
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
    [ ! -d "$opt/$version" ] || { revive "$version"; return; }
    need_space "$opt" "$code_mb" "the program"
    draft=$opt/.draft venv=$opt/.draft/venv
    rm -rf -- "$draft"
    mkdir -p -- "$draft/bin"
    chown root:root "$opt/." && chmod 755 "$opt/."
    for part in $shipped wheels; do
        if [ -e "$root/$part" ]; then cp -RL -- "$root/$part" "$draft/"; fi
    done
    find "$draft" -name __pycache__ -prune -exec rm -rf -- {} +
    cp -- "$root/openrc/launcher" "$draft/bin/crmbridge"
    chown -R root:root "$draft"
    chmod -R u=rwX,go=rX "$draft"
    chmod 755 "$draft/bin/crmbridge" "$draft/install.sh"
    if has_packages "$draft"; then
        cp -a -- "$old/venv" "$venv"
        compile "$draft"
    else
        install_packages "$draft"
    fi
    sync -f "$draft"
    mv -- "$draft" "$opt/$version"
    made "$opt/$version"
}

# Makes the environment of the version $1 anew, beside the old one, when the Python it was installed with is gone.
revive() {
    runs "$opt/$1" && return
    need_python
    need_memory
    need_space "$opt" "$code_mb" "the packages"
    venv=$opt/$1/.venv.new
    install_packages "$opt/$1"
    sync -f "$venv"
    rm -rf -- "$opt/$1/venv"
    mv -- "$venv" "$opt/$1/venv"
    made "$opt/$1/venv"
}

# Runs a command of the version $1, which becomes the service's user where it touches what is theirs.
bridge() { of=$opt/$1 && shift && "$of/bin/crmbridge" "$@" --config "$ini"; }

# Sets $database, $key_file, $host and $port by what the configuration says to the version $1.
read_ini() {
    settings=$("$opt/$1/venv/bin/python" -P -c 'import pathlib, sys
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
# What lies inside $data and $logs is the service's user's, who may lay links there: root leaves it to the service file,
# which gives all of it its owner at each start, and to commands that become that user.

# Copies $1 to $2 with the mode $3, when it differs.
place_file() {
    ! cmp -s -- "$1" "$2" || return 0
    mkdir -p -- "$(dirname -- "$2")"
    cp -- "$1" "$2.crmbridge-new"
    chmod -- "$3" "$2.crmbridge-new"
    mv -f -- "$2.crmbridge-new" "$2"
    made "$2"
}

# Copies openrc/$3 of the version $1 to $4 with the mode $5. What an administrator has changed stays; where $1 has another
# one than the version before, $2, that is laid beside for etc-update.
place_default() {
    new=$opt/$1/openrc/$3 old=$opt/$2/openrc/$3
    if [ ! -e "$4" ] || cmp -s -- "$old" "$4"; then
        place_file "$new" "$4" "$5"
    elif ! cmp -s -- "$old" "$new" && ! cmp -s -- "$new" "$4"; then
        # logrotate would read a file beside its own
        case $4 in /etc/conf.d/*) place_file "$new" "/etc/conf.d/._cfg0000_${4##*/}" "$5" ;; esac
        tell kept "$4; what is new: $opt/current/openrc/$3"
    fi
}

make_user() {
    nologin=/sbin/nologin
    [ -x "$nologin" ] || nologin=/usr/sbin/nologin
    grep -q "^$user:" /etc/group || if command -v groupadd >/dev/null; then groupadd -r "$user"; else addgroup -S "$user"; fi
    if ! id "$user" >/dev/null 2>&1; then
        if command -v useradd >/dev/null; then
            useradd -r -M -g "$user" -d "$data" -s "$nologin" -c crmbridge "$user"
        else
            adduser -S -D -H -G "$user" -h "$data" -s "$nologin" -g crmbridge "$user"
        fi
        : >"$etc/.user-made" # uninstall removes no other
        made "user $user"
    elif ! id -nG "$user" | grep -qw "$user"; then # it was there before, and could not read the configuration
        if command -v usermod >/dev/null; then usermod -a -G "$user" "$user"; else addgroup "$user" "$user"; fi
        tell mended "user $user: is in the group $user, too"
    fi
}

# Makes what is missing, and leaves what is there as it is.
prepare_system() {
    mkdir -p -- "$etc"
    make_user
    chown "root:$user" "$etc/." && chmod 750 "$etc/."
    for place in "$data" "$logs"; do
        [ -d "$place" ] || { mkdir -m 750 -- "$place" && made "$place"; }
        [ -L "$place" ] || chown -h "$user:$user" "$place"
    done
    if [ ! -e "$ini" ]; then
        sed -e "s|^path = .*|path = $data/bridge.db|" -e "s|^queue_path = .*|queue_path = $data/queue.db|" \
            -e "s|^key_file = .*|key_file = $etc/crmbridge.key|" \
            -e "s|^trusted_proxy =.*|trusted_proxy = 127.0.0.1|" "$opt/$version/crmbridge.ini" >"$ini.new"
        chown "root:$user" "$ini.new"
        chmod 640 "$ini.new"
        mv -- "$ini.new" "$ini"
        made "$ini"
    fi
    if [ -f "$etc/crmbridge.key" ]; then chown -h "$user:$user" "$etc/crmbridge.key"; fi
}

# Puts the service's files of the version $1 in the place of those of $2.
place_service() {
    place_file "$opt/$1/openrc/crmbridge" /etc/init.d/crmbridge 755
    place_default "$1" "$2" crmbridge.confd /etc/conf.d/crmbridge 644
    place_default "$1" "$2" crmbridge.logrotate /etc/logrotate.d/crmbridge 644
    place_default "$1" "$2" crmbridge.cron /etc/cron.daily/crmbridge 755
    cli=crmbridge
    [ "$(readlink /usr/local/bin/crmbridge)" != "$opt/current/bin/crmbridge" ] || return 0
    if { mkdir -p /usr/local/bin && ln -sfn "$opt/current/bin/crmbridge" /usr/local/bin/crmbridge; } 2>/dev/null; then
        made /usr/local/bin/crmbridge
    else
        cli=$opt/current/bin/crmbridge
        say "the command is $cli, as /usr/local/bin cannot have a link to it"
    fi
}

# --- the server: the service ---

# Prints what OpenRC takes the service for.
service_state() {
    for state in starting stopping inactive started stopped; do [ ! -L "$rc/$state/crmbridge" ] || break; done
    echo "$state"
}

# Stops it, and ends what OpenRC has lost sight of.
stop_service() {
    [ -e /etc/init.d/crmbridge ] || return 0
    # what a killed run asked of OpenRC may still go on
    [ ! -e "$rc/exclusive/crmbridge" ] || flock -w 90 "$rc/exclusive/crmbridge" true || :
    rc-service crmbridge stop >/dev/null 2>&1 9>&- || :
    # a start that was killed half-way, or a killed supervisor, is started for ever to OpenRC
    [ "$(service_state)" = stopped ] || rc-service crmbridge zap >/dev/null 2>&1 || :
    rc-service crmbridge clear >/dev/null 2>&1 || : # a version that had none ended what is its own
}

# Starts the service and waits until it can do its work.
start_service() {
    log=$(rc-service crmbridge start 2>&1 9>&-) || { printf '%s\n' "$log" >&2 && stop "OpenRC could not start the service."; }
    wait_well
    tell started "crmbridge $(version_at current): http://$host:$port/health is good"
}

# Waits until the service is well. Stops when its process has ended twice, when it has said for three seconds that it is
# not well, and after half a minute.
wait_well() {
    ends=$(($(uptime_s) + 30)) seen='' starts=0 said="nothing answers"
    while [ "$(uptime_s)" -lt "$ends" ]; do
        pid=$(cat "$rc/options/crmbridge/child_pid" 2>/dev/null) || pid=''
        [ "$pid" = "$seen" ] || starts=$((starts + 1)) seen=$pid
        if [ -e "/proc/${pid:-none}" ]; then
            said=$(bridge "$(version_at current)" health --wait 3 --pid "$pid" 2>&1) && return || [ $? -ne 1 ] || break
        elif [ "$starts" -ge 2 ]; then
            said="its process has ended twice"
            break
        fi
        sleep 0.2
    done
    printf '  %s\n' "$said" >&2
    rc-service crmbridge status >&2 || :
    stop "the service is not well; why stands above, and in its log: $logs/crmbridge.log"
}

uptime_s() { sed 's/\..*//' /proc/uptime; }

# --- the server: from one version to another ---
# Migrations only add: an older version runs on a newer schema, so going back is one link. The mark says that a move is
# under way, from which version and in which state; a run that was killed is put right by the next one. A boot starts
# whatever `current` names.

# Lets the service run as the version $1. Until the end of it every failure, and every kill, leads to put_back.
move_to() {
    from=$(version_at current)
    echo "$(service_state) $from" >"$mark.new"
    sync -f "$mark.new"
    mv -- "$mark.new" "$mark"
    if [ -n "$from" ]; then
        stop_service
        tries=10
        until log=$(bridge "$1" migrate 2>&1); do # a command that somebody types holds the database for a moment
            tries=$((tries - 1))
            case $tries:$log in
                [1-9]*:*"is in use"*) sleep 1 ;;
                *) stop "the database could not be brought to the schema of $1: $log" ;;
            esac
        done
        [ "$log" = "nothing to do" ] || tell migrated "$(printf %s "$log" | tr '\n' ' ')"
    fi
    point current "$1"
    place_service "$1" "${from:-$1}"
    tell_made
    [ -n "$from" ] || rc-update -q add crmbridge default
    # one that was stopped on purpose stays so
    if [ -z "$from" ] || ! grep -q ^stopped "$mark"; then start_service; fi
    echo "done $from" >"$mark"
    point previous "$from"
    rm -f -- "$mark"
    for tree in "$opt"/*; do
        case ${tree##*/} in current | previous | "$1" | "$from") ;; *) rm -rf -- "$tree" ;; esac
    done
}

# Brings back what ran before a move that was not finished.
put_back() {
    read -r was from <"$mark" || :
    [ "$was" != "done" ] || { point previous "$from" && rm -f -- "$mark" && return; }
    stop_service
    to=$(version_at current)
    point current "$from"
    if [ -n "$from" ]; then
        say "putting $from back"
        place_service "$from" "$to"
        if [ "$was" = stopped ] || (start_service); then
            say "$from is as before; what the other version had accepted is kept"
        else
            say "$from is back with all that was accepted, but does not run; why stands above"
        fi
    fi
    rm -f -- "$mark"
}

# A failure in the middle of a move ends here.
on_exit() {
    status=$?
    trap - EXIT
    trap '' PIPE # nobody may read what is said, but it goes on
    rm -rf -- "$opt/.draft"
    if [ -e "$mark" ]; then
        (put_back) || say "what ran before could not be put back; the next run of install.sh tries it again"
        say "when the cause is mended, run the same command again; what was done so far is used then"
        [ "$status" != 0 ] || status=1
    fi
    exit "$status"
}

# What every command that changes the server begins with.
begin() {
    umask 022
    need_root; need_openrc; need_tools; take_turn
    recovered=no making=''
    if [ -e "$mark" ]; then
        say "the last run was cut short"
        read -r was from <"$mark" || :
        [ -z "$from" ] || { revive "$from"; read_ini "$from"; }
        put_back
        recovered=yes
    fi
    trap on_exit EXIT
    trap 'exit 130' HUP INT TERM PIPE
}

# --- the server: commands ---

install_version() {
    begin
    [ "$1" = install ] || need_installed
    need_python
    need_clock
    need_memory
    name_version
    current=$(version_at current)
    echo "crmbridge $version, Python $python_version ($python), SQLite $sqlite_version"
    [ "$current" != "$version" ] || { mend "is already installed"; return; }
    if [ -z "$current" ]; then
        need_space "$data" 50 "the database"
        need_port
    fi
    build
    prepare_system
    read_ini "$version"
    if [ -z "$current" ]; then
        log=$(bridge "$version" init 2>&1) || stop "crmbridge init: $log"
        move_to "$version"
        tell_next
    else
        back_up
        move_to "$version"
        bridge "$version" init | sed '/^kept/d'
        echo "crmbridge $version is $(service_state); $current is kept:  $opt/current/install.sh rollback"
    fi
}

# Makes a copy of the database before its schema may change, and tries the new version on it.
back_up() {
    if [ ! -e "$database" ] && [ -e "$key_file" ]; then
        stop "no database at $database, though crmbridge was set up here." \
            "Is its disk mounted (df)? If it is lost:  crmbridge restore FILE"
    fi
    [ -e "$database" ] || return 0
    log=$(bridge "$version" backup "$data/backups/upgrades/" --keep 3 2>&1) || {
        printf '%s\n' "$log" >&2
        stop "the backup before the upgrade failed; what was said stands above." "Nothing was changed; $current runs on."
    }
    file=$(printf '%s\n' "$log" | sed -n 's/^to  *//p')
    tell saved "$file"
    log=$(bridge "$version" check --rehearse "$file" 2>&1) || {
        printf '%s\n' "$log" | tail -n 5 >&2
        stop "$version did not pass its rehearsal on a copy of the database; why stands above." \
            "Nothing was changed; $current runs on."
    }
    printf '  %s\n' "$log"
}

tell_next() {
    cat <<END

crmbridge $version runs, and starts at every boot. Next:

1. In $ini, under [instagram], set verify_token (a string of your own) and app_secrets (the Instagram app
   secret: Meta's console, "API setup with Instagram login"); under [web], public_url. Then:  rc-service crmbridge restart
2. Lead https://YOUR.NAME to http://$host:$port by a reverse proxy on this machine: $opt/current/docs/proxy.
3. In Meta's console, "Configure webhooks": the address https://YOUR.NAME/webhooks/instagram and the verify token; subscribe
   to messages, message_echoes, messaging_seen, message_reactions, messaging_postbacks, message_edit and
   messaging_referral, and set the app live.
4. Make a key for yourself, which is shown once, and connect the account with it (docs/instagram.md):
     $cli key create --name admin --admin
END
    command -v logrotate >/dev/null 2>&1 || echo "5. The log is rotated by logrotate:  emerge --ask app-admin/logrotate"
}

rollback() {
    begin
    need_installed
    [ "$recovered" = no ] || return 0
    version=$(version_at previous)
    [ -n "$version" ] || stop "there is no version before $current to go back to."
    revive "$version"
    read_ini "$version"
    move_to "$version"
    echo "crmbridge $version is $(service_state); $current is kept, and another rollback goes there again"
}

repair() {
    begin
    need_installed
    version=$current
    mend "is whole"
}

# Makes what is missing or damaged around the version that runs, and says $1 when that is well.
mend() {
    runs "$opt/$version" || { revive "$version"; rc-service --ifstarted crmbridge restart >/dev/null 2>&1 9>&- || :; }
    prepare_system
    read_ini "$version"
    place_service "$version" "$version"
    tell_made
    rc-service crmbridge status >/dev/null 2>&1 && code=0 || code=$?
    # 1: its supervisor has trouble; 3: it was stopped, maybe on purpose, or by its Python's end where it starts at boot
    case $command:$code:$(rc-update show default 2>/dev/null | grep -cw crmbridge) in
        *:[01]:*) wait_well ;;
        install:3:* | upgrade:3:* | *:3:0) ;;
        *) stop_service && start_service ;;
    esac
    echo "crmbridge $version $1; the service is $(service_state)"
}

uninstall() {
    case $* in '' | --purge | "--purge --yes") ;; *) stop "uninstall knows --purge and --purge --yes, not '$*'." ;; esac
    need_root; need_openrc; take_turn
    if [ "$*" = --purge ]; then ask_for_purge; fi
    stop_service
    rc-update -q -a del crmbridge >/dev/null 2>&1 || :
    if (read_ini current) 2>/dev/null; then read_ini current; fi
    [ "$(readlink /usr/local/bin/crmbridge)" != "$opt/current/bin/crmbridge" ] || remove /usr/local/bin/crmbridge
    ! { [ -n "$*" ] || cmp -s "$opt/current/openrc/crmbridge.cron" /etc/cron.daily/crmbridge; } || remove /etc/cron.daily/crmbridge
    remove /etc/init.d/crmbridge /etc/logrotate.d/crmbridge
    if [ -z "$*" ]; then
        remove "$opt"
        keep "$etc" /etc/conf.d/crmbridge /etc/cron.daily/crmbridge "$data" "$logs"
        case $me in "$opt"/*) me="./install.sh (in a checkout) or sh BUNDLE" ;; esac # it has just been removed
        echo "Another installation takes them up again. To remove them, and their user, too:  $me uninstall --purge"
        return
    fi
    [ ! -e "$etc/.user-made" ] || made=yes
    left=$(ps -o pid= -U "$user" 2>/dev/null | tr '\n' ' ') || :
    [ "${made:-no}:$left" = yes: ] || [ "${made:-no}" = no ] ||
        stop "the user $user has processes, and cannot be removed." "End them, and run this again:  kill $left"
    remove /etc/conf.d/crmbridge /etc/conf.d/._cfg0000_crmbridge "$etc" "$data" "$logs" "$opt"
    keep "${database:-}" "${key_file:-}" # where an administrator moved them
    id "$user" >/dev/null 2>&1 || return 0
    if [ "${made:-no}" = yes ]; then
        if command -v userdel >/dev/null; then userdel "$user"; else deluser "$user"; fi
        ! grep -q "^$user:" /etc/group || if command -v groupdel >/dev/null; then groupdel "$user"; else delgroup "$user"; fi
        tell removed "user $user"
    else
        tell kept "user $user, who was here before"
    fi
}

ask_for_purge() {
    [ -t 0 ] || stop "uninstall --purge removes configuration, key, data, backups and logs for good." \
        "Nobody is there to be asked; to have it done all the same:  $me uninstall --purge --yes"
    printf 'This removes %s, %s with all backups, and %s for good. Type purge to go on: ' "$etc" "$data" "$logs" >&2
    [ "$(head -n 1)" = purge ] || stop "nothing was removed."
}

keep() { for place; do [ ! -e "$place" ] || tell kept "$place"; done; }

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
    tree=$opt/$current well=0 previous=$(version_at previous)
    line() { printf '%-15s%s\n' "$1" "$2"; }
    line version "$current, in $tree ($(du -hs -- "$tree" | cut -f 1))"
    line previous "${previous:-none}"
    [ ! -e "$mark" ] || { line unfinished "a move was cut short; the next install.sh command puts it right"; well=1; }
    log=$(rc-service crmbridge status 2>&1) || well=1
    printf '%s\n' "$log" | sed 's/^ *\* //; s/^status: //; s/^/service        /'
    levels=$(rc-update show 2>/dev/null | sed -n 's/^ *crmbridge *| *//p' | tr -s ' ')
    line boot "${levels:+it starts in runlevel ${levels% }}"
    made_with=$(sed -n 's/^version = //p' "$tree/venv/pyvenv.cfg")
    runs "$tree" || { line python "gone: $made_with; type: $tree/install.sh repair"; return 1; }
    line python "$made_with ($(readlink -f "$tree/venv/bin/python"))"
    log=$( (read_ini current) 2>&1) || { line configuration "$log"; return 1; }
    read_ini current
    log=$(bridge current health 2>&1) || well=1
    line health "$log"
    line files "$ini, $key_file, $database ($(df -Ph -- "$data" | awk 'NR == 2 {print $4}') free), $logs/crmbridge.log"
    bridge current doctor --no-calls --json 2>/dev/null |
        sed -n '/"slug": "backup/,/"what"/s/^ *"what": "\(the last backup \)\{0,1\}\(.*\)",$/last backup    \2/p'
    return "$well"
}

# --- the bundle ---

bundle() {
    arch=$(uname -m) platforms=''
    if [ "${1:-}" = --for ]; then
        arch=${2:-}
        case $arch in
            x86_64 | aarch64) platforms="--platform manylinux2014_$arch" ;;
            x86_64-musl | aarch64-musl) platforms="--platform musllinux_1_2_${arch%-musl} --platform musllinux_1_1_${arch%-musl}" ;;
            *) stop "bundle --for knows x86_64, aarch64, x86_64-musl and aarch64-musl, not '$arch'." ;;
        esac
        shift 2
    fi
    case ${1:-} in
        '') file=$(pwd)/crmbridge-$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$root/crmbridge/__init__.py")-$arch.sh ;;
        /*) file=$1 ;;
        *) file=$(pwd)/$1 ;;
    esac
    cd / # as in need_root
    scratch=$(mktemp -d)
    trap 'rm -rf -- "$scratch"' EXIT
    trap 'exit 130' HUP INT TERM
    if [ -d "$root/wheels" ] && [ -z "$platforms" ]; then
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
    sed "s/^sum=.*/sum=${sum%% *} bundle_made=$(date +%s)/" "$root/openrc/bundle" | cat - "$scratch/payload.tar" >"$file.new"
    chmod 755 "$file.new"
    mv -f -- "$file.new" "$file"
    echo "$file: $(du -h -- "$file" | cut -f 1), for $arch and Python$(bundled_pythons)"
    echo "On the server, as root:  sh ${file##*/} install"
}

# Fills $scratch/wheels with what each Python needs; one that the index has no packages for is left out.
download_wheels() {
    for minor in 11 12 13 14; do
        say "fetching the packages for Python 3.$minor on $arch"
        # shellcheck disable=SC2086 # several arguments, or none
        if ! log=$("$venv/bin/python" -m pip download --quiet --no-input --disable-pip-version-check --no-deps \
            --only-binary :all: --require-hashes --python-version "3.$minor" $platforms -r "$root/requirements.txt" \
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

# --- the checkout: .venv for demo and test ---

stamp=$venv/crmbridge.stamp             # what the runtime packages were installed from; written last
test_stamp=$venv/crmbridge.test-stamp   # the same for the test packages
layout=1                                # raise it when a change below must remake every .venv

# Prints what must stay the same for a .venv of the Python $1 to stay usable: the stamp that it should bear by now.
wanted_stamp() {
    identity=$("$1" -c 'import sys, sysconfig; print(sysconfig.get_config_var("SOABI"), sys.base_prefix)' 2>/dev/null) || return 1
    sum=$(sha256sum <"$root/requirements.txt")
    printf '%s\n' "layout $layout" "$root" "$identity" "${sum%% *}"
}

# True when the .venv can be used as it is. An explicit $PYTHON must be the one it was made with.
is_ready() {
    [ -f "$stamp" ] || return 1
    wanted=$(wanted_stamp "$venv/bin/python") && [ "$(cat "$stamp")" = "$wanted" ] || return 1
    [ -z "${PYTHON:-}" ] || [ "$(wanted_stamp "$PYTHON")" = "$wanted" ]
}

# Makes the .venv anew. The stamp comes last, so a run that is cut short is seen and redone.
build_venv() {
    choose_python
    say "installing crmbridge's packages into .venv (the first time takes a minute)"
    make_venv
    install_pinned "$root/requirements.txt" || stop_at_pip
    point_venv "$root"
    # A shell script, because a #! line can name no Python below a path with spaces; -P: nothing from where it is run.
    # shellcheck disable=SC2016 # for that script to expand
    printf '%s\n' '#!/bin/sh' 'exec "$(dirname -- "$(readlink -f -- "$0")")/python" -P -m crmbridge "$@"' >"$venv/bin/crmbridge"
    chmod 755 "$venv/bin/crmbridge"
    wanted_stamp "$venv/bin/python" >"$stamp.new"
    mv -f -- "$stamp.new" "$stamp"
}

add_test_packages() {
    sum=$(sha256sum <"$root/tests/requirements.txt")
    if [ -f "$test_stamp" ] && [ "$(cat "$test_stamp")" = "$sum" ]; then return; fi
    say "installing the test packages into .venv"
    mv -f -- "$stamp" "$stamp.kept" # pip undoes what it can't finish; only a killed one leaves the .venv in doubt
    install_pinned "$root/tests/requirements.txt" || { mv -f -- "$stamp.kept" "$stamp" && stop_at_pip; }
    printf '%s\n' "$sum" >"$test_stamp"
    mv -f -- "$stamp.kept" "$stamp"
}

# Brings the .venv up to date, for "$1" = test with the test packages; one run at a time.
prepare() {
    ! command -v flock >/dev/null 2>&1 || flock 9
    is_ready || build_venv
    if [ "$1" = test ]; then add_test_packages; fi
}

command=${1:-}
[ $# -eq 0 ] || shift
case $command in
    install | upgrade) install_version "$command" ;;
    rollback | repair | uninstall | bundle) "$command" "$@" ;;
    status) show_status ;;
    demo | test)
        prepare "$command" 9<"$root/install.sh"
        [ "$command" = test ] || exec "$venv/bin/crmbridge" demo "$@"
        cd -- "$root"
        exec "$venv/bin/python" -m pytest "$@"
        ;;
    help | -h | --help) usage ;;
    *)
        [ -z "$command" ] || say "there is no command '$command'"
        usage >&2
        exit 2
        ;;
esac
