#!/usr/bin/env bash
# What only a GPU can show, in parts of less than ten minutes each, which go on where they were stopped.
#
#   benchmarks/gpu.sh WORK MODEL TEXT [PART…]
#
# WORK keeps everything: what it has is not made again. MODEL is a small real model (SmolLM2-135M), TEXT something to train
# on. The parts, in the order in which they run unless some are named:
#
#   throughput  a model of 1.1 billion parameters in the shape of TinyLlama, random weights, two loops, context 2048: seconds
#               of a step of uptraining, tokens/s, and the share of the GPU's peak (PEAK, in TFLOP/s)
#   compiled    the same with compiled layers
#   fsdp        the same shared out by FSDP2, over the one process that there is
#   curves      MODEL in two loops, trained by bfloat16 and by float32 on the same windows: their KL, step by step
#   engine      benchmarks/engine.py of what curves have trained, in bfloat16: 1, 8 and 32 requests
#   tied        benchmarks/tied_or_not.py of MODEL, as far as MINUTES go; call it again to go on
#
# Environment: PYTHON (python), PEAK (989, an H100's or H200's in bfloat16), MINUTES (9), TOKENS of tied (100M),
# CURVE_TOKENS (2M), CALIBRATE (tokens, 16384), CONTEXT (2048), BATCH (8), TIED_FLAGS (--compile), TINY=1 to try the
# script itself on a CPU.
set -euo pipefail

work=$1 model=$2 text=$3
shift 3
[ $# -gt 0 ] || set -- throughput compiled fsdp curves engine tied
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python} context=${CONTEXT:-2048} batch=${BATCH:-8} minutes=${MINUTES:-9}
large='dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4)'
learn="--batch-size 64 --micro-batch 16 --context 512"
if [ "${TINY:-}" ]; then
  large='dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)'
  learn="--batch-size 2 --micro-batch 2 --context 64"
fi
mkdir -p "$work"

make_large() {
  [ -e "$work/large-small" ] && return
  [ -e "$work/large" ] || "$python" - "$model" "$work/large" "$large" <<'END'
import os, sys
import torch
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

source, target, shape = sys.argv[1:]
vocabulary = AutoConfig.from_pretrained(source).vocab_size
torch.manual_seed(0)
config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=2048, **eval(shape))
LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(target + ".partial")
AutoTokenizer.from_pretrained(source).save_pretrained(target + ".partial")
os.rename(target + ".partial", target)
END
  "$python" -m rrtc init "$work/large" -o "$work/large-small" --sharing cycle --rank 64 --measure-tokens 0
}

# estimate NAME COMMAND… : what a few steps of `rrtc uptrain` take.
estimate() {
  local name=$1
  shift
  make_large
  [ -e "$work/$name.json" ] || "$@" -m rrtc uptrain "$work/large-small" --dry-run --data "$text" --context "$context" \
    --batch-size "$batch" --micro-batch "$batch" --json "$work/$name.json" ${flags:-}
  "$python" - "$name" "$work/$name.json" "${PEAK:-989}" <<'END'
import json, sys

name, file, peak = sys.argv[1:]
found = json.load(open(file))
speed = found["tokens_per_step"] / found["seconds_per_step"]
share = found["flops_per_token"] * speed / (float(peak) * 1e12)
print(f"{name}: {found['seconds_per_step']:.3f} s a step, {speed:,.0f} tokens/s, {share:.1%} of the peak, "
      f"{found['peak_memory_bytes'] / 1e9:.1f} GB, on {found['device']}")
END
}

two_loops() {
  [ -e "$work/two" ] || "$python" -m rrtc init "$model" -o "$work/two" --sharing middle_cycle --budget 0.684 \
    --calibrate-on "$text" --calibrate-tokens "${CALIBRATE:-16384}" --measure-tokens 0
}

for part in "$@"; do
  echo "== $part"
  case $part in
    throughput) flags="" estimate throughput "$python" ;;
    compiled) flags="--compile" estimate compiled "$python" ;;
    fsdp) flags="--fsdp" estimate fsdp "$python" -m torch.distributed.run --standalone --nproc-per-node 1 ;;
    curves)
      two_loops
      "$python" "$here/healing.py" "$work/curves" --tokens "${CURVE_TOKENS:-2M}" --data "$text" \
        --flags "$learn" --row "bfloat16 | $work/two | --precision bfloat16" \
        --row "float32 | $work/two | --precision float32"
      ;;
    engine)
      "$python" "$here/engine.py" "$work/curves/bfloat16" --dtype bfloat16 --batches 1 8 32 | tee "$work/engine.txt"
      ;;
    tied)
      "$python" "$here/tied_or_not.py" "$work/tied" --model "$model" --data "$text" --tokens "${TOKENS:-100M}" \
        --minutes "$minutes" --init-flags "--calibrate-tokens ${CALIBRATE:-16384}" \
        --flags "$learn --precision bfloat16 ${TIED_FLAGS:---compile}"
      ;;
    *)
      echo "There is no part '$part'." >&2
      exit 2
      ;;
  esac
done
