#!/usr/bin/env bash
# The README's commands on what a quickstart made: readme_commands.sh QUICKSTART_FOLDER [VENV]
set -euo pipefail
made=$1
bin=${2:-.venv}/bin

# Reads its input to the end, unlike grep -q, whose early exit pipefail would take for a failure.
expect() { grep -- "$1" > /dev/null || { echo "expected '$1'" >&2; exit 1; }; }

"$bin/visper" --help | expect quickstart
for verb in quickstart train pipeline plan recipes chat evaluate look demo convert push; do "$bin/visper" "$verb" --help | expect Example; done
for verb in "data list" "data prepare" "data check" "data shard" "targets build" "targets check"; do
    "$bin/visper" $verb --help | expect Example
done
"$bin/visper" recipes | expect phi3-mini
"$bin/visper" data list --root "$made/data" | expect llava-665k
"$bin/visper" plan "$made/ift/run.yaml" --gpus 0 | expect peak
"$bin/visper" recipes llama3-8b-vit-l/pt | expect "global_batch: 256"
"$bin/visper" pipeline "$made/pt/run.yaml" "$made/ift/run.yaml" | expect finished
picture=$(find "$made/world/images" -name 'held_out_*' | sort | sed -n 1p)
"$bin/visper" chat "$made/ift" --image "$picture" --prompt "What is in the picture ?"
"$bin/visper" look "$made/pt" --image "$picture" -o "$made/look.png" | expect look.png
test -s "$made/look.png"
"$bin/visper" push "$made/ift" someone/quickstart --dry-run | expect model.safetensors
"$bin/visper" evaluate "$made/ift" --questions "$made/world/questions.json" --images "$made/world/images" \
    --answers "$made/answers/cli.jsonl" --max-new-tokens 4
"$bin/visper" train "$made/ift/run.yaml" output="$made/again" optimization.max_steps=2 logging.save_every=1
if "$bin/visper" train "$made/ift/run.yaml" optimization.lrr=1 2> "$made/error.txt"; then exit 1; fi
expect "did you mean 'lr'" < "$made/error.txt"
echo "README commands: all ran"
