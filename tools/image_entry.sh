#!/bin/sh
# What the Docker image runs: the project's tools by their names in the README, on the user's files.
home=$(dirname "$(dirname "$(readlink -f "$0")")")

case ${1-} in
    '' | -h | --help)
        cat <<'USAGE'
Usage: docker run --rm -v "$PWD:/work" --user "$(id -u):$(id -g)" IMAGE COMMAND [ARGUMENT...]

The current directory is the container's /work; files are named relative to it. COMMAND is one of
USAGE
        (cd "$home" && printf '  %s\n' tools/*.py)
        echo '  caffe, python, or anything else in the image' ;;
    tools/*.py)
        if [ ! -f "$home/$1" ]; then
            echo "error: there is no $1 in this image; run it without arguments for a list" >&2
            exit 2
        fi
        tool=$home/$1
        shift
        exec "$home/.venv/bin/python" "$tool" "$@" ;;
    *)
        exec "$@" ;;
esac
