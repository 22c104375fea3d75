#!/usr/bin/env bash
# Everything that needs a GPU: build, tests, sanitizers, benchmarks. No network, nothing is installed.
#
#   cuda_benchmarks/gpu.sh                 all parts, one after the other
#   PART=build|test|sanitize|bench cuda_benchmarks/gpu.sh      one part
#   DRY=1 cuda_benchmarks/gpu.sh           without a GPU: emulator in place of CUDA, tiny subsets
#
# Each part takes up to LIMIT seconds (540) and can be run again: the build is kept in BUILD, tests that
# have passed are not repeated (RERUN=1 repeats them), each family of benchmarks is saved when it is
# done. Logs, rows of results and a summary go to OUT (runs/gpu), in few files; a part that fails does
# not stop the others, and the exit code is that of the worst.
#
# Needed: python with torch 2.11 or later and pytest, g++, cmake, nvcc. What else is missing (ninja,
# transformers, PEFT, compute-sanitizer, pytest-xdist) is left out, with one line that says so.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

PART=${PART:-all}
DRY=${DRY:-0}
LIMIT=${LIMIT:-540}
RERUN=${RERUN:-0}
PYTHON=${PYTHON:-python3}
ROOT=$PWD
OUT=${OUT:-$ROOT/runs/gpu}
BUILD=${BUILD:-$ROOT/build/gpu}
JOBS=${JOBS:-$(nproc)}
STARTED=$SECONDS
WORST=0

mkdir -p "$OUT" "$BUILD"
export BAYES_KERNELS_LIBRARY=$BUILD/lib PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
SUMMARY=$OUT/summary.txt

say() { printf '%s\n' "$*" | tee -a "$SUMMARY"; }
left() { echo $((LIMIT - (SECONDS - STARTED))); }
has() { "$PYTHON" -c "import importlib.util as u, sys; sys.exit(any(u.find_spec(n) is None for n in sys.argv[1:]))" "$@" 2>/dev/null; }

# Runs a command under what is left of the part's time; its output goes to a file, its end to the screen.
step() {
  local name=$1 log=$2 code seconds=$SECONDS
  shift 2
  if (($(left) < 10)); then
    say "$name: not started, the part's time is used up; run it again"
    WORST=$((WORST > 124 ? WORST : 124))
    return 124
  fi
  timeout --kill-after=10 "$(left)" "$@" >>"$log" 2>&1
  code=$?
  tail -n 12 "$log"
  case $code in
  0) say "$name: passed in $((SECONDS - seconds)) s" ;;
  124 | 137) say "$name: stopped after $((SECONDS - seconds)) s, see $(basename "$log")" ;;
  *) say "$name: FAILED with $code after $((SECONDS - seconds)) s, see $(basename "$log")" ;;
  esac
  WORST=$((code > WORST ? code : WORST))
  return "$code"
}

machine() {
  say "== machine"
  { nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || echo "no GPU"; } 2>/dev/null | tee -a "$SUMMARY"
  { nvcc --version 2>/dev/null || echo "no nvcc"; } | tail -n 1 | tee -a "$SUMMARY"
  "$PYTHON" -c 'import platform, torch; print("python", platform.python_version(), "torch", torch.__version__, "cuda", torch.version.cuda, torch.cuda.is_available())' | tee -a "$SUMMARY"
  for package in pytest xdist ninja pybind11 transformers peft accelerate typer scipy torchmetrics sklearn vbll; do
    has "$package" || say "not installed: $package"
  done
  if has transformers peft; then
    "$PYTHON" -c 'import transformers, peft; print("transformers", transformers.__version__, "peft", peft.__version__)' 2>/dev/null | tee -a "$SUMMARY"
  fi
}

build() {
  say "== build"
  # What has passed or was measured, was so with the library that is replaced now.
  rm -rf "$BUILD/lib" "$BUILD"/passed "$BUILD"/benched-* "$BUILD"/memcheck-* "$BUILD"/racecheck-*
  local options=(-DCMAKE_BUILD_TYPE=Release "-DPython_EXECUTABLE=$(command -v "$PYTHON")") cuda=ON
  if [[ $DRY == 1 ]]; then
    cuda=OFF
  elif ! command -v nvcc >/dev/null; then
    if [[ ! -x /usr/local/cuda/bin/nvcc ]]; then
      say "build: FAILED, there is no nvcc; put it on PATH"
      WORST=1
      return 1
    fi
    export PATH=/usr/local/cuda/bin:$PATH
  fi
  if ! command -v cmake >/dev/null; then
    say "build: FAILED, there is no cmake; put it on PATH"
    WORST=1
    return 1
  fi
  command -v ninja >/dev/null && options+=(-G Ninja)
  # The emulator is built too: the same tests run on it, and a difference between both says where to look.
  if has pybind11; then
    options+=(-DBAYES_KERNELS_TESTS=ON "-Dpybind11_DIR=$("$PYTHON" -m pybind11 --cmakedir)")
  else
    say "build: without pybind11 no emulator and no core tests"
  fi
  export BAYES_KERNELS_CUDA_ARCHITECTURES=${BAYES_KERNELS_CUDA_ARCHITECTURES:-this}
  : >"$OUT/build.log"
  step "configure" "$OUT/build.log" cmake -S "$ROOT" -B "$BUILD/cmake" "-DBAYES_KERNELS_CUDA=$cuda" "${options[@]}" || return
  step "compile" "$OUT/build.log" cmake --build "$BUILD/cmake" --parallel "$JOBS" || return
  mkdir -p "$BUILD/lib"
  cp "$BUILD"/cmake/*.so "$BUILD/lib/"
  [[ -x $BUILD/cmake/count_kernels ]] && cp "$BUILD/cmake/count_kernels" "$BUILD/lib/"
  step "load" "$OUT/build.log" "$PYTHON" -m bayes_kernels
  # For the record: another nvcc takes other registers, and the library is no worse for it.
  [[ $DRY == 1 ]] || "$PYTHON" cuda_benchmarks/registers.py --check >"$OUT/registers.log" 2>&1 ||
    say "registers: $(tail -n 1 "$OUT/registers.log")"
  return 0
}

need_build() {
  [[ -e $BUILD/lib/libbayes_kernels.so ]] || build
  [[ -e $BUILD/lib/libbayes_kernels.so ]]
}

# The op tests; the others need more packages and seldom a GPU.
OP_TESTS=(test_adapter test_curvature test_divergence test_predict test_random test_registration test_tall)

tests() {
  say "== test"
  need_build || return
  local arguments=(-q -ra --tb=short -p no:cacheprovider)
  [[ -e $BUILD/passed && $RERUN != 1 ]] || : >"$BUILD/passed"
  # Few workers: each holds a CUDA context of its own.
  [[ $DRY == 1 ]] || ! has xdist || arguments+=(-n "$((JOBS < 6 ? JOBS : 6))" --dist load)
  [[ $DRY == 1 ]] || export FAIL_WITHOUT_CUDA=1
  local files=() name
  for file in python_tests/test_*.py; do
    name=$(basename "$file" .py)
    case $name in
    test_simt | test_benchmarks | test_counters | test_registers | test_fake_cuda) continue ;; # no GPU needed
    test_hf_* | test_cli | test_experiment | test_compare)
      "$PYTHON" -c 'import bayes_kernels.hf' 2>/dev/null || {
        say "$name: skipped, $("$PYTHON" -c 'import bayes_kernels.hf' 2>&1 | tail -n 1)"
        continue
      } ;;
    test_plots) has matplotlib || continue ;;
    esac
    files+=("$name")
  done
  [[ $DRY == 1 ]] && files=(test_divergence)
  # Op tests and whole training runs first: they are what a GPU is for.
  local seen=" "
  for name in "${OP_TESTS[@]}" test_hf_cuda "${files[@]}"; do
    [[ " ${files[*]} " == *" $name "* && $seen != *" $name "* ]] || continue
    seen+="$name "
    grep -qx "$name" "$BUILD/passed" && {
      say "$name: passed before, not repeated"
      continue
    }
    if OMP_NUM_THREADS=2 step "$name" "$OUT/tests.log" "$PYTHON" -m pytest "${arguments[@]}" "python_tests/$name.py"; then
      echo "$name" >>"$BUILD/passed"
    fi
  done
}

sanitize() {
  say "== sanitize"
  need_build || return
  local tool=${SANITIZER:-compute-sanitizer}
  if ! command -v "$tool" >/dev/null; then
    [[ -x /usr/local/cuda/bin/compute-sanitizer ]] && tool=/usr/local/cuda/bin/compute-sanitizer
  fi
  local run=() device=cuda files=("${OP_TESTS[@]}")
  if [[ $DRY == 1 ]]; then
    device=sim
    files=(test_divergence)
  elif ! command -v "$tool" >/dev/null; then
    say "sanitize: skipped, there is no compute-sanitizer"
    return
  fi
  # The op tests are small, as they also run on the emulator. torch.compile's tests start compilers.
  # Without PyTorch's cache every tensor is an allocation of its own, so that overruns are seen.
  for check in memcheck racecheck; do
    for name in "${files[@]}"; do
      [[ -e $BUILD/$check-$name && $RERUN != 1 && $DRY != 1 ]] && continue
      [[ $DRY == 1 ]] || run=("$tool" --tool "$check" --error-exitcode 9 --print-limit 20)
      if PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$check $name" "$OUT/$check.log" "${run[@]}" "$PYTHON" -m pytest -q -x \
        -p no:cacheprovider --tb=short -k "$device and not compile" "python_tests/$name.py"; then
        : >"$BUILD/$check-$name"
      fi
    done
  done
}

bench() {
  say "== bench"
  need_build || return
  local device=cuda options=() families=(adapter predict tall curvature end_to_end vbll)
  if [[ $DRY == 1 ]]; then
    device=cpu
    options=(--quick --seconds 0.02)
    families=(curvature)
  else
    options=(--save)
  fi
  [[ ${QUICK:-0} == 1 ]] && options+=(--quick)
  if [[ -z ${BAYES_KERNELS_COMMIT:-} ]] && ! git rev-parse HEAD >/dev/null 2>&1; then
    say "bench: no git history here; rows name commit unknown (set BAYES_KERNELS_COMMIT)"
  fi
  for family in "${families[@]}"; do
    [[ -e $BUILD/benched-$family-${QUICK:-0} && $RERUN != 1 && $DRY != 1 ]] && continue
    if step "bench $family" "$OUT/bench.log" "$PYTHON" cuda_benchmarks "$family" --device "$device" "${options[@]}"; then
      : >"$BUILD/benched-$family-${QUICK:-0}"
    fi
  done
  if [[ $DRY != 1 ]]; then
    # Flat: few folders come back from a machine that is lent.
    tar -czf "$OUT/results.tar.gz" -C cuda_benchmarks results
    "$PYTHON" cuda_benchmarks/report.py && cp docs/benchmarks.md "$OUT/benchmarks.md"
  fi
}

# The build needs nvcc only: without a GPU it compiles for sm_90.
if [[ $DRY != 1 && $PART != build ]] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu.sh: torch sees no GPU here; PART=build needs none, and DRY=1 runs the rest on the emulator and CPU" >&2
  exit 2
fi
case $PART in
build) machine && build ;;
test) tests ;;
sanitize) sanitize ;;
bench) bench ;;
all)
  machine
  for part in build tests sanitize bench; do
    STARTED=$SECONDS
    "$part"
  done
  ;;
*)
  echo "gpu.sh: PART must be build, test, sanitize, bench or all, got $PART" >&2
  exit 2
  ;;
esac
exit "$WORST"
