#!/usr/bin/env bash
# The whole line on a fresh machine, without a download beyond the packages: photographs -> shards -> a few minutes of
# training -> model folder -> compressed files -> decoded images -> rate-distortion report, all under quickstart/.
# Running it again reuses what is there.
#   PHOTOS=folder   train on your own photographs instead of those that come with scikit-image
#   MINUTES=4       minutes of training
#   VENV=.venv      the virtual environment
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/_venv.sh train,eval
OUT=quickstart
MINUTES="${MINUTES:-4}"
mkdir -p "$OUT"

step() { printf '\n== %s\n' "$1"; }

step "1. photographs"
python scripts/sample_photos.py "$OUT/photos"

step "2. shards"
codec-train shards "${PHOTOS:-$OUT/photos/train}" -o "$OUT/shards" || [ $? -eq 1 ]  # 1: some files are unreadable

step "3. training ($MINUTES minutes)"
if [ -f "$OUT/run/model/codec.json" ]; then
  echo "$OUT/run/model is there already (delete $OUT/run to train again)"
else
  rm -rf "$OUT/run"  # a run that did not end
  codec-train run quickstart data.shards="$OUT/shards" run.out="$OUT/run" run.time_limit_min="$MINUTES"
fi
MODEL="$OUT/run/model"

step "4. encode and decode"
rm -rf "$OUT/coded" "$OUT/decoded"
codec encode "$OUT/photos/test" -o "$OUT/coded" -m "$MODEL" -q 50
codec info "$OUT/coded/astronaut.png.lcx"
codec decode "$OUT/coded" -o "$OUT/decoded" -m "$MODEL"

step "5. rate-distortion, against JPEG, WebP, AVIF and JPEG XL on photographs that were not trained on"
codec-eval rd "$OUT/photos/test" -m "$MODEL" -o "$OUT/rd"

cat <<END

Done. Look at
  $OUT/rd/report.html             all of it on one page: tables, plots, a viewer with a slider, the worst images
  $OUT/rd/comparison.png          original, ours and the baselines at the nearest equal rate
  $OUT/rd/rd_psnr.png             rate against PSNR (and rd_*.png for the other metrics)
  $OUT/run/validation/            reconstructions while it trained
  $OUT/decoded/                   the decoded photographs
  $MODEL/README.md    the model card

A few minutes on a handful of photographs make a toy. Next:
  codec-train shards YOUR_PHOTOS -o shards
  codec-train run small-f8c8 data.shards=shards run.out=runs/first run.time_limit_min=25
  codec encode YOUR_PHOTOS -o coded -m runs/first/model -q 50
END
