#!/usr/bin/env bash
# What somebody does who meets this repository: a clone, `make demo`, the wheel in an environment of its own, the
# README's Python, each command with the example of its help, replay, two processes. Run on demand; nothing of the
# repository is written to.
#
#   tests/newcomer.sh                          everything (some ten minutes: torch is installed twice)
#   STEPS="clone wheel readme" tests/newcomer.sh
#   STEPS="clone commands replay torchrun" VENV=.venv tests/newcomer.sh    with an environment that is there
#
# PYTHON       interpreter of new environments (python3)
# STEPS        parts to run, in this order: clone demo wheel readme commands replay torchrun
# VENV         environment with attnctrl in it, for the parts behind `wheel`; made by `wheel` if left out
# SKIP         words of commands that are not run, "eval bench search" if left out (minutes each); SKIP= runs all
# TORCH_INDEX  index that torch is taken from, as for make
# WORK         folder to work in, kept (its clone/ and here/ are made anew); a temporary one, removed at the end, if left out
set -euo pipefail

repository=$(git -C "$(dirname "${BASH_SOURCE[0]}")" rev-parse --show-toplevel)
: "${PYTHON:=python3}" "${STEPS:=clone demo wheel readme commands replay torchrun}" "${TORCH_INDEX:=}" "${SKIP=eval bench search}"
if [[ -n ${VENV:-} ]]; then VENV=$(realpath -s "$VENV"); fi
if [[ -z ${WORK:-} ]]; then
    WORK=$(mktemp -d)
    trap 'rm -rf "$WORK"' EXIT
fi
mkdir -p "$WORK"
WORK=$(realpath "$WORK")
: "${VENV:=$WORK/venv}"
clone=$WORK/clone
here=$WORK/here # where the newcomer works: not in the clone, whose attnctrl/ would hide the installed one

say() { printf '\n== %s\n' "$*" >&2; }
fail() {
    printf 'FAILED: %s\n' "$*" >&2
    exit 1
}
differ() { cmp -s "$1" "$2" || fail "$1 and $2 differ"; }

clone() {
    rm -rf "$clone" "$here" # of an earlier run in a kept WORK
    git clone --quiet --no-hardlinks "$repository" "$clone"
    mkdir -p "$here"
    ln -sfn "$clone/examples" "$here/examples"
    ln -sfn "$clone/assets" "$here/assets"
}

demo() {
    make -C "$clone" PYTHON="$PYTHON" TORCH_INDEX="$TORCH_INDEX" demo
    [[ -s $clone/out/demo.png ]] || fail "make demo wrote no out/demo.png"
}

wheel() {
    "$PYTHON" -m venv "$VENV"
    local pip=("$VENV/bin/python" -m pip install --disable-pip-version-check --quiet -c "$clone/constraints.txt")
    "${pip[@]}" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
    "$VENV/bin/python" -m pip wheel --disable-pip-version-check --quiet --no-deps --wheel-dir "$WORK/dist" "$clone"
    "${pip[@]}" "$(echo "$WORK"/dist/attnctrl-*.whl)[lora]"
}

readme() {
    (cd "$here" && "$VENV/bin/python" - "$clone/README.md") <<'PYTHON'
import pathlib, re, sys

names = {}
for block in re.findall(r"```python\n(.*?)```", pathlib.Path(sys.argv[1]).read_text("utf-8"), flags=re.DOTALL):
    exec(block, names)
assert names["image"].size == (64, 64)
PYTHON
    [[ -s $here/two_shapes.png ]] || fail "the README's Python wrote no picture"
}

examples_of() { # the lines that a command's help shows
    COLUMNS=400 NO_COLOR=1 "$VENV/bin/attnctrl" "$@" --help | sed -n '/^ *Examples\{0,1\}:/,/^╭/p' | sed -n 's/^ *\(attnctrl .*[^ ]\) *$/\1/p'
}

all_commands() { # with those of groups, such as "heads show"
    "$VENV/bin/python" - <<'PYTHON'
from typer.main import get_command

from attnctrl.cli import app


def tell(command, name=""):
    for word, one in getattr(command, "commands", {}).items():
        tell(one, f"{name} {word}".strip())
    if not hasattr(command, "commands"):
        print(name)


tell(get_command(app))
PYTHON
}

commands() {
    cd "$here"
    export PATH=$VENV/bin:$PATH
    attnctrl --version
    attnctrl generate examples/two_shapes.yaml -o out/ # pictures that examples name
    cp out/two_shapes-0.png photo.png
    cp out/two_shapes-0.png poster.png
    "$VENV/bin/python" -c "from attnctrl.headset import HeadSet; HeadSet(heads=[('joint:2', 0)]).save('heads.json')"
    local name word line names lines
    mapfile -t names < <(all_commands)
    ((${#names[@]} > 10)) || fail "found ${#names[@]} commands"
    for name in "${names[@]}"; do
        for word in $name; do
            if [[ " $SKIP " == *" $word "* ]]; then continue 2; fi
        done
        mapfile -t lines < <(examples_of $name)
        ((${#lines[@]})) || fail "attnctrl $name --help shows no example"
        for line in "${lines[@]}"; do
            # the place of somebody's own model
            if [[ $line == *owner/name* ]]; then continue; fi
            say "$line"
            bash -c "$line" >"$WORK/last.txt" || fail "$line"
        done
    done
}

replay() {
    cd "$here"
    local attnctrl=$VENV/bin/attnctrl picture
    "$attnctrl" generate examples/two_shapes.yaml -o replayed/ --steps 4
    "$attnctrl" layout "a red circle" --at 0.05,0.2,0.45,0.8 -o replayed/ --steps 4
    "$attnctrl" style "a red circle" "a blue star" --style "white background" -o replayed/ --steps 4
    for picture in replayed/*.png; do
        [[ $("$attnctrl" replay "$picture" -o again.png --format quiet) == true ]] || fail "$picture did not come out again"
        differ "$picture" again.png
    done
}

torchrun() {
    cd "$here"
    local line=(generate examples/two_shapes.yaml -n 3 --steps 4 --device cpu --format quiet)
    # sums of several threads round otherwise than those of one
    export OMP_NUM_THREADS=1
    "$VENV/bin/attnctrl" "${line[@]}" -o one/
    "$VENV/bin/python" -m torch.distributed.run --standalone --nproc-per-node 2 -m attnctrl "${line[@]}" -o two/
    local picture
    for picture in one/*.png; do differ "$picture" "two/${picture#one/}"; done
}

for step in $STEPS; do
    say "$step"
    started=$SECONDS
    case $step in
        clone | demo | wheel | readme | commands | replay | torchrun) (set -e; "$step") ;;
        *) fail "no step '$step'" ;;
    esac
    say "$step: $((SECONDS - started)) s"
done
