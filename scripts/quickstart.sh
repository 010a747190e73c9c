#!/usr/bin/env bash
# The codec on a fresh machine, without a download beyond the packages: photographs -> compressed files -> decoded images
# -> rate-distortion report, with the model that comes with the package, all under quickstart/. With TRAIN=1 also
# photographs -> shards -> a few minutes of training -> a model of your own -> the same again. Running it again reuses
# what is there.
#   TRAIN=1         train too
#   MINUTES=4       minutes of training (trains, too)
#   PHOTOS=folder   train on your own photographs instead of those that come with scikit-image (trains, too)
#   OUT=quickstart  where everything goes
#   VENV=.venv      the virtual environment
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/_venv.sh train,eval
OUT="${OUT:-quickstart}"
TRAIN="${TRAIN:-${MINUTES:+1}${PHOTOS:+1}}"
MINUTES="${MINUTES:-4}"
mkdir -p "$OUT"

step() { printf '\n== %s\n' "$1"; }

step "1. photographs"
python scripts/sample_photos.py "$OUT/photos"

step "2. encode and decode, with the model that comes with the package"
rm -rf "$OUT/coded" "$OUT/decoded"
codec models
codec encode "$OUT/photos/test" -o "$OUT/coded"
codec info "$OUT/coded/astronaut.png.lcx"
codec decode "$OUT/coded" -o "$OUT/decoded"

step "3. rate-distortion, against JPEG, WebP, AVIF and JPEG XL"
codec-eval rd "$OUT/photos/test" -m kl-f8 -o "$OUT/rd"

if [ "${TRAIN:-0}" != 0 ]; then
  step "4. shards"
  codec-train shards "${PHOTOS:-$OUT/photos/train}" -o "$OUT/shards" || [ $? -eq 1 ]  # 1: some files are unreadable

  step "5. training ($MINUTES minutes)"
  if [ -f "$OUT/run/model/codec.json" ]; then
    echo "$OUT/run/model is there already (delete $OUT/run to train again)"
  else
    rm -rf "$OUT/run"  # a run that did not end
    codec-train run quickstart data.shards="$OUT/shards" run.out="$OUT/run" run.time_limit_min="$MINUTES"
  fi

  step "6. rate-distortion of the new model, on photographs that it was not trained on"
  codec-eval rd "$OUT/photos/test" -m "$OUT/run/model" -o "$OUT/rd-run"
fi

cat <<END

Done. Look at
  $OUT/decoded/                   the decoded photographs
  $OUT/rd/report.html             all of it on one page: tables, plots, a viewer with a slider, the worst images
  $OUT/rd/comparison.png          original, ours and the baselines at the nearest equal rate
  $OUT/rd/rd_psnr.png             rate against PSNR (and rd_*.png for the other metrics)
END
if [ "${TRAIN:-0}" != 0 ]; then
  cat <<END
  $OUT/run/validation/            reconstructions while it trained
  $OUT/run/model/README.md        the card of the new model
  $OUT/rd-run/report.html         the same page for it

A few minutes on a handful of photographs make a toy. Next:
  codec-train shards YOUR_PHOTOS -o shards
  codec-train run small-f8c8 data.shards=shards run.out=runs/first run.time_limit_min=25
  codec encode YOUR_PHOTOS -o coded -m runs/first/model
END
else
  cat <<END

Nothing was trained. TRAIN=1 bash scripts/quickstart.sh makes a model of your own and measures it too (minutes).
Next:
  codec encode YOUR_PHOTOS -o coded
  codec decode coded -o decoded
END
fi
