#!/usr/bin/env bash
# Unpacks Caffe 1.0 and pycaffe, with every library they need, into one directory.
#
# Debian 11 is the last release that carries Caffe. Its packages are unpacked, not installed: no root, no
# change to the host, and the host's own libraries never meet the old ones, because the programs are
# started through the unpacked system's own loader.
set -euo pipefail
umask 022                                   # what root unpacks, everyone may run

usage() {
    cat <<'USAGE'
Usage: tools/install_caffe.sh [DIR] [options]

Unpacks Caffe 1.0 into DIR (default: .caffe/ beside this project's README) and leaves
  DIR/bin/caffe     the caffe command
  DIR/bin/python    Python 3.9 with pycaffe (import caffe)
  DIR/bin/upgrade_* Caffe's commands that bring old files into today's format
All run from any directory, and DIR may be moved or copied. Run again, it only checks that they work.

  --mirror URL    take the packages from this Debian mirror (for the day Debian 11 moves to an archive)
  --keyring FILE  the keys that mirror is signed with (default: the Debian archive's)
  --force         unpack again even if DIR works
  --verbose       show what the download says
  --help

Python layers: modules are looked for in Caffe's own system first, then in your PYTHONPATH.
USAGE
}

readonly SUITE=bullseye
readonly PACKAGES=caffe,python3-caffe,libopenblas0-pthread

fail() { printf 'error: %s\n' "$1" >&2; exit "${2:-1}"; }
misuse() { fail "$1; see tools/install_caffe.sh --help" 2; }

dir='' mirror='' keyring='' force='' verbose=''
while [ $# -gt 0 ]; do
    case $1 in
        --mirror | --keyring)
            [ -n "${2:-}" ] || misuse "$1 needs a value"
            if [ "$1" = --mirror ]; then mirror=$2; else keyring=$2; fi
            shift ;;
        --mirror=*) mirror=${1#*=} ;;
        --keyring=*) keyring=${1#*=} ;;
        --force) force=yes ;;
        --verbose) verbose=yes ;;
        -h | --help) usage; exit 0 ;;
        -*) misuse "unknown option '$1'" ;;
        '') misuse "the directory's name is empty" ;;
        *) [ -z "$dir" ] || misuse "one directory at a time: '$dir' and '$1'"; dir=$1 ;;
    esac
    shift
done
case $mirror in '' | *://*) ;; *) misuse "--mirror '$mirror' is not a URL" ;; esac
[ -z "$keyring" ] || [ -r "$keyring" ] || misuse "--keyring '$keyring' cannot be read"
[ "$(uname -s)" = Linux ] ||
    fail "these packages are for Linux; use the Docker image, or give your own Caffe with REBIRTH_CAFFE"

project=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd -P)
dir=$(readlink -m -- "${dir:-$project/.caffe}")
parent=$(dirname -- "$dir")
# The loader splits its search path at these, and the package tools quote with them.
case $dir in *[:\;\"\$\\]*) misuse "'$dir' holds one of : ; \" \$ \\, which the loader cannot take" ;; esac
[ "$dir" != / ] || misuse "'/' is not a place for it"

# ---------------------------------------------------------------------------------------------- wrappers

# One of DIR/bin. Everything is found relative to the wrapper, so that DIR can be moved; the search path is
# the loader's argument and not LD_LIBRARY_PATH, which every child process would inherit.
wrapper() { # NEW_DIR PROGRAM [ARGUMENT...]
    local base=$1 program=$2 loader triplet embedded=''
    shift 2
    loader=$(printf '%s\n' "$base"/root/lib/*-linux-gnu*/ld-[0-9]*.so | head -n 1)
    triplet=$(basename -- "$(dirname -- "$loader")")
    # The command embeds Python for its Python layers, and only this variable tells that one where it is;
    # sitecustomize.py takes both away again.
    [ "$program" != caffe ] || embedded="export PYTHONHOME=\"\$root/usr\" PYTHONNOUSERSITE=1"$'\n'
    cat <<WRAPPER
#!/bin/sh
# Made by tools/install_caffe.sh: runs $program from ../root with that system's own loader and libraries.
self=\$(readlink -f -- "\$0") && root=\${self%/*/*}/root || exit
lib=\$root/usr/lib/$triplet
# The host's Python settings belong to the host's Python; sitecustomize.py gives PYTHONPATH back.
if [ -n "\${PYTHONPATH-}" ]; then export REBIRTH_HOST_PYTHONPATH="\$PYTHONPATH"; fi
unset PYTHONPATH PYTHONHOME LD_PRELOAD
# The Python inside the caffe command takes the first python3 on PATH for itself: that of an activated virtual
# environment would hide pycaffe. sitecustomize.py gives PATH back, too.
export REBIRTH_HOST_PATH="\$PATH" PATH="\$root/usr/bin:\$PATH"
${embedded}exec "\$root/lib/$triplet/${loader##*/}" --inhibit-cache \\
    --library-path "\$lib/openblas-pthread:\$root/lib/$triplet:\$lib:\$root/usr/lib" \\
    "\$root/usr/bin/$program"${*:+ $*} "\$@"
WRAPPER
}

# What Python itself does first: child processes get the environment the user had, sys.executable is
# something that can be run, and the user's PYTHONPATH comes after Caffe's own modules, so that packages
# made for the host's Python cannot shadow numpy or protobuf but Python layers are still found.
sitecustomize() {
    cat <<'PYTHON'
"""Made by tools/install_caffe.sh."""

import os
import sys

for _name in ("PYTHONHOME", "PYTHONNOUSERSITE"):
    os.environ.pop(_name, None)
if "REBIRTH_HOST_PATH" in os.environ:
    os.environ["PATH"] = os.environ.pop("REBIRTH_HOST_PATH")
_path = os.environ.pop("REBIRTH_HOST_PYTHONPATH", "")
if _path:
    os.environ["PYTHONPATH"] = _path
    if not sys.flags.ignore_environment:
        sys.path += [os.path.abspath(_entry) for _entry in _path.split(os.pathsep)]
# This file is DIR/root/usr/lib/python3.9/sitecustomize.py
sys.executable = os.path.join(os.path.abspath(__file__).rsplit(os.sep, 5)[0], "bin", "python")
PYTHON
}

put() { # FILE MODE, the text on stdin; a file that is already right is left alone
    local new=$work/put
    cat >"$new"
    chmod "$2" "$new"
    cmp -s "$new" "$1" || mv -f -- "$new" "$1"
}

furnish() { # NEW_DIR
    local site tool
    mkdir -p "$1/bin"
    wrapper "$1" caffe | put "$1/bin/caffe" 755
    wrapper "$1" python3 -s | put "$1/bin/python" 755
    for tool in "$1"/root/usr/bin/upgrade_*; do wrapper "$1" "${tool##*/}" | put "$1/bin/${tool##*/}" 755; done
    for site in "$1"/root/usr/lib/python3.*/; do sitecustomize | put "${site}sitecustomize.py" 644; done
}

# Really runs both. The quick look loads pycaffe's library and what it stands on, the thorough one all of
# pycaffe, which takes over a second (and leaves the compiled modules behind for read-only use).
works() { # DIR quick|thorough
    local code='import caffe'
    [ "$2" = thorough ] || code='
import importlib.util, sys, google.protobuf
sys.path.insert(0, importlib.util.find_spec("caffe").submodule_search_locations[0])
import _caffe'
    [[ "$("$1/bin/caffe" --version 2>&1)" == *"caffe version 1.0"* ]] &&
        env -u PYTHONDONTWRITEBYTECODE "$1/bin/python" -c "$code" >/dev/null 2>&1 </dev/null
}

# ---------------------------------------------------------------------------------------------- one at once

[ ! -e "$dir" ] || [ -d "$dir" ] || misuse "'$dir' exists and is not a directory"
if [ -d "$dir" ] && [ ! -e "$dir/root/usr/bin/caffe" ] && [ -n "$(ls -A -- "$dir")" ]; then
    misuse "'$dir' holds something else; name an empty or a new directory"
fi
mkdir -p -- "$parent" 2>/dev/null || fail "cannot create '$parent'; name a directory you may write"

# Locking the parent leaves no lock file behind. The download inherits the lock: if only this script is
# killed, the next run waits until the download has ended, too, before it cleans up.
exec 9<"$parent" || fail "cannot read '$parent'; name a directory you may write"
if ! flock -n 9; then
    echo "Another installation is at work in $parent; waiting for it."
    flock 9
fi

scratch=$dir.install_caffe.tmp work=$scratch/work new=$scratch/new child=''
cleanup() { rm -rf -- "$scratch"; }
stop() { # STATUS
    trap '' INT TERM HUP
    if [ -n "$child" ]; then kill -- "-$child" 2>/dev/null || true; wait "$child" 2>/dev/null || true; fi
    exit "$1"
}
trap cleanup EXIT
trap 'stop 130' INT
trap 'stop 143' TERM
trap 'stop 129' HUP

if [ -z "$force" ] && [ -e "$dir/bin/python" ] && works "$dir" quick; then
    # The wrappers of an earlier version of this script are brought up to date; DIR may be read-only.
    if mkdir -p "$work" 2>/dev/null && [ -w "$dir/bin" ]; then furnish "$dir"; fi
    echo "Caffe works: $dir/bin/caffe, $dir/bin/python (pycaffe)"
    exit 0
fi

cleanup                                     # what a killed run left
mkdir -p "$work/tmp" "$new" 2>/dev/null || fail "cannot write in '$parent'; name a directory you may write"
export TMPDIR=$work/tmp                     # so that a killed run's leftovers are all in one place
began=$SECONDS
log=$work/log

# ---------------------------------------------------------------------------------------------- tools

run() { # COMMAND..., its output kept for the error message
    local status=0
    set -m                                  # a process group of its own, which stop() can end as a whole
    if [ -n "$verbose" ]; then "$@" </dev/null > >(tee -a "$log") 2>&1 & else "$@" </dev/null >>"$log" 2>&1 & fi
    child=$!
    set +m
    wait "$child" || status=$?
    child=''
    return "$status"
}

reason() { # the first error in the log, or its last line
    { grep -m 1 '^E: ' "$log" || tail -n 1 "$log"; } 2>/dev/null | sed 's/^E: //; s/[.[:space:]]*$//'
}

# Packages of the host's own release, unpacked for this script alone. Nothing is installed, and where the
# host's package lists are missing a private copy is fetched, so that root is not needed.
apt_options=(-q -o APT::Sandbox::User=root -o Acquire::Retries=3)
fetch() { # PACKAGE...
    local lists=$work/lists deb
    if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
        fail "'$1' is not installed and there is no apt-get to fetch it; use Debian, Ubuntu or the Docker image"
    fi
    mkdir -p "$work/debs" "$work/host" "$lists/partial"
    download() { ( cd "$work/debs" && exec apt-get "${apt_options[@]}" "$@" ); }
    if ! run download download "$@"; then
        apt_options+=(-o "Dir::State::lists=$lists/" -o "Dir::Cache::pkgcache=" -o "Dir::Cache::srcpkgcache=")
        : >"$log"
        if ! run download update || ! run download download "$@"; then
            fail "cannot fetch $*: $(reason); check the network, or: sudo apt-get install mmdebstrap"
        fi
    fi
    for deb in "$work"/debs/*.deb; do dpkg-deb -x "$deb" "$work/host"; done
    rm -rf "$work/debs"
}

# mmdebstrap is a Perl program; minimal systems have Perl without these modules.
full_perl() { perl -e 'use Pod::Usage; use Time::HiRes; use Math::BigInt; use Term::ANSIColor; use File::Find' 2>/dev/null; }

if ! command -v mmdebstrap >/dev/null; then
    echo "Fetching mmdebstrap, which unpacks Debian packages (for this run only)"
    command -v perl >/dev/null || fail "mmdebstrap needs perl: sudo apt-get install perl"
    fetch mmdebstrap
    export PATH=$work/host/usr/bin:$PATH
    if ! full_perl; then
        # Its libraries' names hold its version; the perl package knows them.
        libraries=$(apt-cache "${apt_options[@]}" depends perl 2>/dev/null |
            sed -nE 's/^ *Depends: ((perl-modules-|libperl)5.*)/\1/p') || true
        [ -n "$libraries" ] || fail "mmdebstrap needs all of perl: sudo apt-get install perl"
        mapfile -t libraries <<<"$libraries"
        fetch "${libraries[@]}"
        modules=("$work"/host/usr/share/perl/5.* "$work"/host/usr/lib/*/perl/5.*)
        PERL5LIB=$(IFS=:; echo "${modules[*]}${PERL5LIB:+:$PERL5LIB}")
        export PERL5LIB
    fi
fi
mmdebstrap --version >"$log" 2>&1 || fail "mmdebstrap does not run: $(reason); sudo apt-get install perl mmdebstrap"

# The packages are verified with the Debian archive's keys, which Ubuntu does not have by itself.
if [ -z "$keyring" ]; then
    for attempt in 1 2; do
        for file in {,"$work/host"}/usr/share/keyrings/debian-archive-keyring.{gpg,pgp}; do
            if [ -z "$keyring" ] && [ -r "$file" ]; then keyring=$file; fi
        done
        if [ -n "$keyring" ]; then break; fi
        if [ "$attempt" = 1 ]; then fetch debian-archive-keyring; fi
    done
fi

# ---------------------------------------------------------------------------------------------- unpacking

echo "Unpacking Caffe 1.0 and pycaffe (Debian 11 packages) into $dir: half a minute and 0.5 GB"
# Without maintainer scripts nothing needs a chroot: "chrootless" is the one mode that works as root, as an
# ordinary user and inside containers, and it leaves files their user can remove.
options=(--mode=chrootless --variant=extract --skip=check/chrootless "--include=$PACKAGES"
    "--keyring=$keyring" '--aptopt=Acquire::Retries "3"')
# An archive's lists have expired; their signatures are still checked.
[ -z "$mirror" ] || options+=('--aptopt=Acquire::Check-Valid-Until "false"')
: >"$log"
run mmdebstrap "${options[@]}" "$SUITE" "$new/root" ${mirror:+"$mirror"} ||
    fail "the packages could not be unpacked: $(reason); check the network and the space on the disk, or name another Debian mirror with --mirror URL"

# What the two programs never read; the licences stay.
( cd "$new/root"
  rm -rf dev proc sys tmp run boot home media mnt opt srv bin sbin usr/sbin usr/include usr/libexec \
      var/lib/apt var/lib/dpkg var/cache usr/bin/perl* usr/bin/caffe-gtest usr/share/{man,info,locale,lintian,perl,perl5,javascript,bash-completion} \
      usr/lib/*-linux-gnu*/{perl,perl-base}
  find usr/share/doc -type f ! -name 'copyright*' -delete
  find usr/share/doc -depth -type d -empty -delete
  # Absolute links would lead out to the host's files.
  find . -type l -lname '/*' ! -lname '/etc/localtime' -print0 | while IFS= read -r -d '' link; do
      target=$(readlink -- "$link")
      if [ -e ".$target" ]; then ln -sfnr -- ".$target" "$link"; else rm -f -- "$link"; fi
  done )
furnish "$new"
works "$new" thorough || fail "the unpacked Caffe does not run here: $(
    { "$new/bin/caffe" --version && "$new/bin/python" -c 'import caffe'; } 2>&1 | tail -n 1 || true)"

# Into place, in renames: DIR is the old one, absent for an instant, or the new one; never half of it.
if [ -d "$dir" ]; then mv -T -- "$dir" "$scratch/old" || fail "cannot replace '$dir'; remove it and run this again"; fi
mv -T -- "$new" "$dir" || fail "cannot create '$dir'; name a directory you may write"
echo "Caffe works after $((SECONDS - began)) s: $dir/bin/caffe, $dir/bin/python (pycaffe)"
