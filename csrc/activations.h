// Activations family: what backward has of a layer's input in 8 bits (core/microscale.h), rounded
// by the noise contract. Torch-free.
#pragma once

#include "core/microscale.h"
#include "core/philox.h"

namespace bayes_kernels {

struct QuantizeParams {
  const int64_t* key;
  int64_t stream;
  int64_t row0;
  DType dtype;
  const void* x;    // (rows, n)
  int8_t* codes;    // (rows, n)
  uint8_t* scales;  // (rows, ceil(n / 32))
  int64_t rows, n;
};

struct DequantizeParams {
  DType dtype;
  const int8_t* codes;    // (rows, n)
  const uint8_t* scales;  // (rows, ceil(n / 32))
  void* x;                // (rows, n)
  int64_t rows, n;
};

#define BK_DECLARE_ACTIVATIONS(device)                                              \
  const char* quantize_activations_##device(const QuantizeParams& p, void* stream); \
  const char* dequantize_activations_##device(const DequantizeParams& p, void* stream)

BK_DECLARE_ACTIVATIONS(cpu);
BK_DECLARE_ACTIVATIONS(baseline);
BK_DECLARE_ACTIVATIONS(avx2);
BK_DECLARE_ACTIVATIONS(avx512);
BK_DECLARE_ACTIVATIONS(cuda);

}  // namespace bayes_kernels
