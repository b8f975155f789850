#!/usr/bin/env bash
# All checks that need a GPU, in one run, on a machine with one GPU and no network: builds the kernels, runs the GPU
# tests, the table of the operators, training speed (MFU) and the runs meant for a 12 GB card. A stage that fails or takes
# too long is noted, and the next one starts.
#
#   tools/bench/gpu_check.sh [OUT] [--wheelhouse DIR] [--data PREFIX] [--stages LIST] [--longest SECONDS]
#                      [--cap-gib GIB] [--cpu-rehearsal]
#
# OUT            results: summary.txt, stages.tsv, training.jsonl, bench_ops.*, logs.tar.gz ($OUT, else gpu_check_results)
# --wheelhouse   *.whl to install (without any index) where deepspeed or pydantic are missing. To fill it on a machine with a
#                network: pip wheel --no-build-isolation --no-deps -w DIR deepspeed==0.19.8 hjson; pip download --no-deps
#                --only-binary=:all: --python-version 3.12 -d DIR pydantic pydantic-core annotated-types typing-inspection setuptools liger-kernel
# --data         prefix of a data set made beforehand (else one is made of the text that comes with this Python)
# --stages       of: wheels,build,tests,bench,data,mfu,mfu-compile,capped (all of them); where a command may not take long,
#                one call a stage: wheels go into a temporary folder, so name that stage in each
# --longest      seconds that no stage or run may exceed, in place of longer limits of its own
# --cap-gib      memory of torch's allocator in the stage `capped`: 11.2, what a 12 GB card leaves after the CUDA context
# --cpu-rehearsal  the same stages on a CPU with the tiny preset and few steps
# PYTHON names the interpreter (.venv/bin/python, else python3). Exit status 0 if every stage was OK or skipped, else 1.
set -uo pipefail
FROM=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2

STAGES=wheels,build,tests,bench,data,mfu,mfu-compile,capped
RESULTS=${OUT:-gpu_check_results} WHEELHOUSE='' DATA='' CAP_GIB=11.2 LONGEST=100000 REHEARSAL=''
usage() { sed -n '2,24s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
while (($#)); do
  case $1 in
    --wheelhouse | --data | --stages | --cap-gib | --longest)
      (($# > 1)) || { echo "$1 needs a value" >&2; exit 2; }
      case $1 in
        --wheelhouse) WHEELHOUSE=$2 ;;
        --data) DATA=$2 ;;
        --stages) STAGES=$2 ;;
        --cap-gib) CAP_GIB=$2 ;;
        --longest) LONGEST=$2 ;;
      esac
      shift ;;
    --cpu-rehearsal) REHEARSAL=1 ;;
    -h | --help) usage; exit 0 ;;
    -*) echo "unknown option $1; --help lists them" >&2; exit 2 ;;
    *) RESULTS=$1 ;;
  esac
  shift
done
for name in ${STAGES//,/ }; do
  case $name in
    wheels | build | tests | bench | data | mfu | mfu-compile | capped) ;;
    *) echo "unknown stage '$name'; --help lists them" >&2; exit 2 ;;
  esac
done
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
if [[ -z $REHEARSAL ]] && ! nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
  echo "no GPU: nvidia-smi lists none. --cpu-rehearsal goes through the stages on a CPU." >&2
  exit 2
fi

absolute() { case $1 in '' | /*) echo "$1" ;; *) echo "$FROM/$1" ;; esac }
RESULTS=$(absolute "$RESULTS") WHEELHOUSE=$(absolute "$WHEELHOUSE") DATA=$(absolute "$DATA")
mkdir -p "$RESULTS" || exit 2
WORK=$(mktemp -d) || exit 2
RUNNING='' # the process group of the training run under way
end_run() {
  [[ -z $RUNNING ]] || kill -KILL -- "-$RUNNING" 2>/dev/null
  RUNNING=''
}
trap 'end_run; rm -rf "$WORK"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
mkdir "$WORK/logs"
export PYTHONPATH="$WORK/site:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
: >"$RESULTS/stages.tsv"
: >"$RESULTS/training.jsonl"

wanted() { [[ ,$STAGES, == *",$1,"* ]]; }

# note NAME STATUS SECONDS TEXT: a line of the table, and the logs so far: the machine may be taken away at any time.
note() {
  printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" >>"$RESULTS/stages.tsv"
  printf '%-28s %-8s %5s s  %s\n' "$1" "$2" "$3" "$4"
  tar -C "$WORK" -czf "$RESULTS/logs.tar.gz" logs
}

last_line() { grep -v '^[[:space:]]*$' "$1" | tail -n 1 | cut -c 1-120; }

# stage NAME SECONDS COMMAND...: run, with a time limit and a log, and note how it went.
stage() {
  local name=$1 limit=$2 log=$WORK/logs/${1//[^A-Za-z0-9_.-]/_}.log start=$SECONDS status=0
  shift 2
  ((limit < LONGEST)) || limit=$LONGEST
  timeout --kill-after=10 "$limit" "$@" >"$log" 2>&1 || status=$?
  case $status in
    0) note "$name" OK $((SECONDS - start)) "$(last_line "$log")" ;;
    124 | 137) note "$name" TIMEOUT $((SECONDS - start)) "over $limit s: $(last_line "$log")" ;;
    *) note "$name" FAILED $((SECONDS - start)) "status $status: $(last_line "$log")" ;;
  esac
}

# Starts a launcher, its memory on the GPU capped at argv[1] GiB (0: not at all).
CAPPED_LAUNCH='
import runpy, sys
cap = float(sys.argv[1])
sys.argv = sys.argv[2:]
if cap:
    import torch
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap * 2**30 / total))
runpy.run_path(sys.argv[0], run_name="__main__")
'
# Prints a summary of the reports of argv[2] after the first argv[4]; appends it to argv[3] as a line of JSON. argv[1]: the name.
SUMMARISE='
import json, statistics, sys
name, metrics, results, warmup = sys.argv[1:]
reports = [r for r in map(json.loads, open(metrics)) if "tokens_per_second" in r]
kept = reports[int(warmup):]
middle = lambda key: statistics.median(r[key] for r in kept) if kept and key in kept[0] else None
found = {"run": name, "reports": len(kept), **{key: middle(key) for key in ("tokens_per_second", "step_seconds", "mfu")}}
found["memory_gib"] = max((r["memory_gib"] for r in reports), default=None)
found["loss"] = [round(r["loss"], 4) for r in reports]
print(json.dumps(found), file=open(results, "a"))
if not kept:
    sys.exit(f"only {len(reports)} reports")
mfu = "unknown" if found["mfu"] is None else format(found["mfu"], ".1%")
speed, step, memory = (found[key] for key in ("tokens_per_second", "step_seconds", "memory_gib"))
last = found["loss"][-1]
print(f"{speed:,.0f} tokens/s, MFU {mfu}, {step:.3f} s a step, {memory:.2f} GiB, loss {last}")
'

# train NAME SECONDS CAP REPORTS CONFIG OPTION...: a run that is ended once it has reported so often, so that nothing is
# saved (a checkpoint of the larger models takes longer than all steps here); the first two reports are not counted.
train() {
  local name=$1 limit=$2 cap=$3 reports=$4 config=$5 start=$SECONDS pid text status=0
  local folder=$WORK/runs/$1 log=$WORK/logs/${1//[^A-Za-z0-9_.-]/_}.log
  shift 5
  ((limit < LONGEST)) || limit=$LONGEST
  local fixed=(--train.save_dir "$folder" --data.path "$DATA" --train.steps 1000000 --train.save_interval 1000000
    --train.eval_interval 0 --train.log_interval 2 --train.resume never --log.tensorboard false)
  setsid "$PYTHON" -c "$CAPPED_LAUNCH" "$cap" launchers/pretrain.py --deepspeed_config "$config" "${fixed[@]}" "$@" \
    >"$log" 2>&1 &
  pid=$! RUNNING=$!
  while kill -0 "$pid" 2>/dev/null && ((SECONDS - start < limit)); do
    [[ $(grep -c tokens_per_second "$folder/metrics.jsonl" 2>/dev/null) -ge $reports ]] && break
    sleep 0.5
  done
  if kill -0 "$pid" 2>/dev/null; then
    ((SECONDS - start < limit)) || status=TIMEOUT
    end_run
    wait "$pid" 2>/dev/null
  else
    wait "$pid" || status="status $?"
    [[ $status == 0 ]] && status='status 0: it ended by itself'
    end_run # a loader process may outlive a crash
  fi
  text=$("$PYTHON" -c "$SUMMARISE" "$name" "$folder/metrics.jsonl" "$RESULTS/training.jsonl" 2 2>/dev/null) ||
    text=$(last_line "$log")
  case $status in
    0) note "$name" OK $((SECONDS - start)) "$text" ;;
    TIMEOUT) note "$name" TIMEOUT $((SECONDS - start)) "over $limit s: $text" ;;
    *) note "$name" FAILED $((SECONDS - start)) "$status: $text" ;;
  esac
  rm -rf "$folder"
}

skip() { note "$1" SKIPPED 0 "$2"; }

install_wheels() {
  if "$PYTHON" -c 'import deepspeed, pydantic, tokenizers, tensorboard' 2>/dev/null; then
    skip wheels 'nothing is missing'
  elif [[ -z $WHEELHOUSE ]]; then
    note wheels FAILED 0 'deepspeed or pydantic is missing, and there is no --wheelhouse'
  else
    stage wheels 180 "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$WORK/site" \
      "$WHEELHOUSE"/*.whl
  fi
}

build() {
  if [[ -n $REHEARSAL ]]; then
    stage build 300 env MEGATRONISH_CUDA=off "$PYTHON" setup.py build_ext --inplace
    return
  fi
  local arch
  arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d '. ')
  stage build 300 env MEGATRONISH_CUDA=on MEGATRONISH_CUDA_ARCHS="${MEGATRONISH_CUDA_ARCHS:-$arch}" \
    "$PYTHON" setup.py build_ext --inplace
}

bench() {
  local size=(--dtypes bf16 fp32 --widths 1024 4096)
  [[ -n $REHEARSAL ]] &&
    size=(--device cpu --ops rms_norm --dtypes fp32 --widths 128 --mib 1 --copy-mib 1 --repeats 2 --no-host-row)
  stage bench 420 "$PYTHON" tools/bench/ops.py "${size[@]}" --bars --json "$RESULTS/bench_ops.json"
  cp "$WORK/logs/bench.log" "$RESULTS/bench_ops.txt"
}

# Tokenised text: what --data names, else the text that comes with this Python.
prepare_data() {
  if [[ -n $DATA ]]; then
    skip data "$DATA"
    return
  fi
  DATA=$WORK/data/set_text_document
  local input=()
  [[ -n $REHEARSAL ]] && input=(--input docs/*.md --train-tokenizer 512 --append-eod)
  mkdir -p "$WORK/data"
  stage data 240 "$PYTHON" tools/preprocess_data.py "${input[@]}" --output-prefix "$WORK/data/set"
}

# speed MODEL MICRO OPS [OPTION...]: training at full speed on this GPU; accumulation does not change it and is kept short.
speed() {
  local model=$1 micro=$2 ops=$3 blocks=''
  shift 3
  (($#)) && blocks=:blocks-compiled
  if [[ -n $REHEARSAL ]]; then
    train "mfu:tiny:$ops$blocks" 150 0 4 ds_configs/zero2_h100.json --model.preset tiny --model.seq_length 64 \
      --train_micro_batch_size_per_gpu 2 --gradient_accumulation_steps 1 --bf16.enabled false --kernels.ops "$ops" "$@"
  else
    train "mfu:$model:$ops$blocks" 240 0 8 ds_configs/zero2_h100.json --model.preset "$model" \
      --train_micro_batch_size_per_gpu "$micro" --gradient_accumulation_steps 4 --kernels.ops "$ops" "$@"
  fi
}

all_speeds() {
  local ops
  for ops in fused reference; do
    speed s0_300m 16 "$ops" "$@"
    [[ -n $REHEARSAL ]] || speed s1_730m 48 "$ops" "$@"
    [[ -n $REHEARSAL ]] && break
  done
}

capped() {
  if [[ -n $REHEARSAL ]]; then
    local tiny=(--model.preset tiny --model.seq_length 64 --train_micro_batch_size_per_gpu 2
      --gradient_accumulation_steps 1 --bf16.enabled false)
    skip capped:cap 'no GPU: the runs go without'
    train capped:zero_offload 150 0 3 ds_configs/zero_offload_4070ti.json "${tiny[@]}"
    train capped:zero3_offload 150 0 3 ds_configs/zero3_offload_4b.json "${tiny[@]}"
    return
  fi
  train capped:zero_offload_4070ti 240 "$CAP_GIB" 5 ds_configs/zero_offload_4070ti.json
  train capped:zero3_offload_4b 420 "$CAP_GIB" 3 ds_configs/zero3_offload_4b.json --gradient_accumulation_steps 2 \
    --train.log_interval 1
}

{
  date -u '+%Y-%m-%d %H:%M UTC'
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo 'no GPU'
  "$PYTHON" -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__)'
  git rev-parse HEAD 2>/dev/null
} 2>&1 | tee "$RESULTS/summary.txt"

wanted wheels && install_wheels
wanted build && build
if wanted tests; then
  if [[ -n $REHEARSAL ]]; then skip tests 'no GPU'; else stage tests 300 "$PYTHON" -m pytest -q -p no:cacheprovider tests/gpu; fi
fi
wanted bench && bench
if wanted mfu || wanted mfu-compile || wanted capped || wanted data; then prepare_data; fi
wanted mfu && all_speeds
wanted mfu-compile && all_speeds --train.compile true
wanted capped && capped

{
  echo
  while IFS=$'\t' read -r name status seconds text; do
    printf '%-32s %-8s %5s s  %s\n' "$name" "$status" "$seconds" "$text"
  done <"$RESULTS/stages.tsv"
} | tee -a "$RESULTS/summary.txt"
! grep -qP '^[^\t]*\t(FAILED|TIMEOUT)\t' "$RESULTS/stages.tsv"
