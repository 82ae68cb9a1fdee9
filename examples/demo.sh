#!/usr/bin/env bash
# The main job, start to end: SFT, then DPO, then a chat page with the base and both adapters. Says what each stage took.
# Usage: examples/demo.sh [PYTHON] [serve options, such as port=7861]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
shift || true
total=0

stage() { # stage NAME COMMAND...: run it and say how long it took
  local name=$1 begin=$SECONDS
  shift
  echo "── $name: $*" >&2
  "$@"
  total=$((total + SECONDS - begin))
  printf '── %s took %d:%02d (%d:%02d so far)\n' "$name" $(((SECONDS - begin) / 60)) $(((SECONDS - begin) % 60)) \
    $((total / 60)) $((total % 60)) >&2
}

trained() { # trained ALGORITHM: is there an adapter that it made?
  grep -qs "\"algorithm\": \"$1\"" adapters/support/v*/card.json
}

# A part of the data, so that two slow cores are done in minutes; without these limits the experiments take all of it.
if trained sft; then
  echo "── an SFT adapter is there already; remove adapters/support to train anew" >&2
else
  stage SFT "$python" -m lit_ft +experiment=sft data.max_rows=240
fi
if trained dpo; then
  echo "── a DPO adapter is there already" >&2
else
  stage DPO "$python" -m lit_ft +experiment=dpo data.max_rows=64
fi
echo "── serving (Ctrl-C ends it)" >&2
exec "$python" -m serve "$@"
