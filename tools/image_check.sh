#!/usr/bin/env bash
# Builds the Docker image without a Docker engine and uses it the way a user would: as an ordinary user, on
# a mounted directory. Wants root, Debian or Ubuntu, and 6 GB of space for a few minutes.
set -euo pipefail

fail() { printf 'error: %s\n' "$1" >&2; exit 1; }
step() { printf '%4d s  %s\n' "$SECONDS" "$1"; }

[ $# -eq 0 ] || { echo "error: image_check.sh takes no arguments" >&2; exit 2; }
[ "$(id -u)" = 0 ] || fail "building an image without a Docker engine needs root: sudo make image-check"
project=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd -P)

missing=()
for tool in buildah mmdebstrap; do command -v "$tool" >/dev/null || missing+=("$tool"); done
if [ ${#missing[@]} -gt 0 ]; then
    step "installing ${missing[*]}"
    { apt-get update && apt-get install -y "${missing[@]}"; } >/dev/null 2>&1 ||
        fail "cannot install ${missing[*]}: apt-get install ${missing[*]}"
fi

# Everything, images and containers included, is under one directory that is gone in the end.
scratch=$(mktemp -d -t rebirth-image.XXXXXX)
export TMPDIR=$scratch BUILDAH_ISOLATION=chroot
b() { buildah --root "$scratch/storage" --runroot "$scratch/run" --storage-driver vfs "$@"; }
quietly() { # COMMAND..., whose output is only shown when it fails
    "$@" >"$scratch/log" 2>&1 </dev/null || { tail -n 40 "$scratch/log" >&2; fail "this failed: $*"; }
}
cleanup() {
    b rm --all >/dev/null 2>&1 || true
    rm -rf --one-file-system -- "$scratch"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# The build installs Python packages the way this machine does: with its pip settings, the certificates and
# the local package directories these name. All are mounted for the build, so none of it is in the image.
mounts=()
mkdir "$scratch/pip"
python3 - "$scratch/pip" >"$scratch/mounts" <<'PYTHON'
import ast, collections, configparser, pathlib, shutil, subprocess, sys

target = pathlib.Path(sys.argv[1])  # /etc/pip in the build


def mounted(word):
    path = pathlib.Path(word.removeprefix("file://"))
    if path.is_absolute() and path.is_file():  # not under its own name, which a package may want to write
        shutil.copy(path, target)
        return f"/etc/pip/{path.name}"
    if path.is_absolute() and path.is_dir():
        print(path.parent if word.startswith("file://") else path)  # an index links to files beside it
    return word


listing = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
sections = collections.defaultdict(dict)
for line in listing.stdout.splitlines():
    key, _, value = line.partition("=")
    section, _, name = key.rpartition(".")
    value = " ".join(mounted(word) for word in ast.literal_eval(value).split())
    sections["global" if section == ":env:" else section][name] = value
config = configparser.RawConfigParser()
config.read_dict(sections)
with open(target / "pip.conf", "w") as file:
    config.write(file)
PYTHON
mounts+=(--volume "$scratch/pip:/etc/pip:ro" --volume "$scratch/pip/pip.conf:/etc/pip.conf:ro")
while IFS= read -r path; do mounts+=(--volume "$path:$path:ro"); done <"$scratch/mounts"

step "making the base image"
quietly mmdebstrap --variant=apt bookworm "$scratch/base.tar"
base=$(b from scratch)
quietly b add "$base" "$scratch/base.tar" /
quietly b commit --rm "$base" debian:bookworm-slim # what the Dockerfile starts from
rm "$scratch/base.tar"

step "building the image"
quietly b bud --pull-never --network host "${mounts[@]}" --tag rebirth-caffe "$project"
container=$(b from --pull-never rebirth-caffe)
image_user=$(b inspect --format '{{.OCIv1.Config.User}}' "$container")
entry=$(b inspect --format '{{range .OCIv1.Config.Entrypoint}}{{.}} {{end}}' "$container")
case $image_user in '' | root | 0*) fail "the image runs as root" ;; esac

# As the image's own user, and as one the image has never heard of (docker run --user).
for id in 1000 4321; do
    work=$scratch/work-$id
    install -d -o "$id" -g "$id" "$work"
    cp "$project/prototxts/bvlc_googlenet/deploy.prototxt" "$work/net.prototxt"
    user=(--user "$id:$id")
    [ "$id" != 1000 ] || user=()
    # shellcheck disable=SC2086 # the entry point's words
    in_image() { b run "${user[@]}" --volume "$work:/work" "$container" -- $entry "$@" </dev/null; }

    step "uid $id: caffe --version"
    [[ "$(in_image caffe --version)" == *"caffe version 1.0"* ]] || fail "caffe does not run in the image"
    step "uid $id: tools/rebirth_net.py"
    quietly in_image tools/rebirth_net.py net.prototxt --out reborn
    [ -s "$work/reborn/deploy.prototxt" ] || fail "tools/rebirth_net.py wrote no reborn/deploy.prototxt"
    [ -z "$(find "$work/reborn" ! -user "$id")" ] || fail "the files in reborn/ do not belong to user $id"
    step "uid $id: tools/benchmark.py, in real Caffe"
    in_image tools/benchmark.py net.prototxt reborn/deploy.prototxt --engine caffe --runs 3
done

[[ "$(in_image)" == *tools/rebirth_net.py* ]] || fail "without arguments the image does not list its tools"
status=0
in_image tools/nonsense.py 2>/dev/null || status=$?
[ "$status" = 2 ] || fail "an unknown tool ends with $status, not with 2"
step "the image works: $(b images --format '{{.Size}}' rebirth-caffe), user '$image_user'"
