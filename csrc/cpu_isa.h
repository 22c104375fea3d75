// CPU kernels are compiled once per instruction set and chosen at run time, so that one binary runs
// everywhere. A kernel file x_cpu.cpp defines BK_CPU(function) for each of its functions; the build
// compiles it with -DBK_ISA=baseline, avx2 and avx512; cpu_dispatch.cpp picks.
#pragma once

#define BK_CONCAT_(a, b) a##_##b
#define BK_CONCAT(a, b) BK_CONCAT_(a, b)
#define BK_CPU(function) BK_CONCAT(function, BK_ISA)

namespace bayes_kernels {

enum class Isa : int { kBaseline, kAvx2, kAvx512 };

// The widest set that the processor has, or a narrower one named by the environment variable
// BAYES_KERNELS_CPU (baseline, avx2, avx512). Decided once.
Isa cpu_isa();
const char* cpu_path_name();

}  // namespace bayes_kernels
