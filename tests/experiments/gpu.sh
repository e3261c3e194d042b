#!/usr/bin/env bash
# What a new card does: checks, then measurements, then training. All parts, or those you name; each
# takes about ten minutes at most, and a part that fails does not stop the next. Everything goes to
# out/gpu: report.md, log.txt and the runs.
#
#     tests/experiments/gpu.sh                          tests/experiments/gpu.sh right demo
#     TEXT=wikitext.txt.gz tests/experiments/gpu.sh pretrain memorize      with text of your own
#     SMALL=1 tests/experiments/gpu.sh                  a rehearsal on a CPU, at small sizes
cd "$(dirname "$0")/../.." || exit
OUT=out/gpu
HERE=tests/experiments
mkdir -p $OUT

run() {  # a command; its last lines and its seconds go into the report
    local start=$SECONDS
    echo "+ $*"
    "$@" > $OUT/last.txt 2>&1
    local status=$?
    tee -a $OUT/log.txt < $OUT/last.txt
    printf '\n`%s` took %d s, exit status %d:\n\n```text\n%s\n```\n' "$*" $((SECONDS - start)) \
        $status "$(tail -n 60 $OUT/last.txt)" >> $OUT/report.md
}

right() {
    run python -m pytest -q tests/test_mora.py tests/test_model.py tests/test_train.py
    run python $HERE/bench.py errors $QUICK
    for again in again1 again2; do
        run python train.py $TINY --methods mora --no-compile --eval_every 10 --out_dir $OUT/$again
        cut -d, -f1-3 $OUT/$again/uuid-*/metrics.csv > $OUT/$again/losses.csv
    done
    run diff $OUT/again1/losses.csv $OUT/again2/losses.csv
}

demo() {
    run python train.py --out_dir $OUT/demo $TINY
    run python train.py --out_dir $OUT/demo-compiled --compile $TINY
}

layers() {
    run python $HERE/bench.py layers $QUICK --no-compile
    run python $HERE/bench.py layers $QUICK
}

steps() {
    run python $HERE/bench.py steps merge $QUICK --no-compile
    run python $HERE/bench.py steps $QUICK
}

memory() {  # predicted, and measured: compiled only in the last run
    for dtype in float32 float16 bfloat16; do
        run python $HERE/bench.py memory --real --no-compile --dtype $dtype $MODEL
    done
    run python $HERE/bench.py memory --real --dtype bfloat16 $MODEL
}

text() {  # Python's own library, where you have named nothing
    TEXT=${TEXT:-$OUT/text.txt}
    local write="import data; print(data.standard_library_text($LENGTH))"
    [ -e $OUT/text.txt ] || python -c "$write" > $OUT/text.txt
}

pretrain() {  # the base for what follows: GPT-2's size, on the text at hand
    text
    run python train.py text --data $TEXT --tokenizer bytes --methods full --learning_rate 1e-3 \
        --batch_size 64 --export --out_dir $OUT/base $WIDE --max_steps "${STEPS:-2000}"
}

memorize() {  # the paper's figure 2; RANK=256 is its other rank
    local base
    base=$(ls $OUT/base/*/model.pt)
    run python train.py uuid --init "$base" --rank "${RANK:-8}" --methods lora mora \
        --operator rotation sharing --learning_rate 1e-3 3e-3 --out_dir $OUT/memorize $PAIRS
    run python train.py uuid --init "$base" --methods full --learning_rate 3e-4 \
        --out_dir $OUT/memorize $PAIRS
    run python $HERE/compare.py $OUT/memorize/uuid-*
}

scratch() {  # the paper's figure 3
    text
    run python train.py text --data $TEXT --tokenizer bytes --rank 32 --operator sharing \
        --methods full lora relora mora remora --learning_rate 1e-3 3e-3 \
        --other_learning_rate 3e-3 --out_dir $OUT/scratch $WIDE --max_steps "${STEPS:-500}"
    run python $HERE/compare.py $OUT/scratch/text-*
}

MODEL="--preset gpt2 --batch 8 --length 1024"
WIDE="--n_layer 12 --n_head 12 --n_embd 768 --block_size 512"
PAIRS="--n_pairs 500 --batch_size 500 --max_steps 500"  # 0.05 bits a parameter, as the paper asks
LENGTH=20_000_000
if [ -n "$SMALL" ]; then
    QUICK="--quick" TINY="--max_steps 8" STEPS=8 LENGTH=200_000
    PAIRS="--n_pairs 16 --max_steps 8"
    MODEL="--preset demo --batch 4 --length 128"
    WIDE="--n_layer 1 --n_head 2 --n_embd 32 --block_size 128"
fi
for part in "${@:-right demo layers steps memory pretrain memorize scratch}"; do
    for name in $part; do
        printf '\n## %s\n' "$name" | tee -a $OUT/report.md
        $name
    done
done
