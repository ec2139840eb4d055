#!/usr/bin/env bash
# Everything that a machine with GPUs can tell about this project, in ten minutes.
# usage: benchmarks/gpu.sh [FOLDER]       results go there, by default into gpu-series-DATE
#
# In this order: the demo with tracing, the same training on GPU and CPU, a stopped run resumed,
# mixed precision, training against torchrec's reference loop on one GPU at three batch sizes, tables
# in each kind of memory, a profile of kernels. FOLDER/summary.txt has a line for each part: its exit
# code, seconds and name, as soon as it has ended; FOLDER/NAME.log is what it printed, and
# FOLDER/results has the run folders. A part that fails or takes too long does not end the others.
#
# Without a GPU it runs the same on the CPU, smaller, which shows that the series itself works.
set -euo pipefail

print_help() { sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

run_part() {    # run_part NAME SECONDS COMMAND...
    local name=$1 limit=$2 code=0 begun=$SECONDS
    shift 2
    timeout --kill-after=10 "$limit" "$@" >"$folder/$name.log" 2>&1 || code=$?
    printf '%3d  %4d s  %s\n' "$code" $((SECONDS - begun)) "$name" | tee -a "$folder/summary.txt"
    ((code == 0)) || failed=1
}

train() {    # train NAME OPTION...: one rank on random rows
    local name=$1
    shift
    python -m dlrm.train --output_dir "$folder/results/$name" --source random --seed 1 \
        --num_embeddings "$ids" --embedding_dim 64 --dense_arch_layer_sizes 512,256,64 \
        --over_arch_layer_sizes 512,512,256,1 --learning_rate 0.1 --batch_size "$batch" --epochs 1 \
        --limit_train_batches "$steps" --limit_val_batches 5 --limit_test_batches 5 \
        --report_every 1 --trace "$@"
}

train_on_both() {    # on GPUs the same numbers in another order of sums
    train same-gpu
    CUDA_VISIBLE_DEVICES='' train same-cpu
    python -m analysis compare "$folder/results/same-gpu" "$folder/results/same-cpu"
}

stop_and_resume() {
    train half --limit_train_batches $((steps / 2)) --checkpoint_every_steps $((steps / 2))
    train resumed --load_checkpoint_path "$folder/results/half"
    train whole
    python -m analysis compare "$folder/results/whole" "$folder/results/resumed"
}

describe_machine() {
    nvidia-smi || echo "no GPU: this series ran on the CPU"
    lscpu | grep -E 'Model name|^CPU\(s\)'
    python -c 'import torch, torchrec, fbgemm_gpu
print("torch", torch.__version__, "torchrec", torchrec.__version__, "fbgemm", fbgemm_gpu.__version__)'
}

case ${1:-} in -h | --help) print_help; exit ;; esac
folder=$(realpath -m -- "${1:-gpu-series-$(date +%Y-%m-%d-%H%M)}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -e env.sh ]] || ./0_setup_env.sh
source ./env.sh
if [[ -e $folder/summary.txt ]]; then
    echo "benchmarks/gpu.sh: $folder has a series already: give another folder" >&2
    exit 2
fi
mkdir -p "$folder/results"
failed=0
if nvidia-smi -L >/dev/null 2>&1; then
    ids=1000000 batch=8192 steps=100 batches=(2048 16384 65536)
else
    ids=20000 batch=256 steps=10 batches=(512)
fi
export folder ids batch steps
export -f train train_on_both stop_and_resume describe_machine

run_part machine 60 bash -c describe_machine
RESULTS=$folder/results NAME=demo run_part demo 180 ./3_train.sh
run_part same 120 bash -c train_on_both
run_part resume 120 bash -c stop_and_resume
run_part mixed-precision 60 bash -c 'train amp --amp bf16'
for size in "${batches[@]}"; do
    run_part "reference-$size" 120 python benchmarks/train.py --ranks 1 --rounds 2 --steps 50 \
        --batch_size "$size" --num_embeddings "$ids" --train_rows $((50 * size)) --eval_rows $((4 * size))
done
for store in device_mem cached_host_mem cached_ssd; do
    run_part "store-$store" 60 bash -c "train $store --store_type $store"
done
run_part profile 90 bash -c "train profile --profile_steps $((steps / 2))-$((steps / 2 + 5)) &&
    python -m analysis finish \"\$folder/results/profile\""
echo "$folder/summary.txt"
exit "$failed"
