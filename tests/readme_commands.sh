#!/usr/bin/env bash
# The README's commands on what a quickstart made: readme_commands.sh QUICKSTART_FOLDER
set -euo pipefail
made=$1
bin=.venv/bin
"$bin/visper" --help > /dev/null
for verb in quickstart train pipeline recipes chat evaluate; do "$bin/visper" "$verb" --help | grep -q Example; done
"$bin/visper" recipes > /dev/null
"$bin/visper" recipes llama3-8b-vit-l/pt | grep -q "global_batch: 256"
"$bin/visper" pipeline "$made/pt/run.yaml" "$made/ift/run.yaml" | grep -c finished | grep -qx 2
picture=$(ls "$made/world/images" | grep held_out | head -1)
"$bin/visper" chat "$made/ift" --image "$made/world/images/$picture" --prompt "What is in the picture ?"
"$bin/visper" evaluate "$made/ift" --questions "$made/world/questions.json" --images "$made/world/images" \
    --answers "$made/answers/cli.jsonl" --max-new-tokens 4
"$bin/visper" train "$made/ift/run.yaml" output="$made/again" optimisation.max_steps=2 logging.save_every=1
if "$bin/visper" train "$made/ift/run.yaml" optimisation.lrr=1 2> "$made/error.txt"; then exit 1; fi
grep -q "did you mean 'lr'" "$made/error.txt"
echo "README commands: all ran"
