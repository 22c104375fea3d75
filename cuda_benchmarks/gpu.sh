#!/usr/bin/env bash
# Everything that needs a GPU, in one command of at most LIMIT seconds. No network, nothing is installed.
#
#   cuda_benchmarks/gpu.sh                 the whole plan, in its order
#   PART=again cuda_benchmarks/gpu.sh      what failed or was not reached; PART="smoke rows": these steps
#   DRY=1 cuda_benchmarks/gpu.sh           the same plan without a GPU: emulator and CPU, tiny sizes
#
# Step      seconds  what
# load           15  the library in LIBRARY (make gpu-library builds it), or, if that does not load, a compilation
# smoke          45  every kernel instance against fp64, poisoned outputs, twice: smoke.py
# graphs         60  CUDA graphs, side streams, whole steps: test_cuda_graphs.py, eight processes
# tests         100  the op tests on the GPU, twelve processes
# rows          150  timings of every family, a row as soon as a case is measured
# counters       60  ncu: bytes, share of the memory rate and stalls of each kernel
# sanitize      110  memcheck, racecheck, synccheck, initcheck on smoke.py --small --watched
# steps          60  whole training steps, plain PEFT LoRA against BLoB: 1B, then 7B
#
# Everything goes to OUT as soon as it is there, in four files: summary.txt, smoke.jsonl, counters.csv and
# evidence.tar.gz (logs, and cuda_benchmarks/results/<GPU>). The exit code is that of the worst step. What python lacks (pytest,
# xdist, transformers, ncu, compute-sanitizer) is left out with one line. `report.py --gpu OUT` reads OUT.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

PART=${PART:-all}
DRY=${DRY:-0}
LIMIT=${LIMIT:-565}
PYTHON=${PYTHON:-python3}
ROOT=$PWD
OUT=${OUT:-$ROOT/runs/gpu}
LIBRARY=${LIBRARY:-$ROOT/build/gpu-library}
STATE=${STATE:-$ROOT/build/gpu}
STEPS=(load smoke graphs tests rows counters sanitize steps)
declare -A BUDGET=([load]=15 [smoke]=45 [graphs]=60 [tests]=100 [rows]=150 [counters]=60 [sanitize]=110 [steps]=60)
WORST=0
DEVICE=cuda
if [[ $DRY == 1 ]]; then
  DEVICE=sim
  # The library of the environment, with its emulator, unless one is named.
  [[ -e $LIBRARY/libbayes_kernels_sim.so ]] || LIBRARY=
fi

mkdir -p "$OUT" "$STATE/logs"
[[ -z $LIBRARY ]] || export BAYES_KERNELS_LIBRARY=$LIBRARY
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
SUMMARY=$OUT/summary.txt

say() { printf '%s\n' "$*" | tee -a "$SUMMARY"; }
left() { echo $((LIMIT - SECONDS)); }
has() { "$PYTHON" -c "import importlib.util as u, sys; sys.exit(any(u.find_spec(n) is None for n in sys.argv[1:]))" "$@" 2>/dev/null; }
tool() { command -v "$1" || { [[ -x /usr/local/cuda/bin/$1 ]] && echo "/usr/local/cuda/bin/$1"; }; }
pack() {
  local saved=()
  [[ $DRY == 1 ]] || saved=(-C "$ROOT/cuda_benchmarks" results)
  tar -czf "$OUT/evidence.tar.gz" -C "$STATE" logs "${saved[@]}"
}

# run STEP COMMAND...: within the step's budget and what is left of the whole; the end of its log to the screen.
run() {
  local name=$1 log=$STATE/logs/$1.log seconds=$SECONDS limit code
  shift
  limit=$((BUDGET[$name] < $(left) ? BUDGET[$name] : $(left)))
  ((limit > 3)) || {
    say "$name: no time was left"
    return 124
  }
  # pytest names what failed so far when it is interrupted.
  timeout --signal=INT --kill-after=5 "$limit" "$@" >>"$log" 2>&1
  code=$?
  tail -n 6 "$log"
  pack
  case $code in
  0) say "$name: passed in $((SECONDS - seconds)) s" ;;
  124 | 137) say "$name: stopped after $((SECONDS - seconds)) s" ;;
  *) say "$name: FAILED with $code after $((SECONDS - seconds)) s" ;;
  esac
  return "$code"
}

machine() {
  say "== $(date -u +%FT%TZ) ${BAYES_KERNELS_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo 'unknown commit')}"
  say "$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo 'no GPU')"
  say "$("$PYTHON" -c 'import platform, torch; print("python", platform.python_version(), "torch", torch.__version__, "cuda", torch.version.cuda)')"
}

loads() { "$PYTHON" -c 'import sys; from bayes_kernels import _library as l; sys.exit(l.problem is not None)'; }

load() {
  if ! loads >>"$STATE/logs/load.log" 2>&1; then
    say "load: $LIBRARY has no library that loads; compiling"
    [[ -x /usr/local/cuda/bin/nvcc ]] && export PATH=/usr/local/cuda/bin:$PATH
    BUDGET[load]=$((LIMIT / 2))
    # For this GPU alone: all architectures would take the time of all other steps.
    run load env BAYES_KERNELS_CUDA_ARCHITECTURES=this bash -c "cmake -S '$ROOT' -B '$STATE/cmake' -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=\$(command -v '$PYTHON') \
      -DBAYES_KERNELS_CUDA=$([[ $DRY == 1 ]] && echo OFF || echo ON) && cmake --build '$STATE/cmake' --parallel && \
      mkdir -p '$LIBRARY' && cp '$STATE'/cmake/libbayes_kernels*.so '$LIBRARY'" || return
  fi
  run load "$PYTHON" -m bayes_kernels
}

smoke() {
  local options=(--device "$DEVICE" --json "$OUT/smoke.jsonl")
  [[ $DRY == 1 ]] && options+=(--small --family noise,divergence)
  run smoke "$PYTHON" cuda_benchmarks/smoke.py "${options[@]}"
}

# tests_of STEP PROCESSES [pytest options]
tests_of() {
  local name=$1 processes=$2 options=(-v -ra --tb=short -p no:cacheprovider)
  shift 2
  has pytest || {
    say "$name: skipped, no pytest"
    return 0
  }
  [[ $DRY == 1 ]] || export FAIL_WITHOUT_CUDA=1
  has xdist && [[ $DRY != 1 ]] && options+=(-n "$processes" --dist load)
  run "$name" "$PYTHON" -m pytest "${options[@]}" "$@"
}

# Each capture at a first launch is a process of its own, and takes it seconds to start.
graphs() { tests_of graphs 8 python_tests/functional/test_cuda_graphs.py; }

tests() {
  local files=(adapter adapter_gradients activations grouped few_tokens tiles derivatives curvature divergence predict registration tall)
  [[ $DRY == 1 ]] && files=()
  files=(test_random "${files[@]/#/functional/test_}")
  has transformers peft && [[ $DRY != 1 ]] && files+=(hf/test_cuda)
  files=("${files[@]/#/python_tests/}")
  # torch.compile's tests start compilers, which take longer than all others together.
  tests_of tests 12 --device "$DEVICE" -k "not compile" "${files[@]/%/.py}"
}

rows() {
  local options=(--device cuda --quick --seconds 0.3 --save) families=(adapter activations grouped tall predict curvature vbll experts)
  [[ $DRY == 1 ]] && options=(--device cpu --quick --seconds 0.01) families=(curvature)
  run rows "$PYTHON" cuda_benchmarks "${families[@]}" "${options[@]}"
}

counters() {
  local ncu
  ncu=$(tool ncu) || {
    say "counters: skipped, there is no ncu"
    return 0
  }
  run counters "$ncu" --clock-control none --csv --log-file "$OUT/counters.csv" --launch-count 120 \
    --kernel-name 'regex:^(amax|apply|average|combine|dense|dequantize|down|eigen|finish|gradient|gram|normaliser|outer|pack|prepare|quantize|refine|scaled|small|solve|sum|total|up|value)_' \
    --section SpeedOfLight --section MemoryWorkloadAnalysis --section WarpStateStats --section LaunchStats \
    "$PYTHON" cuda_benchmarks/smoke.py --device cuda --counters
}

sanitize() {
  local sanitizer check code only worst=0 checks=4 end=$((SECONDS + BUDGET[sanitize]))
  sanitizer=$(tool compute-sanitizer) || {
    say "sanitize: skipped, there is no compute-sanitizer"
    return 0
  }
  # Without PyTorch's cache every tensor is an allocation of its own, so that overruns are seen. Each check has
  # its share of the time that is left.
  for check in memcheck racecheck synccheck initcheck; do
    # Ours alone are watched; initcheck has to see what others write, too.
    only=(--kernel-name kns=bayes_kernels)
    [[ $check == initcheck ]] && only=()
    # PyTorch asks the driver what it may refuse; our own calls raise what goes wrong.
    [[ $check == memcheck ]] && only+=(--report-api-errors no)
    BUDGET[sanitize]=$(((end - SECONDS) / checks--))
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 run sanitize "$sanitizer" --tool "$check" "${only[@]}" --error-exitcode 9 \
      --print-limit 20 "$PYTHON" cuda_benchmarks/smoke.py --device cuda --small --watched
    code=$?
    say "  $check: $code"
    ((code > worst)) && worst=$code
  done
  return "$worst"
}

steps() {
  has transformers peft || {
    say "steps: skipped, no transformers or PEFT"
    return 0
  }
  local options=(--device cuda --seconds 3 --save) case="1B, 4 x 300"
  [[ $DRY == 1 ]] && options=(--device cpu --quick --seconds 0.01 --vs none) case="10M, 8 x 64"
  # The 1B model first: its rows are saved before the 7B model is made.
  run steps "$PYTHON" cuda_benchmarks end_to_end "${options[@]}" --case "$case" || return
  [[ $DRY == 1 ]] || (($(left) < 40)) || run steps "$PYTHON" cuda_benchmarks end_to_end "${options[@]}" --case "7B, 4 x 300"
}

if [[ $DRY != 1 ]] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu.sh: torch sees no GPU here; DRY=1 runs the plan on the emulator and the CPU" >&2
  exit 2
fi
case $PART in
all) wanted=("${STEPS[@]}") && rm -f "$STATE"/passed-* ;;
again)
  wanted=()
  for name in "${STEPS[@]}"; do [[ -e $STATE/passed-$name && $name != load ]] || wanted+=("$name"); done
  ;;
*) read -ra wanted <<<"load $PART" ;;
esac
for name in "${wanted[@]}"; do
  [[ " ${STEPS[*]} " == *" $name "* ]] || {
    echo "gpu.sh: PART must be all, again or some of ${STEPS[*]}, got $name" >&2
    exit 2
  }
done
machine
for name in "${wanted[@]}"; do
  "$name"
  code=$?
  ((code == 0)) && : >"$STATE/passed-$name"
  ((code > WORST)) && WORST=$code
  [[ $name == load && $code != 0 ]] && break
done
pack
say "done in $SECONDS s, worst $WORST"
exit "$WORST"
